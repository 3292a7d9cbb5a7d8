"""What an operator sees of a process: its log records, and its probes over HTTP.

Log records go to stderr: one a line, JSON or for the console, ours and the libraries' alike.
No payload, result or token belongs in a record. A field that is named like one is hidden, but
nothing can tell what a text holds: log ids and types, not values.
"""

from __future__ import annotations

import atexit
import errno
import logging
import socket
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from select import PIPE_BUF
from socketserver import ThreadingTCPServer
from typing import Any, cast

import prometheus_client
import structlog
from prometheus_client import CollectorRegistry
from structlog.processors import format_exc_info
from structlog.typing import FilteringBoundLogger, Processor, WrappedLogger

from jobsvc.core.records import HIDDEN, LEVELS, as_console, as_json, masked, now
from jobsvc.log_writer import LogWriter
from jobsvc.settings import METRICS_LISTEN, Settings, split_address

EventDict = MutableMapping[str, Any]

_STDERR = 2
_LEVEL_NAMES = {"warn": "warning", "exception": "error"}  # of methods that are not named like one


class _Thread(threading.local):
    """Of each thread: the records that it writes later, None where it writes them at once."""

    records: list[bytes] | None = None


_thread = _Thread()


@contextmanager
def together() -> Iterator[None]:
    """What this thread logs meanwhile is written when it is over, many records at once: to wake
    the thread that writes costs several times what a record does."""
    if _thread.records is not None:
        yield
        return
    _thread.records = []
    try:
        yield
    finally:
        records, _thread.records = _thread.records, None
        written = b""
        for record in records:
            # What is longer than this is not written to a pipe as one.
            if written and len(written) + len(record) > PIPE_BUF:
                _write(written)
                written = b""
            written += record
        if written:
            _write(written)


def _tell_dropped(count: int) -> None:
    get_logger("log").warning("log records dropped, as nobody read them", records=count)


_writer = LogWriter(_STDERR, _tell_dropped)
_write = _writer.put
atexit.register(_writer.flush)


def flush() -> None:
    """Waits until what was logged is written, for a moment: for who is about to end the process."""
    _writer.flush()


class _Stderr:
    """Writes each record by one system call, so that those of several processes do not mix.

    A logger for structlog, and a stream for the standard library's logging.
    """

    def __init__(self, name: str = "") -> None:
        self.name = name

    def write(self, text: str) -> None:
        record = text.encode("utf-8", "backslashreplace")
        if (gathered := _thread.records) is not None:
            gathered.append(record)
        else:
            _write(record)

    def msg(self, line: str) -> None:
        self.write(line + "\n")

    debug = info = warning = error = critical = exception = msg


write_line = _Stderr().msg  # for what has made a record of its own


def _describe(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """In one step, for our own records and for the libraries': when, how bad, what, its fields, and
    whose it is."""
    theirs = event.get("_record")
    first = {
        "time": now(),
        "level": _LEVEL_NAMES.get(method, method),
        "event": event.pop("event"),
    }
    # Once more, lest a library's field of such a name takes its place.
    record: dict[str, Any] = {**first, **event, **first}
    record["logger"] = logger.name if theirs is None else theirs.name
    if theirs is not None:
        record["event"] = masked(str(record["event"]))
    if "exc_info" in record:
        format_exc_info(logger, method, record)
    if "exception" in record:
        record["exception"] = masked(record["exception"])
    for name in HIDDEN & record.keys():
        record[name] = "***"
    return record


def _hide_bytes(record: logging.LogRecord) -> bool:
    """Of a library's record: what came off a wire is shown by its length. gRPC logs metadata that
    it cannot decode, tokens among it."""
    if isinstance(record.args, tuple):
        record.args = tuple(
            f"<{len(each)} bytes>" if isinstance(each, bytes | bytearray) else each
            for each in record.args
        )
    return True


def _json(_: WrappedLogger, __: str, event: EventDict) -> str:
    return as_json(event)


def _console(_: WrappedLogger, __: str, event: EventDict) -> str:
    return as_console(event)


def configure(settings: Settings) -> None:
    """Sets up logging for this process, by `log_format` and `log_level`.

    Libraries are heard from WARNING on, whatever the level: below it, SQLAlchemy would log the
    parameters of its statements, payloads among them.
    """
    render: Processor = _json if settings.log_format == "json" else _console
    structlog.configure(
        processors=[_describe, render],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[settings.log_level]),
        logger_factory=_Stderr,
        cache_logger_on_first_use=True,
    )
    bridge = logging.StreamHandler(_Stderr())
    bridge.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(), _describe],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
        )
    )
    bridge.addFilter(_hide_bytes)
    root = logging.getLogger()
    root.handlers = [bridge]
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)


def get_logger(name: str) -> FilteringBoundLogger:
    """A logger whose records carry `logger=name`. May be called at import: the configuration is
    looked up at the first record and kept from then on."""
    return cast(FilteringBoundLogger, _Lazy(name))


class _Lazy:
    """Keeps each method of structlog's logger once it was used: to look one up anew costs more than
    a record that the level drops."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(structlog.get_logger(self._name).bind(), name)
        if structlog.get_config()["cache_logger_on_first_use"]:
            setattr(self, name, attribute)
        return attribute


@dataclass(frozen=True, slots=True)
class Vitals:
    """What the probes tell. Each is called on a thread of its own, and is to answer soon."""

    ready: Callable[[], bool]
    live: Callable[[], bool] = lambda: True
    registry: CollectorRegistry = prometheus_client.REGISTRY


def serve_probes(settings: Settings, vitals: Vitals) -> Probes | None:
    """Serves the probes until they are closed; None where they are off. Raises OSError where the
    address cannot be had; the default's port may be taken, and another is used then."""
    address = settings.metrics_listen
    if not address:
        return None
    host, port = split_address(address)
    try:
        probes = Probes(host, port, vitals)
    except OSError as error:
        if error.errno != errno.EADDRINUSE or address != METRICS_LISTEN:
            raise
        probes = Probes(host, 0, vitals)
    get_logger("probes").info("serving metrics", address=probes.address)
    return probes


class Probes:
    """`/metrics` for Prometheus, `/livez` (this process answers) and `/readyz` (it does its work),
    on threads of their own."""

    def __init__(self, host: str, port: int, vitals: Vitals) -> None:
        self._server = _ProbeServer(host, port, vitals)
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="probes", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _ProbeServer(ThreadingTCPServer):
    # Not http.server's own class: that asks DNS for a name that nobody needs.
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, host: str, port: int, vitals: Vitals) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.vitals = vitals
        super().__init__((host, port), _Probe)

    def handle_error(self, *_: object) -> None:
        """Not to stderr past the log."""
        if isinstance(sys.exception(), OSError):  # the caller has left
            return
        get_logger("probes").exception("probe failed")


class _Probe(BaseHTTPRequestHandler):
    timeout = 5  # seconds for a caller to say what it wants
    server: _ProbeServer

    def do_GET(self) -> None:
        vitals = self.server.vitals
        match self.path.partition("?")[0]:
            case "/metrics":
                body = prometheus_client.generate_latest(vitals.registry)
                self._answer(HTTPStatus.OK, body, prometheus_client.CONTENT_TYPE_LATEST)
            case "/livez":
                self._judge(vitals.live(), "live")
            case "/readyz":
                self._judge(vitals.ready(), "ready")
            case _:
                self._answer(HTTPStatus.NOT_FOUND, b"not found\n")

    do_HEAD = do_GET  # noqa: N815 - named by the standard library

    def _judge(self, well: bool, what: str) -> None:
        if well:
            self._answer(HTTPStatus.OK, b"ok\n")
        else:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, f"not {what}\n".encode())

    def _answer(self, status: HTTPStatus, body: bytes, content_type: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Probes come every few seconds and are no news."""
