"""How long the driver waits for an answer."""

from __future__ import annotations

import io
import socket
import struct
import time
from contextlib import closing

import psycopg2
import pytest
import sqlalchemy as sa

from jobsvc.errors import DatabaseUnavailable
from jobsvc.store.database import CommitUnknown, Transaction
from jobsvc.store.dialects import sockets
from jobsvc.store.dialects.sockets import _Line, waiting_long
from tests.harness.proxy import Proxy
from tests.store.conftest import connect
from tests.store.house import House

SECONDS = 0.3


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "SILENCE_SECONDS_MAX", SECONDS)


@pytest.mark.usefixtures("impatient")
def test_silent_database_is_out_of_reach(pg_house: House, postgresql_url: str) -> None:
    with Proxy(postgresql_url) as link:
        database = connect(link.url)
        assert database.read(_one) == 1
        began = time.monotonic()
        with link.silence():
            with pytest.raises(DatabaseUnavailable) as caught:
                database.read(_one)
            assert not isinstance(caught.value, CommitUnknown)
        assert time.monotonic() - began >= SECONDS
        assert database.read(_one) == 1
        database.close()


@pytest.mark.usefixtures("impatient")
def test_silence_in_commit_is_of_unknown_outcome(pg_house: House, postgresql_url: str) -> None:
    with Proxy(postgresql_url) as link:
        database = connect(link.url)
        silence = link.silence()

        def fall_silent(tx: Transaction) -> None:
            tx.execute(sa.select(1))
            silence.__enter__()

        with pytest.raises(CommitUnknown):
            database.write(fall_silent)
        silence.__exit__(None, None, None)
        database.close()


@pytest.mark.parametrize("closed", [False, True])
def test_a_connection_that_has_ended_meanwhile_is_shut_in_silence(closed: bool) -> None:
    """The thread that shuts those of all is one that the process cannot do without."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
        line = _Line(ours.fileno())
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.close()  # by a reset
        with ours, pytest.raises(ConnectionResetError):
            ours.recv(1)
        if closed:
            line.close()
        line.shut()
        line.close()


@pytest.mark.usefixtures("impatient")
def test_migrations_wait_as_long_as_it_takes(pg_house: House) -> None:
    def sleep(connection: sa.Connection) -> None:
        connection.execute(sa.select(sa.func.pg_sleep(2 * SECONDS)))

    with waiting_long():
        pg_house.database.read(sleep)
    with pytest.raises(DatabaseUnavailable):
        pg_house.database.read(sleep)


@pytest.mark.usefixtures("impatient")
def test_connections_of_others_wait_and_copy_as_they_like(
    pg_house: House, postgresql_url: str
) -> None:
    assert pg_house.database.read(_one) == 1
    url = sa.make_url(postgresql_url)
    copied = io.StringIO()
    theirs = psycopg2.connect(**url.translate_connect_args(username="user"))
    with closing(theirs), theirs.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(%s)", (2 * SECONDS,))
        cursor.copy_expert("COPY (SELECT 1) TO STDOUT", copied)
    assert copied.getvalue() == "1\n"


def _one(connection: sa.Connection) -> int:
    return int(connection.execute(sa.select(1)).scalar_one())
