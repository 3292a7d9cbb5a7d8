"""JSON Schemas as they can be told to every client."""

from __future__ import annotations

import math
from typing import Any


def tellable(schema: Any) -> Any:
    """The schema without what JSON, or a double, cannot hold: a keyword whose value is infinite,
    not a number, or a list with one. Python reads and writes these, and nobody else does."""
    if isinstance(schema, dict):
        return {
            tellable(key): tellable(value) for key, value in schema.items() if _is_tellable(value)
        }
    if isinstance(schema, list):
        return [tellable(value) for value in schema]
    if isinstance(schema, str):
        return schema.encode(errors="surrogatepass").decode(errors="replace")
    return schema


def _is_tellable(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_tellable, value))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return True
    try:
        return math.isfinite(value)  # of an int too: whether it fits a double
    except OverflowError:
        return False
