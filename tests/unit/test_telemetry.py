from __future__ import annotations

import errno
import http.client
import json
import logging
import os
import socket
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from select import PIPE_BUF
from unittest.mock import Mock

import pytest
import structlog

from jobsvc import telemetry
from jobsvc.settings import METRICS_LISTEN, load
from jobsvc.telemetry import Vitals

Capture = pytest.CaptureFixture[str]

VITALS = Vitals(ready=lambda: True)


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


def configure(log_format: str, level: str = "info") -> None:
    telemetry.configure(load({}, log_format=log_format, log_level=level))


def written(capfd: Capture) -> tuple[str, str]:
    telemetry.flush()
    return capfd.readouterr()


def records(capfd: Capture) -> list[dict[str, object]]:
    out, err = written(capfd)
    assert out == ""
    return [json.loads(line) for line in err.split("\n")[:-1]]


NASTY = 'a\nb\r\x0b\x85\u2028"= \ud800\x1b[31m'


def test_a_json_record(capfd: Capture) -> None:
    configure("json")
    telemetry.get_logger("jobsvc.x").info("job started", job_id="1", attempt=2)
    (record,) = records(capfd)
    assert str(record.pop("time")).endswith("Z")
    assert record == {
        "level": "info",
        "event": "job started",
        "logger": "jobsvc.x",
        "job_id": "1",
        "attempt": 2,
    }


def test_a_console_record(capfd: Capture) -> None:
    configure("console")
    telemetry.get_logger("x").info("ready", address="127.0.0.1:1", note="two words", none="")
    line = written(capfd)[1]
    assert line.split(" ", 1)[1] == (
        'info    ready address=127.0.0.1:1 note="two words" none="" logger=x\n'
    )


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_one_record_is_one_line_of_printable_text(log_format: str, capfd: Capture) -> None:
    configure(log_format)
    log = telemetry.get_logger("x")
    log.info(NASTY, message=NASTY)
    try:
        raise ValueError(NASTY)
    except ValueError:
        log.exception("failed")
        logging.getLogger("grpc").exception("theirs %s", NASTY)
    lines = written(capfd)[1].split("\n")
    assert len(lines) == 4
    assert lines[3] == ""
    assert all(line.isprintable() for line in lines)
    assert "Traceback" in lines[1]
    assert "Traceback" in lines[2]


@pytest.mark.parametrize("name", ["payload", "result", "token", "lease_token", "password"])
def test_a_field_named_like_a_secret_is_hidden(name: str, capfd: Capture) -> None:
    configure("json")
    telemetry.get_logger("x").info("event", **{name: "canary"})
    logging.getLogger("x").warning("theirs", extra={name: "canary"})
    ours, theirs = records(capfd)
    assert ours[name] == theirs[name] == "***"


def test_secrets_in_the_texts_of_others_are_hidden(capfd: Capture) -> None:
    configure("json")
    theirs = logging.getLogger("x")
    theirs.error("Invalid encoding on %s", b"Bearer hunter2\xff")
    theirs.warning("cannot reach %s or %s", "amqp://u:hunter2@h//", "amqp://u:hunter/2@i//")
    for log in (theirs, telemetry.get_logger("x")):
        try:
            raise ValueError("authorization: bearer hunter2, postgresql://u:hunt@er2@h/d")
        except ValueError:
            log.exception("failed")
    found = records(capfd)
    assert "hunter" not in str(found)
    assert "er2" not in str(found)
    assert [each["event"] for each in found[:2]] == [
        "Invalid encoding on <15 bytes>",
        "cannot reach amqp://u:***@h// or amqp://u:***@i//",
    ]
    assert "bearer ***" in str(found[2]["exception"])
    assert "postgresql://u:***@h/d" in str(found[3]["exception"])


def test_a_level_that_is_off_writes_nothing(capfd: Capture) -> None:
    configure("json", "warning")
    log = telemetry.get_logger("x")
    log.info("quiet")
    log.warning("loud")
    assert [record["event"] for record in records(capfd)] == ["loud"]


def test_a_logger_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    configure("json")
    lookups = Mock(wraps=structlog.get_logger)
    monkeypatch.setattr(structlog, "get_logger", lookups)
    log = telemetry.get_logger("x")
    for _ in range(3):
        log.debug("quiet")
    assert lookups.call_count == 1


def test_libraries_are_heard_from_warning_on_the_same_way(capfd: Capture) -> None:
    configure("json", "debug")
    logging.getLogger("sqlalchemy.engine").info("INSERT canary")
    logging.getLogger("kombu").warning("connection %s", "lost")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    kombu, warning = records(capfd)
    assert (kombu["logger"], kombu["level"], kombu["event"]) == (
        "kombu",
        "warning",
        "connection lost",
    )
    assert "DeprecationWarning: old" in str(warning["event"])


def test_records_are_written_together(capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, in as few writes as a pipe takes whole, whatever happens; those of other
    threads at once."""
    configure("json")
    log = telemetry.get_logger("x")
    writes: list[bytes] = []

    def write(fd: int, data: bytes) -> int:
        writes.append(data)
        return os.write(fd, data)

    monkeypatch.setattr(telemetry, "_write", lambda data: write(2, data))
    with pytest.raises(ZeroDivisionError), telemetry.together():  # noqa: PT012
        for number in range(50):
            with telemetry.together():
                log.info("one of many", number=number)
        log.info("long", text="x" * 5000)
        log.info("last")
        assert not writes
        other = threading.Thread(target=lambda: log.info("of another"))
        other.start()
        other.join()
        assert len(writes) == 1
        raise ZeroDivisionError
    events = [record["event"] for record in records(capfd)]
    assert events == ["of another", *["one of many"] * 50, "long", "last"]
    assert len(writes) < 10
    assert all(len(data) <= PIPE_BUF or data.count(b"\n") == 1 for data in writes)
    log.info("at once")
    assert [record["event"] for record in records(capfd)] == ["at once"]


def fetch(address: str, path: str, method: str = "GET") -> tuple[int, str]:
    request = urllib.request.Request(f"http://{address}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_probes(host: str) -> None:
    live, ready = True, False
    probes = telemetry.serve_probes(
        load({"JOBSVC_METRICS_LISTEN": f"{host}:0"}), Vitals(lambda: ready, lambda: live)
    )
    assert probes is not None
    try:
        assert probes.address.startswith(f"{host}:")
        assert fetch(probes.address, "/livez") == (200, "ok\n")
        assert fetch(probes.address, "/readyz") == (503, "not ready\n")
        ready = True
        assert fetch(probes.address, "/readyz") == (200, "ok\n")
        live = False
        assert fetch(probes.address, "/livez") == (503, "not live\n")
        assert fetch(probes.address, "/else")[0] == 404
        assert fetch(probes.address, "/readyz?verbose=1") == (200, "ok\n")
        assert fetch(probes.address, "/readyz", "HEAD") == (200, "")
        assert fetch(probes.address, "/livez?", "HEAD") == (503, "")
        status, metrics = fetch(probes.address, "/metrics")
        assert status == 200
        assert "process_resident_memory_bytes" in metrics
    finally:
        probes.close()
    with pytest.raises(OSError, match="refused"):
        fetch(probes.address, "/livez")


def test_a_probe_that_fails_is_a_record(capfd: Capture) -> None:
    def broken() -> bool:
        raise RuntimeError("broken")

    configure("json")
    probes = telemetry.serve_probes(load({"JOBSVC_METRICS_LISTEN": "127.0.0.1:0"}), Vitals(broken))
    assert probes is not None
    with pytest.raises(http.client.RemoteDisconnected):
        fetch(probes.address, "/readyz")
    probes.close()
    assert "RuntimeError: broken" in str(records(capfd)[-1]["exception"])


def test_probes_may_be_off() -> None:
    assert telemetry.serve_probes(load({"JOBSVC_METRICS_LISTEN": ""}), VITALS) is None


def test_only_the_default_port_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        settings = load({"JOBSVC_METRICS_LISTEN": taken})
        with pytest.raises(OSError, match="in use") as caught:
            telemetry.serve_probes(settings, VITALS)
        assert caught.value.errno == errno.EADDRINUSE
        assert load({}).metrics_listen == METRICS_LISTEN
        monkeypatch.setattr(telemetry, "METRICS_LISTEN", taken)
        probes = telemetry.serve_probes(settings, VITALS)
        assert probes is not None
        assert probes.address != taken
        probes.close()
