from __future__ import annotations

from datetime import UTC, datetime

import pytest

from jobsvc.errors import InvalidRequest
from jobsvc.rpc.resume import ResumeTokens
from jobsvc.rpc.signing import Signer
from jobsvc.services.fleet import Mark
from jobsvc.store.reads.fleet import NO_JOB

INCARNATION = "0ab5de32-4a1c-4f8c-a2f4-b3b6a54f4f7c"
JOB_ID = "01a20fd4-d592-729d-9646-b420d5e14aab"
TIME = datetime(2026, 11, 24, 23, 12, 16, 278084, tzinfo=UTC)
TOKENS = ResumeTokens(Signer(b"secret"))


@pytest.mark.parametrize("position", [(1, NO_JOB, 0), (2**63 - 1, JOB_ID, 2**63 - 1)])
def test_a_mark_comes_back_as_it_was(position: tuple[int, str, int]) -> None:
    mark = Mark(INCARNATION, TIME, position)
    token = TOKENS.token(mark)
    assert TOKENS.mark(token) == mark
    assert len(token) == 96


def test_no_token_is_no_mark() -> None:
    assert TOKENS.mark("") is None


def test_another_secret_makes_no_token_of_ours() -> None:
    token = ResumeTokens(Signer(b"other")).token(Mark(INCARNATION, TIME, (1, NO_JOB, 0)))
    with pytest.raises(InvalidRequest, match="resume_token"):
        TOKENS.mark(token)
