"""A listener that remembers, and tests wait on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import count

from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct

from worker.outcome import Outcome, Report, Task

WAIT_SECONDS_MAX = 20.0
_numbers = count()


def make_task(
    job_type: str,
    payload: dict[str, object] | bytes | None = None,
    *,
    timeout_seconds: float = 60.0,
    content_type: str | None = None,
) -> Task:
    """A task with a token of its own."""
    number = next(_numbers)
    if not isinstance(payload, bytes):
        payload = ParseDict(payload or {}, Struct()).SerializeToString()
    return Task(
        token=f"token-{number}",
        job_id=f"job-{number}",
        job_type=job_type,
        attempt=1,
        payload=payload,
        content_type=content_type,
        idempotency_token=f"idempotency-{number}",
        timeout_seconds=timeout_seconds,
    )


class Recorder:
    """Everything a pool told, by token; asserts that nothing follows an outcome."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.started: list[str] = []
        self.reports: dict[str, list[Report]] = {}
        self.outcomes: dict[str, list[Outcome]] = {}
        self.late: list[object] = []

    def on_started(self, task: Task) -> None:
        with self._changed:
            self._note_late(task, "started")
            self.started.append(task.token)
            self._changed.notify_all()

    def on_report(self, task: Task, report: Report) -> None:
        with self._changed:
            self._note_late(task, report)
            self.reports.setdefault(task.token, []).append(report)
            self._changed.notify_all()

    def on_outcome(self, task: Task, outcome: Outcome) -> None:
        with self._changed:
            self._note_late(task, outcome)
            self.outcomes.setdefault(task.token, []).append(outcome)
            self._changed.notify_all()

    def _note_late(self, task: Task, what: object) -> None:
        if task.token in self.outcomes:
            self.late.append((task, what))

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, WAIT_SECONDS_MAX), "it never came"

    def wait_started(self, task: Task) -> None:
        self.wait(lambda: task.token in self.started)

    def wait_report(self, task: Task) -> Report:
        self.wait(lambda: bool(self.reports.get(task.token)))
        return self.reports[task.token][0]

    def wait_outcome(self, task: Task) -> Outcome:
        self.wait(lambda: task.token in self.outcomes)
        return self.outcomes[task.token][0]
