"""Tokens that come back as they went out, or not at all."""

from __future__ import annotations

import pytest

from jobsvc.rpc.signing import Signer

SIGNER = Signer(b"secret" * 6)


@pytest.mark.parametrize("body", [b"", b"a", b"ab", b"abc", b"\x00\xff" * 40])
def test_what_was_sealed_opens(body: bytes) -> None:
    token = SIGNER.seal("list", body)
    assert SIGNER.open("list", token) == body
    assert token.isascii()
    assert not set(token) & set("+/=")


def test_nothing_else_opens() -> None:
    token = SIGNER.seal("list", b"abc")
    forged = [Signer(b"other" * 6).seal("list", b"abc"), SIGNER.seal("watch", b"abc")]
    changed = [token[:n] + ("A" if token[n] != "A" else "B") + token[n + 1 :] for n in range(24)]
    for bad in (*forged, *changed, token[:-4], token + "AAAA", "", "!", "ü", "A", token + "="):
        with pytest.raises(ValueError, match="not a token"):
            SIGNER.open("list", bad)
