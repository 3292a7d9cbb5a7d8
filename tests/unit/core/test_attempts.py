"""Cleaning and cutting of what handlers say."""

from __future__ import annotations

import pytest

from jobsvc.core.attempts import clean_error, clean_text


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("two\r\nlines", "two\nlines"),
        ("a\0b\x1b[31m\x7f\x85", "a\ufffdb\ufffd[31m\ufffd\ufffd"),
        ("half \ud83d of a pair", "half \ufffd of a pair"),
        ("Grüße 😀", "Grüße 😀"),
    ],
)
def test_text_is_cleaned(text: str, cleaned: str) -> None:
    assert clean_text(text, 1000) == cleaned


@pytest.mark.parametrize("keep_end", [False, True])
def test_cuts_fall_between_characters(keep_end: bool) -> None:
    assert clean_text("€" * 10, 8, keep_end=keep_end) == "€€"


def test_which_part_is_kept() -> None:
    assert clean_text("abcdef", 3) == "abc"
    assert clean_text("abcdef", 3, keep_end=True) == "def"


def test_an_error_is_cleaned_and_cut() -> None:
    error = clean_error("E\0" * 1000, "€" * 10_000, "first" + "x" * 100_000 + "last")
    assert len(error.type.encode()) <= 200
    assert "\0" not in error.type
    assert 4090 <= len(error.message.encode()) <= 4096
    assert len(error.traceback.encode()) == 32 * 1024
    assert error.traceback.endswith("last")
