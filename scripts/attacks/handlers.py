"""A job type for the attacks alone."""

from __future__ import annotations

from typing import Any

from worker import JobContext, job

CHUNK_BYTES = 32 * 1024


@job("abuse.talk")
def talk(payload: dict[str, Any], ctx: JobContext) -> None:
    """Writes so many `chunks` of output."""
    for _ in range(payload["chunks"]):
        ctx.output("x" * CHUNK_BYTES)
