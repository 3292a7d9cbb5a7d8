"""Private RabbitMQ nodes: nothing shared with a node of the system, the port mapper included."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import amqp

from tests.services.node import Node, NodeError, free_port, remove

DEBIAN_PACKAGE = "rabbitmq-server"

# Debian's own commands in PATH change to the account `rabbitmq`; these run as whoever calls them.
_DEBIAN_BIN = Path("/usr/lib/rabbitmq/bin")
_CONFIG = {
    "heartbeat": "10",
    "consumer_timeout": "1800000",
    "vm_memory_high_watermark.absolute": "512MB",
    "disk_free_limit.absolute": "50MB",
    "log.console": "true",
    "log.console.level": "warning",
}
# One scheduler that sleeps when idle: a node on a small machine must not spin.
_ERLANG_FLAGS = "+S 1:1 +sbwt none +sbwtdcpu none +sbwtdio none"
_LOOPBACK_ONLY = "-kernel inet_dist_use_interface {127,0,0,1}"
_numbers = itertools.count(1)

# Made with the node (a `rabbitmqctl add_vhost` would take a second each): one for each test.
VHOSTS = tuple(f"test{number}" for number in range(1, 97))


def find_command(name: str) -> Path | None:
    """Where a command of RabbitMQ is on this machine, if it is."""
    found = shutil.which(name, path=f"{_DEBIAN_BIN}:{os.environ.get('PATH', '')}:/usr/local/sbin")
    return Path(found) if found else None


class RabbitmqNode(Node):
    """A RabbitMQ broker; `url` is its vhost `/`, as `guest`, who may use all of `vhosts` too."""

    def __init__(
        self, *, config: Mapping[str, str] | None = None, vhosts: Sequence[str] = VHOSTS
    ) -> None:
        """`config` adds lines to rabbitmq.conf, or replaces those that are there by default. Each
        of `vhosts` costs a tenth of a second whenever the node starts."""
        super().__init__("rabbitmq")
        self.name = f"jobsvc{os.getpid()}n{next(_numbers)}@localhost"
        self._store = self.directory / "store"
        self._pid_file = self.directory / "pid"
        self._epmd_port = free_port()
        self._epmd: subprocess.Popen[bytes] | None = None
        self._env = self._environment()
        definitions = self.directory / "definitions.json"
        definitions.write_text(json.dumps(_definitions(vhosts)))
        lines = {
            "listeners.tcp.1": f"127.0.0.1:{self.port}",
            "load_definitions": str(definitions),
            **_CONFIG,
            **(config or {}),
        }
        text = "".join(f"{key} = {value}\n" for key, value in lines.items())
        (self.directory / "rabbitmq.conf").write_text(text)
        (self.directory / "enabled_plugins").write_text("[].\n")

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    @property
    def pid(self) -> int:
        """The Erlang virtual machine, of a node that was started."""
        super().pid  # noqa: B018 - raises if it was not
        return int(self._pid_file.read_text())

    def ctl(self, *arguments: str) -> str:
        """Runs `rabbitmqctl` on the node and returns its output; takes 1 to 2 s of CPU.

        Raises subprocess.CalledProcessError if it fails.
        """
        return subprocess.run(
            [_command("rabbitmqctl"), "--quiet", "--node", self.name, *arguments],
            env=self._env,
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout

    def queue_depth(self, queue: str) -> int:
        """How many messages are ready in a queue; raises amqp's NotFound if there is no such."""
        with _connection(self.url) as connection:
            return int(connection.channel().queue_declare(queue, passive=True).message_count)

    def close(self) -> None:
        self.kill()
        if self._epmd:
            self._end(self._epmd)
        super().close()

    def _launch(self) -> subprocess.Popen[bytes]:
        if self._epmd is None:
            self._epmd = self._spawn([_command("epmd")], self._env)
        self._pid_file.unlink(missing_ok=True)
        return self._spawn([_command("rabbitmq-server")], self._env)

    def _probe(self) -> None:
        probe(self.url)

    def _wipe(self) -> None:
        remove(self._store)

    def _environment(self) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RABBITMQ_", "ERL_"))}
        place = {
            "NODENAME": self.name,
            "NODE_IP_ADDRESS": "127.0.0.1",
            "NODE_PORT": str(self.port),
            "DIST_PORT": str(free_port()),
            "MNESIA_BASE": str(self._store),
            "LOG_BASE": str(self.directory),
            "LOGS": "-",
            "PID_FILE": str(self._pid_file),
            "CONF_ENV_FILE": str(self.directory / "rabbitmq-env.conf"),
            "CONFIG_FILE": str(self.directory / "rabbitmq.conf"),
            "ADVANCED_CONFIG_FILE": str(self.directory / "advanced.config"),
            "GENERATED_CONFIG_DIR": str(self.directory / "generated"),
            "ENABLED_PLUGINS_FILE": str(self.directory / "enabled_plugins"),
            "SERVER_ADDITIONAL_ERL_ARGS": f"{_ERLANG_FLAGS} {_LOOPBACK_ONLY}",
            "CTL_ERL_ARGS": _ERLANG_FLAGS,
        }
        return {
            **inherited,
            **{f"RABBITMQ_{key}": value for key, value in place.items()},
            "HOME": str(self.directory),  # where Erlang keeps its cookie
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
        }


def probe(url: str) -> None:
    """Raises OSError or amqp's error unless the broker serves in its vhost `/`."""
    with _connection(url) as connection:
        connection.channel().queue_declare(exclusive=True)


def _connection(url: str) -> amqp.Connection:
    # Not through Kombu, whose connect sleeps for seconds and tries again.
    parts = urlsplit(url)
    return amqp.Connection(
        f"{parts.hostname}:{parts.port}",
        userid=parts.username,
        password=parts.password,
        connect_timeout=2,
        read_timeout=2,
        write_timeout=2,
    )


def _definitions(names: Sequence[str]) -> dict[str, object]:
    vhosts = ("/", *names)
    everything = {"user": "guest", "configure": ".*", "write": ".*", "read": ".*"}
    return {
        "users": [{"name": "guest", "password": "guest", "tags": "administrator"}],
        "vhosts": [{"name": name} for name in vhosts],
        "permissions": [{"vhost": name, **everything} for name in vhosts],
    }


def vhost_url(url: str, vhost: str) -> str:
    """The address of another vhost of the broker whose vhost `/` is at `url`."""
    return f"{url.rstrip('/')}/{vhost}"


def _command(name: str) -> Path:
    if found := find_command(name):
        return found
    raise NodeError(f"{name} is not on this machine: install {DEBIAN_PACKAGE}")
