"""The form of log records, the same in the service's processes and in those of handlers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}
# Fields of these names are never shown.
HIDDEN: Final = frozenset(
    {"payload", "result", "token", "lease_token", "password", "secret", "authorization"}
)
_FIRST: Final = ("time", "level", "event")  # of a console line, by place instead of by name

# What is secret in the texts of others: of a bearer its token, of a URL its password.
_bearer = re.compile(r"(?i)\b(bearer\s+)[^\s'\"]+")
_login = re.compile(r"(://[^\s:/?#@]*):\S*@")

# ASCII only, so that no separator which some reader takes for a line's end gets through.
as_json = json.JSONEncoder(default=str, separators=(",", ":")).encode


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def masked(text: str) -> str:
    """A text that is not ours, such as that of an exception, without the secrets that show."""
    return _login.sub(r"\1:***@", _bearer.sub(r"\1***", text))


def as_console(record: Mapping[str, Any]) -> str:
    fields = "".join(f" {k}={_quoted(v)}" for k, v in record.items() if k not in _FIRST)
    text = str(record["event"])
    if not text.isprintable():
        text = json.dumps(text)
    return f"{record['time']} {record['level']:<7} {text}{fields}"


def _quoted(value: object) -> str:
    text = str(value)
    plain = text and text.isprintable() and not any(c in ' "=' for c in text)
    return text if plain else json.dumps(text, ensure_ascii=not text.isprintable())
