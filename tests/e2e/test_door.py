"""Everything behind locked doors: TLS on every connection, and a token for every call."""

from __future__ import annotations

import json
import os
import ssl
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import sqlalchemy as sa

from jobsvc.broker.topology import Broker, abandon, broker_errors
from jobsvc.errors import DatabaseUnavailable
from jobsvc.store.database import Database
from tests.harness import Process, Service, until
from tests.harness.service import SETTINGS
from tests.pem import Authority
from tests.services import PostgresNode, RabbitmqNode, free_port, machine_bin, wheel_bin


class TlsPostgres(PostgresNode):
    def __init__(self, authority: Authority) -> None:
        super().__init__(machine_bin() or wheel_bin())
        certificate, key = authority.issue("postgres", "127.0.0.1")
        files = {"ssl_cert_file": certificate, "ssl_key_file": key}
        self._settings["ssl"] = "on"
        for name, path in files.items():
            copy = self.directory / Path(path).name
            copy.write_bytes(Path(path).read_bytes())
            copy.chmod(0o600)
            if self._account:
                os.chown(copy, self._account.pw_uid, self._account.pw_gid)
            self._settings[name] = str(copy)


class TlsRabbitmq(RabbitmqNode):
    """Its certificate is for `localhost`, not for its address."""

    def __init__(self, authority: Authority) -> None:
        certificate, key = authority.issue("rabbitmq", "localhost")
        self.tls_port = free_port()
        super().__init__(
            vhosts=(),
            config={
                "listeners.ssl.1": f"127.0.0.1:{self.tls_port}",
                "ssl_options.cacertfile": authority.path,
                "ssl_options.certfile": certificate,
                "ssl_options.keyfile": key,
                "ssl_options.verify": "verify_none",
            },
        )

    def tls_url(self, host: str = "localhost") -> str:
        return f"amqps://guest:guest@{host}:{self.tls_port}//"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pem"), "ca")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("other"), "ca")


@pytest.fixture(scope="module")
def rabbitmq(authority: Authority) -> Iterator[TlsRabbitmq]:
    with TlsRabbitmq(authority) as node:
        yield node


@pytest.fixture(scope="module")
def postgres(authority: Authority) -> Iterator[TlsPostgres]:
    with TlsPostgres(authority) as node:
        yield node


def verified(node: PostgresNode, authority: Authority) -> str:
    return f"{node.url}?sslmode=verify-full&sslrootcert={authority.path}"


# The broker.


def connect(broker: Broker) -> Any:
    connection = broker.connection()
    try:
        connection.connect()
    except broker_errors(connection):
        abandon(connection)
        raise
    return connection


def test_a_broker_that_can_prove_its_name_is_used(
    rabbitmq: TlsRabbitmq, authority: Authority
) -> None:
    broker = Broker(rabbitmq.tls_url(), ca_path=authority.path)
    connection = connect(broker)
    assert connection.connection.transport.sock.version().startswith("TLSv1.")
    broker.declare(connection, {"default": 1})
    assert broker.depth(connection, "default", 1) == 0
    abandon(connection)


def test_a_broker_that_cannot_is_not(
    rabbitmq: TlsRabbitmq, authority: Authority, other: Authority
) -> None:
    for broker in (
        Broker(rabbitmq.tls_url(), ca_path=other.path),
        Broker(rabbitmq.tls_url()),  # nor does the system know its CA
        Broker(rabbitmq.tls_url("127.0.0.1"), ca_path=authority.path),
    ):
        with pytest.raises(ssl.SSLCertVerificationError):
            connect(broker)


def test_a_frozen_broker_lets_go(rabbitmq: TlsRabbitmq, authority: Authority) -> None:
    connection = connect(Broker(rabbitmq.tls_url(), ca_path=authority.path))
    rabbitmq.pause()
    try:
        begun = time.monotonic()
        abandon(connection)
        assert time.monotonic() - begun < 8
    finally:
        rabbitmq.resume()


# The database.


def test_the_url_says_how_the_database_is_verified(
    postgres: TlsPostgres, authority: Authority, other: Authority
) -> None:
    database = Database(verified(postgres, authority))
    in_use = sa.text("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
    assert database.read(lambda connection: connection.execute(in_use).scalar_one())
    database.close()
    database = Database(verified(postgres, other))
    with pytest.raises(DatabaseUnavailable) as caught:
        database.read(lambda connection: connection.execute(in_use).scalar_one())
    assert isinstance(caught.value.__cause__, sa.exc.OperationalError)
    assert isinstance(caught.value.__cause__.orig, psycopg2.OperationalError)
    assert "certificate verify failed" in str(caught.value.__cause__)
    database.close()


# The whole.


def jobsvc(
    directory: Path, *words: str, environ: Mapping[str, str] | None = None, code: int = 0
) -> Process:
    """A command that has ended, with that exit code."""
    name = f"{words[0]}{len(list(directory.glob('*.out')))}"
    process = Process(name, words, environ or {}, directory)
    assert process.wait() == code, process.tail()
    return process


def made_token(directory: Path, *words: str) -> tuple[str, str]:
    """Its text and its line."""
    text, line = jobsvc(directory, "token", *words).out_path.read_text().splitlines()
    return text, line


@pytest.fixture
def locked(
    postgres: TlsPostgres, rabbitmq: TlsRabbitmq, authority: Authority, tmp_path: Path
) -> Iterator[Service]:
    certificate, key = authority.issue("server", "jobs.internal")
    (tmp_path / "tokens").touch()
    made = Service(
        verified(postgres, authority),
        rabbitmq.tls_url(),
        tmp_path,
        broker_ca=authority.path,
        tls_cert=certificate,
        tls_key=key,
        tls_client_ca=authority.path,
        tokens_file=str(tmp_path / "tokens"),
        log_level="debug",
    )
    yield made
    made.close()


def client_environment(locked: Service, authority: Authority) -> Mapping[str, str]:
    certificate, key = authority.issue("client", "client.internal")
    return {
        "JOBSVC_ADDRESS": locked.addresses[0],
        "JOBSVC_TLS_CA": authority.path,
        "JOBSVC_TLS_SERVER_NAME": "jobs.internal",
        "JOBSVC_CLIENT_CERT": certificate,
        "JOBSVC_CLIENT_KEY": key,
    }


def test_a_job_runs_behind_locked_doors(locked: Service, authority: Authority) -> None:
    directory = locked.directory
    text, line = made_token(directory, "shop", "submit", "read")
    tokens = directory / "tokens"
    tokens.write_text(f"# who may call\n{line}\n")
    secret = directory / "token"
    secret.write_text(text + "\n")
    locked.start()
    environ = client_environment(locked, authority)
    jobsvc(directory, "healthcheck", environ=environ)
    without = {k: v for k, v in environ.items() if not k.startswith("JOBSVC_CLIENT_")}
    jobsvc(directory, "healthcheck", code=1, environ=without)

    words = ("run", "demo.echo", '{"a": 1}')
    done = jobsvc(directory, *words, "--token-file", str(secret), environ=environ)
    *events, result = map(json.loads, done.out_path.read_text().splitlines())
    assert result["result"] == {"a": 1}
    assert events[0]["actor"] == "shop"
    refused = jobsvc(directory, *words, code=4, environ=environ)
    assert refused.tail().splitlines()[-1].startswith("UNAUTHENTICATED UNAUTHENTICATED: no token")
    words = ("cancel", str(result["job_id"]), "--token-file")
    refused = jobsvc(directory, *words, str(secret), code=4, environ=environ)
    assert "PERMISSION_DENIED SCOPE_MISSING: " in refused.tail()

    tokens.write_text("# nobody\n")
    locked.servers[0].wait_record("files read anew", 10, what="tokens")
    jobsvc(directory, "get", result["job_id"], "--token-file", str(secret), code=4, environ=environ)
    log = locked.log_text()
    assert text not in log
    assert line.split()[1] not in log
    assert "whoever reaches the address" not in log


def test_a_watch_ends_when_its_token_is_taken_away(locked: Service, authority: Authority) -> None:
    directory = locked.directory
    text, line = made_token(directory, "shop", "submit", "read")
    (directory / "tokens").write_text(line)
    locked.start(workers=0)
    environ = {**client_environment(locked, authority), "JOBSVC_TOKEN": text}
    submitted = jobsvc(directory, "submit", "demo.echo", environ=environ)
    watch = Process("watch", ["watch", submitted.out_path.read_text().strip()], environ, directory)
    until(lambda: "SUBMITTED" in watch.out_path.read_text(), 20, "the watch has begun")
    (directory / "tokens").write_text("")
    assert watch.wait() == 4
    assert watch.tail().splitlines()[-1].startswith("UNAUTHENTICATED UNAUTHENTICATED: ")


def test_a_bad_certificate_or_line_stops_the_start(authority: Authority, tmp_path: Path) -> None:
    certificate, _ = authority.issue("server", "jobs.internal")
    _, key = authority.issue("another", "jobs.internal")
    environ = {
        **SETTINGS,
        "JOBSVC_TLS_CERT": certificate,
        "JOBSVC_TLS_KEY": key,
        "JOBSVC_TOKENS": "# ours\nshop hunter2 read",
    }
    said = jobsvc(tmp_path, "dev", code=2, environ=environ).tail()
    assert "JOBSVC_TLS_KEY: " in said
    assert "are not a certificate and its key" in said
    assert "JOBSVC_TOKENS: line 2: " in said
    assert "hunter2" not in said
