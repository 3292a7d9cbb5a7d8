"""`missing` prints what to install first; `run -- COMMAND` runs a command beside fresh nodes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import FrameType

from tests.services import STANDARD_NODES, Node, NodeError, machine_bin, postgres, rabbitmq


def missing() -> list[str]:
    """The packages without which no node can be started, nor a client in Node; PostgreSQL's is not
    needed, but better."""
    packages = []
    if not rabbitmq.find_command("rabbitmq-server"):
        packages.append(rabbitmq.DEBIAN_PACKAGE)
    if os.geteuid() == 0 and not machine_bin():
        packages.append(postgres.DEBIAN_PACKAGE)
    if not shutil.which("npm"):
        packages += ["nodejs", "npm"]
    return packages


def run(command: list[str]) -> int:
    """Runs a command with the nodes' addresses in its environment; returns its exit code.

    It does not wait for the nodes: what needs one has to, by `wait_served`. Where one cannot be
    started the command is ended.
    """
    with ExitStack() as stack:
        nodes: dict[str, Node] = {}
        for name, make in STANDARD_NODES.items():
            nodes[name] = make()
            stack.callback(nodes[name].close)
        urls = {name: node.url for name, node in nodes.items()}
        child = subprocess.Popen(command, env={**os.environ, **urls})

        def forward(number: int, _frame: FrameType | None) -> None:
            child.send_signal(number)

        # A terminal sends Ctrl-C to the child as well: it ends the run, this one waits for it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, forward)
        with ThreadPoolExecutor() as pool:
            starts = [pool.submit(_start, node, child) for node in nodes.values()]
            code = child.wait()
        for start in starts:
            start.result()
        return code if code >= 0 else 128 - code


def _start(node: Node, child: subprocess.Popen[bytes]) -> None:
    try:
        node.start()
    except NodeError:
        child.terminate()
        raise


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    match arguments:
        case ["missing"]:
            print(*missing())
            return 0
        case ["run", "--", *command] if command:
            return run(command)
    print("usage: python -m tests.services missing | run -- COMMAND", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
