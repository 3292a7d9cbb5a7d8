"""What a shell user types, turned into values. Whatever is wrong with it is a usage error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import typer

from jobsvc.client import INTEGER_MAX
from jobsvc.client.convert import to_seconds
from jobsvc.settings import parse_span

_DIGITS_MAX = 16  # 2^53 has this many


def payload(text: str | None) -> dict[str, object]:
    """The JSON object that `text` is, or that is in the file @NAME or on stdin (`-`)."""
    if text is None:
        return {}
    try:
        found = json.loads(
            _source(text),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_constant,
        )
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"not JSON: {error}", param_hint="JSON") from None
    except RecursionError:
        raise typer.BadParameter("nested too deeply", param_hint="JSON") from None
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"not UTF-8 at byte {error.start}", param_hint="JSON") from None
    except OSError as error:
        raise typer.BadParameter(f"{text[1:]}: {error.strerror}", param_hint="JSON") from None
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="JSON") from None
    if not isinstance(found, dict):
        raise typer.BadParameter("a payload is a JSON object: {…}", param_hint="JSON")
    return found


def span(text: str | None, option: str) -> float | None:
    """Seconds."""
    if text is None:
        return None
    try:
        return to_seconds(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def moment(text: str | None, option: str, *, ahead: bool) -> datetime | None:
    """A time of day with its zone, `now`, or a span: from now, or before now."""
    if text is None:
        return None
    now = datetime.now(UTC)
    if text == "now":
        return now
    try:
        seconds = parse_span(text)
    except ValueError:
        pass
    else:
        try:
            return now + timedelta(seconds=seconds if ahead else -seconds)
        except OverflowError:
            what = f"{text!r} leads out of the years 1 to 9999"
            raise typer.BadParameter(what, param_hint=option) from None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        what = f"{text!r} is neither a time such as 2026-01-31T12:00:00Z nor a span such as 2h"
        raise typer.BadParameter(what, param_hint=option)
    return found


def rate(text: str, option: str) -> tuple[int, float] | None:
    """N/SPAN as (starts, seconds); None for 0."""
    if text == "0":
        return None
    starts, slash, period = text.partition("/")
    if not slash or not starts.isdecimal():
        raise typer.BadParameter(f"{text!r} is not of the form 100/1m", param_hint=option)
    return int(starts), span(period, option) or 0.0


def labels(pairs: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"{pair!r} is not of the form k=v", param_hint="--label")
        if key in found:
            raise typer.BadParameter(f"{key!r} is given twice", param_hint="--label")
        found[key] = value
    return found


def file_text(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{path} is not UTF-8 text", param_hint=option) from None
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}", param_hint=option) from None


def _source(text: str) -> str:
    if text == "-":
        return sys.stdin.buffer.read().decode()
    if text.startswith("@"):
        return Path(text[1:]).read_bytes().decode()
    return text


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {json.dumps(key)} is there twice in one object")
        found[key] = value
    return found


def _integer(text: str) -> int:
    # By length first: Python refuses to read thousands of digits with a text of its own.
    if len(text.lstrip("-")) > _DIGITS_MAX or abs(int(text)) > INTEGER_MAX:
        shown = text if len(text) <= 40 else text[:40] + "…"
        raise ValueError(
            f"the integer {shown} is beyond 2^53 and would be rounded; write it as a string"
        )
    return int(text)


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def _constant(text: str) -> object:
    raise ValueError(f"{text} is no JSON value")
