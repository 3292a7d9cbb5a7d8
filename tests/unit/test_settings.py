from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobsvc import settings
from jobsvc.settings import SettingsError, describe, load, load_client
from tests.pem import Authority


class Pem:
    """A server's files, as in its environment, and those of others."""

    def __init__(self, directory: Path) -> None:
        authority = Authority(directory, "ca")
        certificate, key = authority.issue("server", "localhost")
        self.server = {"JOBSVC_TLS_CERT": certificate, "JOBSVC_TLS_KEY": key}
        self.ca = authority.path
        _, self.other_key = authority.issue("other", "localhost")


@pytest.fixture
def pem(tmp_path: Path) -> Pem:
    return Pem(tmp_path)


def problems(environ: dict[str, str], **options: object) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(environ, **options)  # type: ignore[arg-type]
    return caught.value.problems


def test_defaults() -> None:
    found = load({})
    assert found.listen == "127.0.0.1:50051"
    assert found.handlers == ("worker.handlers",)
    assert found.queues == ("default",)
    assert (found.relay_interval, found.promote_interval, found.reap_interval) == (1.0, 0.5, 5.0)
    assert (found.redispatch_interval, found.sweep_interval) == (15.0, 5.0)
    assert (found.lease, found.heartbeat, found.shutdown_grace) == (30.0, 10.0, 25.0)
    assert found.isolation == "process"
    assert found.concurrency >= 1
    assert found.processes == 1
    assert found.database_url == found.broker_url == found.smtp_url == ""
    assert load_client({}).address == "127.0.0.1:50051"


@pytest.mark.parametrize(
    ("text", "seconds"), [("500ms", 0.5), ("30s", 30.0), ("2m", 120.0), ("1h", 3600.0)]
)
def test_a_span(text: str, seconds: float) -> None:
    assert settings.parse_span(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "s", "-1s", "1d", "1e3s", "1 s", "nan s", "1s2m", "٣s"])
def test_no_span(text: str) -> None:
    with pytest.raises(ValueError, match="span"):
        settings.parse_span(text)


def test_the_environment_and_flags() -> None:
    environ = {
        "JOBSVC_LISTEN": "127.0.0.1:1",
        "JOBSVC_HANDLERS": "a.b, c",
        "JOBSVC_LEASE": "2s",
        "JOBSVC_HEARTBEAT": "500ms",
        "JOBSVC_LOG_LEVEL": "DEBUG",
        "JOBSVC_CONCURRENCY": "",
    }
    found = load(environ, listen="[::1]:2", handlers=None)
    assert found.listen == "[::1]:2"
    assert found.handlers == ("a.b", "c")
    assert (found.lease, found.heartbeat) == (2.0, 0.5)
    assert found.log_level == "debug"
    assert found.concurrency >= 1


def test_every_problem_is_in_one_message() -> None:
    found = problems(
        {
            "JOBSVC_BROKER_URL": "http://u:hunter2@x",
            "JOBSVC_QUEUE_TYPE": "stream",
            "JOBSVC_LISTEN": "0.0.0.0:50051",
            "JOBSVC_CONCURRENCY": "many",
            "JOBSVC_PROCESSES": "0",
            "JOBSVC_HANDLERS": "no-module",
            "JOBSVC_QUEUES": "a,a",
            "JOBSVC_ISOLATION": "fork",
            "JOBSVC_RELAY_INTERVAL": "1",
            "JOBSVC_LEASE": "20s",
            "JOBSVC_SMTP_URL": "smtp://host:587?starttls=yes",
            "JOBSVC_LOG_FORMAT": "xml",
            "JOBSVC_TOKENS": "secret",
        },
        needs=("database_url", "broker_url"),
    )
    assert sorted(problem.split(":")[0].removeprefix("JOBSVC_") for problem in found) == [
        "BROKER_URL",
        "CONCURRENCY",
        "DATABASE_URL",
        "HANDLERS",
        "HEARTBEAT",
        "ISOLATION",
        "LISTEN",
        "LOG_FORMAT",
        "PROCESSES",
        "QUEUES",
        "QUEUE_TYPE",
        "RELAY_INTERVAL",
        "SMTP_URL",
        "TOKENS",
    ]
    assert "hunter2" not in str(found)
    assert "secret" not in str(found)


def test_several_processes_need_what_serves_several() -> None:
    shared = {"JOBSVC_DATABASE_URL": "postgresql://h/d", "JOBSVC_BROKER_URL": "amqp://h//"}
    assert load(shared, processes=64).processes == 64
    (problem,) = problems(shared, processes=65)
    assert problem == "JOBSVC_PROCESSES: Input should be less than or equal to 64"
    for own in ({"JOBSVC_DATABASE_URL": "sqlite:///a.db"}, {"JOBSVC_BROKER_URL": "memory://"}):
        assert load(shared | own, processes=1).processes == 1
        (problem,) = problems(shared | own, processes=2)
        assert problem.startswith("JOBSVC_PROCESSES: more than one need PostgreSQL and RabbitMQ")
        assert next(iter(own)) in problem


def test_a_client_looks_at_its_own_settings_alone(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("t0ken\n")
    found = load_client(
        {"JOBSVC_TOKENS": "x", "JOBSVC_LEASE": "bad", "JOBSVC_TOKEN_FILE": str(token)}
    )
    assert found.token == "t0ken"
    assert "t0ken" not in repr(found)


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:1", "[::1]:1", "127.9.9.9:1"])
def test_loopback_needs_no_permission(address: str) -> None:
    assert load({"JOBSVC_LISTEN": address}).listen == address


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "jobs.internal:1"])
def test_more_than_loopback_needs_permission(address: str) -> None:
    (problem,) = problems({"JOBSVC_LISTEN": address})
    assert "JOBSVC_INSECURE=1" in problem
    assert load({"JOBSVC_LISTEN": address, "JOBSVC_INSECURE": "1"}).listen == address


def test_more_than_loopback_with_tls_needs_no_permission(pem: Pem) -> None:
    environ = {"JOBSVC_LISTEN": "0.0.0.0:1", **pem.server}
    assert load(environ).listen == "0.0.0.0:1"


@pytest.mark.parametrize("alone", ["JOBSVC_TLS_CERT", "JOBSVC_TLS_KEY"])
def test_a_certificate_and_its_key_go_together(pem: Pem, alone: str) -> None:
    (problem,) = problems({alone: pem.server[alone]})
    assert problem.startswith("JOBSVC_TLS_KEY: goes with JOBSVC_TLS_CERT")


def test_a_key_of_another_certificate_stops_the_start(pem: Pem) -> None:
    (problem,) = problems({**pem.server, "JOBSVC_TLS_KEY": pem.other_key})
    assert problem.startswith("JOBSVC_TLS_KEY: ")
    assert "are not a certificate and its key in PEM (KEY_VALUES_MISMATCH)" in problem


def test_tls_files_that_are_not_there_are_named(pem: Pem, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone.pem")
    found = problems(
        {
            "JOBSVC_TLS_CERT": pem.server["JOBSVC_TLS_CERT"],
            "JOBSVC_TLS_KEY": gone,
            "JOBSVC_TLS_CLIENT_CA": gone,
            "JOBSVC_BROKER_URL": "amqps://h",
            "JOBSVC_BROKER_CA": gone,
            "JOBSVC_TOKENS_FILE": gone,
        }
    )
    names = ["BROKER_CA", "TLS_KEY", "TLS_CLIENT_CA", "TOKENS_FILE"]
    message = f"cannot read {gone}: No such file or directory"
    assert found == [f"JOBSVC_{name}: {message}" for name in names]


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({"JOBSVC_TLS_CLIENT_CA": "x"}, "JOBSVC_TLS_CLIENT_CA"),
        ({"JOBSVC_BROKER_CA": "x", "JOBSVC_BROKER_URL": "amqp://h"}, "JOBSVC_BROKER_CA"),
    ],
)
def test_tls_settings_that_would_do_nothing_are_refused(environ: dict[str, str], name: str) -> None:
    (problem,) = problems(environ)
    assert problem.startswith(f"{name}: is of use with")


def test_bad_tokens_are_told_by_their_lines_alone(tmp_path: Path) -> None:
    (problem,) = problems({"JOBSVC_TOKENS": "# ours\nhunter2 hunter2 read"})
    assert problem == (
        "JOBSVC_TOKENS: line 2: the second word is not a SHA-256 in 64 hexadecimal digits"
    )
    path = tmp_path / "tokens"
    path.write_text("\n\nhunter2")
    (problem,) = problems({"JOBSVC_TOKENS_FILE": str(path)})
    assert problem.startswith(f"JOBSVC_TOKENS_FILE: {path}: line 3: not of the form")
    assert "hunter2" not in problem


def test_tokens_come_from_one_place(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    line = f"ci  {'0a' * 32}  read"
    path.write_text(line)
    assert line not in repr(load({"JOBSVC_TOKENS": line}))
    assert load({"JOBSVC_TOKENS_FILE": str(path)}).tokens_file == str(path)
    (problem,) = problems({"JOBSVC_TOKENS": line, "JOBSVC_TOKENS_FILE": str(path)})
    assert problem == "JOBSVC_TOKENS_FILE: JOBSVC_TOKENS is set too; only one of them may be"


@pytest.mark.parametrize("address", ["", ":1", "host", "host:", "host:70000", "::1:1", "host:+1"])
def test_no_address(address: str) -> None:
    with pytest.raises(ValueError, match="address"):
        settings.split_address(address)


def test_a_file_holds_the_value(tmp_path: Path) -> None:
    path = tmp_path / "url"
    path.write_text("amqp://u:p@h/v\n")
    assert load({"JOBSVC_BROKER_URL_FILE": str(path)}).broker_url == "amqp://u:p@h/v"
    (both,) = problems({"JOBSVC_BROKER_URL_FILE": str(path), "JOBSVC_BROKER_URL": "amqp://h"})
    assert both.startswith("JOBSVC_BROKER_URL: JOBSVC_BROKER_URL_FILE is set too")
    (missing,) = problems({"JOBSVC_BROKER_URL_FILE": str(tmp_path / "no")}, needs=["broker_url"])
    assert "No such file" in missing
    path.write_text("")
    (empty,) = problems({"JOBSVC_BROKER_URL_FILE": str(path)}, needs=["broker_url"])
    assert empty == "JOBSVC_BROKER_URL: must be set"


def test_metrics_may_be_off() -> None:
    assert load({"JOBSVC_METRICS_LISTEN": ""}).metrics_listen == ""


def test_when_a_child_is_replaced() -> None:
    found = load({"JOBSVC_CONCURRENCY": "2"})
    assert (found.child_jobs, found.child_age, found.child_memory_limit) == (10_000, 0, 0)
    assert 0 < found.child_memory <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    environ = {
        "JOBSVC_CHILD_JOBS": "50",
        "JOBSVC_CHILD_AGE": "6h",
        "JOBSVC_CHILD_MEMORY": "512MiB",
        "JOBSVC_CHILD_MEMORY_LIMIT": "1GiB",
    }
    found = load(environ)
    assert (found.child_jobs, found.child_age) == (50, 21_600)
    assert (found.child_memory, found.child_memory_limit) == (512 << 20, 1 << 30)
    shown = {row.variable: row.value for row in describe(environ)}
    assert shown["JOBSVC_CHILD_MEMORY"] == "512MiB"
    environ = dict.fromkeys(environ, "1")
    environ["JOBSVC_CHILD_AGE"] = "1s"
    assert [problem.split(":")[0] for problem in problems(environ)] == [
        "JOBSVC_CHILD_AGE",
        "JOBSVC_CHILD_MEMORY_LIMIT",
    ]


def test_how_long_a_resume_token_is_good() -> None:
    assert load({}).resume == 24 * 3600
    assert load({"JOBSVC_RESUME": "720h"}).resume == 720 * 3600
    for bad in ("59m", "721h"):
        assert problems({"JOBSVC_RESUME": bad}) == ["JOBSVC_RESUME: not from 1h to 720h (30 days)"]


def test_a_lease_outlives_a_lost_heartbeat() -> None:
    (problem,) = problems({"JOBSVC_LEASE": "20s"})
    assert problem.startswith("JOBSVC_HEARTBEAT: JOBSVC_LEASE must be")


def test_tls_to_the_broker(pem: Pem) -> None:
    found = load({"JOBSVC_BROKER_URL": "amqps://u:p@h/v", "JOBSVC_BROKER_CA": pem.ca})
    assert (found.broker_url, found.broker_ca) == ("amqps://u:p@h/v", pem.ca)
    (problem,) = problems({"JOBSVC_BROKER_URL": "amqps://u:hunter2@h;amqps://u:hunter2@i"})
    assert "one address only with amqps://" in problem
    assert "hunter2" not in problem


@pytest.mark.parametrize("sign", ["#", "/", "?", "[", "]", "#1", "/1", "?1", "#=", ":1#2"])
@pytest.mark.parametrize("start", ["hunter", "12"])
def test_a_password_that_is_not_escaped_is_a_bad_setting(start: str, sign: str) -> None:
    for url in (f"amqp://u:{start}{sign}2@h:5672/v", f"amqp://u@h//;amqp://u:{start}{sign}2@h//"):
        (problem,) = problems({"JOBSVC_BROKER_URL": url})
        assert problem.startswith("JOBSVC_BROKER_URL: not ")
        assert start not in problem.replace("%2", "")


@pytest.mark.parametrize(
    "rest", ["u:hunter@2@h/d", "u:hunter2@h:port/d", "u:hunter2@h:5432,i:5432/d", "u@hunter2@h"]
)
def test_a_database_url_that_cannot_be_read_is_a_bad_setting(rest: str) -> None:
    (problem,) = problems({"JOBSVC_DATABASE_URL": f"postgresql+psycopg2://{rest}"})
    assert problem.startswith("JOBSVC_DATABASE_URL: not of the form postgresql+psycopg2://user:")
    assert "hunter" not in problem


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("broker_url", "amqp://"),
        ("broker_url", "amqp://u:hunter%232@h:5672/v%2F1"),
        ("broker_url", "amqp://u:hun:t@er2@h//"),
        ("broker_url", "amqp://u:p@[::1]:5672/v@1?heartbeat=10"),
        ("broker_url", "amqp://u:p@a//;amqp://u:p@b//"),
        ("broker_url", "memory://"),
        ("database_url", "postgresql+psycopg2://u:hun#t/e?r:2@h:5432/d"),
        ("database_url", "postgresql+psycopg2://u:p@[::1]:5432/d?sslmode=require"),
        ("database_url", "postgresql+psycopg2:///d?host=/run/postgresql&user=a@b"),
        ("database_url", "postgresql+psycopg2://u:p@/d?host=a:5432&host=b:5432"),
        ("database_url", "postgresql+psycopg2://h/d?user=a@b"),
        ("database_url", "sqlite:////tmp/@:x.db"),
    ],
)
def test_urls_of_every_form_that_can_be_read(name: str, url: str) -> None:
    assert getattr(load({f"JOBSVC_{name.upper()}": url}), name) == url


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("amqp://user:pass@host:1/v", "amqp://user:***@host:1/v"),
        ("amqp://user:p:a/s?s@x@host:1/v", "amqp://user:***@host:1/v"),
        ("amqp://:pass@host", "amqp://:***@host"),
        ("amqp://host:5672/v", "amqp://host:5672/v"),
        ("amqp://u:p@a;amqp://u:q@b", "amqp://u:***@b"),
        ("postgresql://h/d?user=u&password=p&x=1", "postgresql://h/d?user=u&password=***&x=1"),
        ("sqlite:////tmp/x.db", "sqlite:////tmp/x.db"),
    ],
)
def test_a_password_is_masked(url: str, shown: str) -> None:
    assert settings.mask_url(url) == shown


def test_settings_are_described_with_their_source(tmp_path: Path) -> None:
    path = tmp_path / "url"
    path.write_text("postgresql+psycopg2://u:hunter2@h/d")
    rows = describe(
        {
            "JOBSVC_DATABASE_URL_FILE": str(path),
            "JOBSVC_TOKEN": "hunter2",
            "JOBSVC_TOKENS": f"hunter2  {'0a' * 32}  read",
            "JOBSVC_LEASE": "1m",
        }
    )
    assert "hunter2" not in str(rows)
    by_name = {row.variable: (row.value, row.source) for row in rows}
    assert by_name["JOBSVC_DATABASE_URL"] == ("postgresql+psycopg2://u:***@h/d", "file")
    assert by_name["JOBSVC_TOKEN"] == ("***", "environment")
    assert by_name["JOBSVC_LEASE"] == ("60s", "environment")
    assert by_name["JOBSVC_QUEUES"] == ("default", "default")
    assert by_name["JOBSVC_TOKENS"] == ("***", "environment")
    assert by_name["JOBSVC_TLS_CERT"] == ("", "default")
    assert len(by_name) == len(rows)


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 3), ("200000 100000", 2), ("150000 100000", 2), ("5000 100000", 1),
     ("900000 100000", 3), (None, 3)],
)  # fmt: skip
def test_as_many_jobs_at_once_as_there_are_cores_to_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str | None, cores: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 2, 5})
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    path = tmp_path / "cpu.max"
    if quota is not None:
        path.write_text(quota + "\n")
    assert settings.usable_cores(path) == cores
