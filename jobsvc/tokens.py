"""Tokens: who calls, and what they may do. Only their hashes are ever stored.

One line each: `name  sha256-of-token  scopes`. Empty lines and what follows a `#` do not count.
Names come back as the actor in events and logs; two lines may have one name, so that a token can be
replaced while the old one is still in use.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SCOPES = ("submit", "read", "cancel", "admin")
ANONYMOUS = "anonymous"
TOKEN_BYTES = 32

_name = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,62}").fullmatch
_sha256 = re.compile(r"[0-9A-Fa-f]{64}").fullmatch


@dataclass(frozen=True, slots=True)
class Token:
    """What is known of one; its text is not."""

    name: str
    digest: bytes = field(repr=False)
    scopes: frozenset[str]


class Tokens:
    def __init__(self, tokens: Iterable[Token]) -> None:
        # The time that a look-up takes tells something of hashes, which nobody can choose.
        self._tokens = {token.digest: token for token in tokens}

    def __len__(self) -> int:
        return len(self._tokens)

    def find(self, text: str) -> Token | None:
        """The token that has this text."""
        return self._tokens.get(hashlib.sha256(text.encode()).digest())

    def again(self, token: Token) -> Token | None:
        """What is known now of a token that was found before."""
        return self._tokens.get(token.digest)


def parse_tokens(text: str) -> Tokens:
    """Raises ValueError, which names every bad line by its number, and tell nothing of it."""
    tokens: dict[bytes, Token] = {}
    problems = []
    for number, line in enumerate(text.split("\n"), start=1):
        words = line.partition("#")[0].split(maxsplit=2)
        if not words:
            continue
        try:
            token = _token(words)
            if token.digest in tokens:
                raise ValueError("an earlier line has the same hash")
            tokens[token.digest] = token
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    return Tokens(tokens.values())


def read_tokens(path: str) -> Tokens:
    """As `parse_tokens`, of what the file holds; ValueError too where it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    try:
        return parse_tokens(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def make_token(name: str, scopes: Iterable[str]) -> tuple[str, str]:
    """A new token, and the line that stores it. Raises ValueError."""
    text = secrets.token_urlsafe(TOKEN_BYTES)
    digest = hashlib.sha256(text.encode()).hexdigest()
    token = _token([name, digest, " ".join(scopes)])
    chosen = " ".join(scope for scope in SCOPES if scope in token.scopes)
    return text, f"{token.name}  {digest}  {chosen}"


def _token(words: Sequence[str]) -> Token:
    if len(words) < 3:
        raise ValueError("not of the form: name  sha256-of-token  scopes")
    name, digest, rest = words
    if not _name(name):
        raise ValueError("the name is not 1 to 63 of A-Z a-z 0-9 _ . @ -, the first no sign")
    if name == ANONYMOUS:
        raise ValueError(f"{ANONYMOUS} is the name of those who have no token")
    if not _sha256(digest):
        raise ValueError("the second word is not a SHA-256 in 64 hexadecimal digits")
    scopes = frozenset(re.split(r"[\s,]+", rest.strip(" \t,"))) - {""}
    if not scopes or not scopes.issubset(SCOPES):
        raise ValueError(f"the scopes are not some of {' '.join(SCOPES)}")
    return Token(name, bytes.fromhex(digest), scopes)
