"""Job types for the tests alone."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from worker import JobContext, job

GATE_POLL_SECONDS = 0.05


@job("test.spin")
def spin(payload: dict[str, Any], ctx: JobContext) -> None:
    """Writes the id of its process to `path`, and then holds it for ever, deaf to everything."""
    Path(payload["path"]).write_text(str(os.getpid()))
    while True:
        pass


@job("test.gate")
def gate(payload: dict[str, Any], ctx: JobContext) -> dict[str, Any]:
    """Waits for the file PATH.ATTEMPT, then logs so many `lines`."""
    while not Path(f"{payload['path']}.{ctx.attempt}").exists():
        ctx.sleep(GATE_POLL_SECONDS)
    for number in range(payload.get("lines", 0)):
        ctx.log(f"line {number}")
    return {"attempt": ctx.attempt}


@job("test.tell")
def tell(payload: dict[str, Any], ctx: JobContext) -> dict[str, Any]:
    """Tells its payload's text in every way there is."""
    ctx.log(payload["text"])
    ctx.output(payload["text"])
    ctx.progress(1, 2, payload["text"])
    if payload.get("fail"):
        raise ValueError(payload["text"])
    return {"text": payload["text"]}


@job("test.poison")
def poison(payload: dict[str, Any], ctx: JobContext) -> None:
    """Once so many `others` have told that they run, by a file each, kills its worker."""
    while len(list(Path(payload["path"]).glob("*"))) < payload["others"]:
        ctx.sleep(GATE_POLL_SECONDS)
    guard = Path(f"/proc/{os.getppid()}/stat").read_text()  # between this process and the worker
    os.kill(int(guard.rpartition(")")[2].split()[1]), signal.SIGKILL)


@job("test.innocent")
def innocent(payload: dict[str, Any], ctx: JobContext) -> None:
    """Tells that it runs, and takes its time."""
    (Path(payload["path"]) / ctx.job_id).touch()
    ctx.sleep(payload["seconds"])
