"""A job type for the bench alone."""

from __future__ import annotations

from typing import Any

from worker import JobContext, job


@job("bench.talk")
def talk(payload: dict[str, Any], ctx: JobContext) -> None:
    """Logs so many `lines`."""
    for number in range(payload["lines"]):
        ctx.log(f"line {number} of a job that has much to say")
