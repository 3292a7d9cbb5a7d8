"""Job types for trying things out. Not in the default handlers: one of them kills its process."""

from __future__ import annotations

import os
import signal

from pydantic import BaseModel, ConfigDict, Field

from worker.api import Abort, JobContext, job


class SleepPayload(BaseModel):
    """How long to sleep, and in how many steps."""

    model_config = ConfigDict(extra="forbid")

    seconds: float = Field(default=1.0, ge=0, le=86_400, allow_inf_nan=False)
    steps: int = Field(default=1, ge=1, le=10_000)


class FailPayload(BaseModel):
    """How often to fail, and whether that may be tried again."""

    model_config = ConfigDict(extra="forbid")

    times: int = Field(default=1, ge=0)
    retryable: bool = True


class DemoError(Exception):
    """What `demo.fail` raises."""


@job("demo.sleep")
def sleep(payload: SleepPayload, ctx: JobContext) -> dict[str, float]:
    """Sleeps, telling its progress after each step; can be cancelled."""
    for step in range(1, payload.steps + 1):
        ctx.sleep(payload.seconds / payload.steps)
        ctx.progress(step, payload.steps, f"step {step} of {payload.steps}")
    return {"seconds": payload.seconds, "steps": payload.steps}


@job("demo.fail")
def fail(payload: FailPayload, ctx: JobContext) -> dict[str, int]:
    """Fails in its first attempts, then succeeds."""
    if ctx.attempt <= payload.times:
        message = f"attempt {ctx.attempt} of {payload.times} that fail"
        if not payload.retryable:
            raise Abort(message)
        raise DemoError(message)
    return {"attempt": ctx.attempt}


@job("demo.crash")
def crash(payload: dict[str, object]) -> None:
    """Kills the process that it runs in."""
    os.kill(os.getpid(), signal.SIGKILL)
