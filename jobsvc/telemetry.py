"""Log records on stderr: one a line, JSON or for the console, ours and the libraries' alike.

No payload, result or token belongs in a record. A field that is named like one is hidden, but
nothing can tell what a text holds: log ids and types, not values.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import MutableMapping
from typing import Any, cast

import structlog
from structlog.typing import FilteringBoundLogger, Processor, WrappedLogger

from jobsvc.settings import Settings

EventDict = MutableMapping[str, Any]

_STDERR = 2
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_HIDDEN = frozenset(
    {"payload", "result", "token", "lease_token", "password", "secret", "authorization"}
)
_FIRST = ("time", "level", "event")  # of a console line, by place instead of by name

# ASCII only, so that no separator which some reader takes for a line's end gets through.
_encode_json = json.JSONEncoder(default=str, separators=(",", ":")).encode


class _Stderr:
    """Writes each record in one system call, so that those of several processes do not mix.

    A logger for structlog, and a stream for the standard library's logging.
    """

    def __init__(self, name: str = "") -> None:
        self.name = name

    def write(self, text: str) -> None:
        try:
            os.write(_STDERR, text.encode("utf-8", "backslashreplace"))
        except OSError:
            # Nobody is left to read the log, and there is nowhere to say so: the work goes on.
            return

    def msg(self, line: str) -> None:
        self.write(line + "\n")

    debug = info = warning = error = critical = exception = msg


def _hide(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    if not _HIDDEN.isdisjoint(event):
        for name in _HIDDEN & event.keys():
            event[name] = "***"
    return event


def _json(_: WrappedLogger, __: str, event: EventDict) -> str:
    return _encode_json(
        {"time": event.pop("time"), "level": event.pop("level"), "event": event.pop("event")}
        | cast(dict[str, Any], event)
    )


def _console(_: WrappedLogger, __: str, event: EventDict) -> str:
    fields = "".join(f" {k}={_quoted(v)}" for k, v in event.items() if k not in _FIRST)
    text = str(event["event"])
    if not text.isprintable():
        text = json.dumps(text)
    return f"{event['time']} {event['level']:<7} {text}{fields}"


def _quoted(value: object) -> str:
    text = str(value)
    plain = text and text.isprintable() and not any(c in ' "=' for c in text)
    return text if plain else json.dumps(text, ensure_ascii=not text.isprintable())


def configure(settings: Settings) -> None:
    """Sets up logging for this process, by `log_format` and `log_level`.

    Libraries are heard from WARNING on, whatever the level: below it, SQLAlchemy would log the
    parameters of its statements, payloads among them.
    """
    shared: list[Processor] = [
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        structlog.processors.format_exc_info,
        _hide,
    ]
    render: Processor = _json if settings.log_format == "json" else _console
    structlog.configure(
        processors=[*shared, render],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[settings.log_level]),
        logger_factory=_Stderr,
        cache_logger_on_first_use=True,
    )
    bridge = logging.StreamHandler(_Stderr())
    bridge.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(), *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
        )
    )
    root = logging.getLogger()
    root.handlers = [bridge]
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)


def get_logger(name: str) -> FilteringBoundLogger:
    """A logger whose records carry `logger=name`. May be called at import: the configuration is
    looked up at the first record and kept from then on."""
    return cast(FilteringBoundLogger, structlog.get_logger(name))
