"""Regular expressions of models, as JSON Schema has them.

A model's pattern is read by Rust's engine or by Python's, and a schema's by that of ECMAScript,
where `\\w`, `\\d` and `\\s` are ASCII and `.` stops at more characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final, Literal

Engine = Literal["rust-regex", "python-re"]

_DIGIT: Final = r"\p{Nd}"
# What is in each class, as the engine has it.
_CLASSES: Final[Mapping[Engine, Mapping[str, str]]] = {
    "rust-regex": {
        "w": r"\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}",
        "d": _DIGIT,
        "s": r"\p{White_Space}",
    },
    "python-re": {"w": r"\p{L}\p{N}_", "d": _DIGIT, "s": r"\p{White_Space}\x1c-\x1f"},
}
_PART = re.compile(
    r"""
    \\ (?: x[0-9a-fA-F]{2} | u[0-9a-fA-F]{4} | . )
    | \[ \^? \]?
    | \( (?: \? (?: <?[=!] | . ) )?
    | (?: [*+?] | \{ [0-9]+ (?: ,[0-9]* )? \} ) [?+]?
    | .
    """,
    re.VERBOSE | re.DOTALL,
)
_GROUPS: Final = frozenset(("(", "(?:", "(?=", "(?!", "(?<=", "(?<!"))
_SYNTAX: Final = frozenset("^$\\.*+?()[]{}|/")
_SAME_ESCAPES: Final = frozenset("nrtfv")


class _Untranslatable(Exception):
    """It means something else there, or nothing."""


def to_ecma(pattern: str, engine: Engine) -> str | None:
    """The pattern for a JSON Schema, with the same matches; None if there is none for certain."""
    try:
        return "".join(_translate(pattern, engine))
    except _Untranslatable:
        return None


def _translate(pattern: str, engine: Engine) -> Iterator[str]:
    # Rust has operators between classes.
    if any(operator in pattern for operator in ("&&", "--", "~~")):
        raise _Untranslatable
    in_class = quantified = False
    last = ""
    for part in _PART.findall(pattern):
        if in_class:
            # Behind a class of characters it begins no range.
            yield r"\-" if part == "-" and _is_class(last) else _in_class(part, engine)
            in_class = part != "]"
        elif part[0] in "*+?{":
            # `a*+` is possessive in Python, and repeats twice in Rust.
            if quantified or part == "{" or (len(part) > 1 and part[-1] == "+"):
                raise _Untranslatable
            yield part
        else:
            yield _outside(part, engine)
            in_class = part[0] == "["
        quantified = not in_class and part[0] in "*+?{"
        last = part


def _is_class(part: str) -> bool:
    return len(part) == 2 and part[0] == "\\" and part[1] in "dDsSwW"


def _outside(part: str, engine: Engine) -> str:
    if part[0] == "\\":
        return _escape(part, engine, in_class=False)
    if part in ("[]", "[^]"):  # a class's first character is one of it, and there it ends it
        raise _Untranslatable
    if part[0] == "(" and part not in _GROUPS:
        raise _Untranslatable
    if part == ".":
        return r"[^\n]"
    if part == "$" and engine == "python-re":  # before the last line's end too
        return r"(?=\n?$)"
    return "\\" + part if part in ("]", "}", "/") else part


def _in_class(part: str, engine: Engine) -> str:
    if part[0] == "\\":
        return _escape(part, engine, in_class=True)
    if part[0] == "[" or len(part) > 1:  # Rust has classes within classes
        raise _Untranslatable
    return "\\" + part if part in ("(", ")", "{", "}", "|", "/") else part


def _escape(part: str, engine: Engine, *, in_class: bool) -> str:
    character = part[1]
    if len(part) > 2 or character in _SAME_ESCAPES:
        return part
    known = _CLASSES[engine].get(character.lower())
    if known is not None:
        if character.islower():
            return known if in_class else f"[{known}]"
        if in_class:  # all but a class, within a class
            raise _Untranslatable
        return f"[^{known}]"
    if character.isalnum() or not character.isascii():
        raise _Untranslatable
    return part if character in _SYNTAX or (in_class and character == "-") else character
