"""The lines that tokens are stored in."""

from __future__ import annotations

import hashlib

import pytest

from jobsvc.tokens import SCOPES, make_token, parse_tokens


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_lines_comments_and_blank_lines() -> None:
    tokens = parse_tokens(
        f"""
        # who may call
        ci       {digest("one")}  submit read
        shop-2\t{digest("two").upper()}\tread, cancel   # since May\r

        ci       {digest("three")}  submit,read
        root@x   {digest("four")}  admin"""
    )
    found = {text: tokens.find(text) for text in ("one", "two", "three", "four")}
    assert {text: (token.name, set(token.scopes)) for text, token in found.items() if token} == {
        "one": ("ci", {"submit", "read"}),
        "two": ("shop-2", {"read", "cancel"}),
        "three": ("ci", {"submit", "read"}),
        "four": ("root@x", {"admin"}),
    }
    assert len(tokens) == 4


@pytest.mark.parametrize("text", ["", "One", "one ", digest("one"), "\x00", "ü" * 10_000])
def test_any_other_text_is_nobodys(text: str) -> None:
    assert parse_tokens(f"ci {digest('one')} read").find(text) is None


def test_no_line_names_nobody() -> None:
    assert len(parse_tokens("# nobody any more\n\n")) == 0


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("hunter2", "not of the form"),
        (f"hunter2 {digest('one')}", "not of the form"),
        (f"hunter2 {digest('one')} # read", "not of the form"),
        (f"hunt€r2 {digest('one')} read", "the name"),
        (f"-hunter2 {digest('one')} read", "the name"),
        (f"{'hunter2' * 10} {digest('one')} read", "the name"),
        (f"anonymous {digest('one')} read", "who have no token"),
        ("ci hunter2 read", "SHA-256"),
        (f"ci {digest('one')[:-1]} hunter2", "SHA-256"),
        (f"ci {digest('one')} hunter2", "the scopes"),
        (f"ci {digest('one')} read hunter2", "the scopes"),
        (f"ci {digest('one')} READ", "the scopes"),
        (f"ci {digest('one')} ,", "the scopes"),
        (f"hunter2 {digest('zero')} read", "an earlier line has the same hash"),
    ],
)
def test_a_bad_line_is_told_by_its_number_alone(line: str, problem: str) -> None:
    text = f"ci {digest('zero')} read\n# second\n{line}\n{line}"
    with pytest.raises(ValueError, match="line 3") as caught:
        parse_tokens(text)
    third, fourth = str(caught.value).split("; line 4: ")
    assert third == f"line 3: {fourth}"
    assert problem in third
    for secret in ("hunter2", digest("one"), digest("zero")):
        assert secret not in str(caught.value)


def test_a_token_that_was_made_is_found_by_its_line() -> None:
    text, line = make_token("ci", ["read", "submit", "read"])
    assert text not in line
    assert line == f"ci  {digest(text)}  submit read"
    assert len(text) == 43  # 32 bytes
    found = parse_tokens(line).find(text)
    assert found is not None
    assert (found.name, found.scopes) == ("ci", frozenset({"submit", "read"}))
    assert text not in repr(found)
    assert digest(text) not in repr(found)
    assert make_token("ci", SCOPES)[0] != text


@pytest.mark.parametrize(
    ("name", "scopes"), [("", ["read"]), ("a b", ["read"]), ("a#", ["read"]), ("a", ["write"])]
)
def test_no_token_is_made_that_could_not_be_stored(name: str, scopes: list[str]) -> None:
    with pytest.raises(ValueError, match=r"name|scopes"):
        make_token(name, scopes)
