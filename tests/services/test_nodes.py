"""The nodes that other tests stand on: they serve, keep what they stored, and leave nothing."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import amqp
import psutil
import psycopg2
import pytest

from tests.services import PostgresNode, free_port, machine_bin, wheel_bin
from tests.services import node as nodes

_RUN_UNTIL_KILLED = """
import signal
from tests.services import PostgresNode, wheel_bin
node = PostgresNode(wheel_bin()).start()
print(node.directory, node.pid, flush=True)
signal.pause()
"""


@pytest.fixture(scope="module")
def node() -> Iterator[PostgresNode]:
    with PostgresNode(machine_bin() or wheel_bin()) as running:
        yield running


def _query(url: str, statement: str) -> object:
    connection = psycopg2.connect(url.replace("+psycopg2", ""), connect_timeout=2)
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
            row = cursor.fetchone() if cursor.description else None
            return row[0] if row else None
    finally:
        connection.close()


def test_a_port_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though nothing listens on it yet."""
    given: list[socket.socket] = []
    monkeypatch.setattr(nodes, "_given", given)

    def take_three() -> list[int]:
        ports = [free_port() for _ in range(3)]
        while given:
            given.pop().close()
        return sorted(ports)

    ports = take_three()
    monkeypatch.setattr(nodes, "_PORTS", ports)
    assert take_three() == ports


def test_addresses_serve(database_url: str, postgres18_url: str, broker_url: str) -> None:
    assert _query(database_url, "SELECT count(*) FROM pg_stat_user_tables") == 0
    assert str(_query(postgres18_url, "SHOW server_version")).startswith("18")
    address, _, vhost = broker_url.rpartition("@")[2].partition("/")
    with amqp.Connection(address, virtual_host=vhost, connect_timeout=5) as connection:
        assert connection.channel().queue_declare(exclusive=True).message_count == 0


def test_killed_node_keeps_its_data_and_wiped_node_does_not(node: PostgresNode) -> None:
    _query(node.url, "CREATE TABLE kept AS SELECT 7 AS value")
    _query(node.url, "CHECKPOINT")
    node.kill()
    with pytest.raises(psycopg2.OperationalError, match="refused"):
        _query(node.url, "SELECT 1")
    node.start()
    assert _query(node.url, "SELECT value FROM kept") == 7
    node.wipe()
    node.start()
    with pytest.raises(psycopg2.errors.UndefinedTable):
        _query(node.url, "SELECT value FROM kept")


def test_paused_node_does_not_answer_until_resumed(node: PostgresNode) -> None:
    node.pause()
    try:
        with pytest.raises(psycopg2.OperationalError, match="timeout"):
            _query(node.url, "SELECT 1")
    finally:
        node.resume()
    assert _query(node.url, "SELECT 1") == 1


def test_nothing_is_left_of_a_killed_run() -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", _RUN_UNTIL_KILLED], stdout=subprocess.PIPE, text=True
    )
    with run:
        assert run.stdout is not None
        directory, pid = run.stdout.readline().split()
        postmaster = psutil.Process(int(pid))
        run.kill()
    deadline = time.monotonic() + 5
    while Path(directory).exists() or _runs(postmaster):
        assert time.monotonic() < deadline, f"left behind: {directory} or {postmaster}"
        time.sleep(0.05)


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
