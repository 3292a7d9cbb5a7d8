"""`demo.echo`: always registered, so that any worker can be tried out and smoke-tested."""

from __future__ import annotations

from typing import Any

from worker.api import Blob, JobContext, job


@job("demo.echo")
def echo(payload: dict[str, Any] | bytes, ctx: JobContext) -> dict[str, Any] | Blob:
    """Answers with its payload."""
    if isinstance(payload, bytes):
        return Blob(payload, ctx.content_type)
    return payload
