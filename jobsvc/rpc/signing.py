"""Opaque tokens: what a caller gets to hold, and hands back unread."""

from __future__ import annotations

import base64
import binascii
import hmac

_TAG_BYTES = 16


class Signer:
    """Tokens that only those who know the database's secret can have made."""

    def __init__(self, secret: bytes) -> None:
        self._keyed = hmac.new(secret, digestmod="sha256")  # its key is worked in once

    def seal(self, purpose: str, body: bytes) -> str:
        """`purpose`: a token made for one is not good for another; it is bound to what else the
        token must come back with, too."""
        return _encode(self._tag(purpose, body) + body)

    def open(self, purpose: str, token: str) -> bytes:
        """The body. Raises ValueError for what `seal` did not make for this purpose."""
        try:
            sealed = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
        except (binascii.Error, ValueError):
            sealed = b""
        if _encode(sealed) != token:  # decoding passes over much
            raise ValueError("not a token of this service")
        tag, body = sealed[:_TAG_BYTES], sealed[_TAG_BYTES:]
        if not hmac.compare_digest(tag, self._tag(purpose, body)):
            raise ValueError("not a token of this service, or of another request")
        return body

    def _tag(self, purpose: str, body: bytes) -> bytes:
        keyed = self._keyed.copy()
        keyed.update(purpose.encode() + b"\0" + body)
        return keyed.digest()[:_TAG_BYTES]


def _encode(sealed: bytes) -> str:
    return base64.urlsafe_b64encode(sealed).rstrip(b"=").decode()
