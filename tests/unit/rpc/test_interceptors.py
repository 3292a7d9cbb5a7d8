"""The trace that a call belongs to."""

from __future__ import annotations

import re

import pytest

from jobsvc.rpc.interceptors import trace_id

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"


@pytest.mark.parametrize(
    "value",
    [f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00", f"01-{TRACE}-{SPAN}-01-what-follows"],
)
def test_a_traceparent_is_taken_over(value: str) -> None:
    assert trace_id([("x", "y"), ("traceparent", value)]) == TRACE


@pytest.mark.parametrize(
    "value",
    [
        "",
        TRACE,
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-01\n",
        f"01-{TRACE}-{SPAN}-01more",
        f" 00-{TRACE}-{SPAN}-01",
        b"\xff",
    ],
)
def test_anything_else_makes_a_new_trace(value: str | bytes) -> None:
    made = {trace_id([("traceparent", value)]), trace_id([]), trace_id([])}
    assert len(made) == 3
    assert TRACE not in made
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in made)
