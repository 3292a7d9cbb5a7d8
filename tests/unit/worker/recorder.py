"""A listener that remembers, and tests wait on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import count

from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct

from jobsvc.core.attempts import AttemptKey, Claimed, Ending, Input, Report

WAIT_SECONDS_MAX = 20.0
_numbers = count()


def make_task(
    job_type: str,
    payload: dict[str, object] | bytes | None = None,
    *,
    timeout: float = 60.0,
    content_type: str | None = None,
) -> Claimed:
    """A task with a key of its own."""
    number = next(_numbers)
    if not isinstance(payload, bytes):
        payload = ParseDict(payload or {}, Struct()).SerializeToString()
    return Claimed(
        job_id=f"job-{number}",
        token=f"token-{number}",
        job_type=job_type,
        queue="default",
        attempt=1,
        input=Input(payload, content_type),
        timeout=timeout,
    )


class Recorder:
    """Everything a pool told, by key; asserts that nothing follows an ending."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.started: list[AttemptKey] = []
        self.reports: dict[AttemptKey, list[Report]] = {}
        self.endings: dict[AttemptKey, list[Ending]] = {}
        self.late: list[object] = []

    def on_started(self, tasks: Sequence[Claimed]) -> None:
        with self._changed:
            for task in tasks:
                self._note_late(task, "started")
                self.started.append(task.key)
            self._changed.notify_all()

    def on_reports(self, reports: Sequence[tuple[Claimed, Report]]) -> None:
        with self._changed:
            for task, report in reports:
                self._note_late(task, report)
                self.reports.setdefault(task.key, []).append(report)
            self._changed.notify_all()

    def on_endings(self, endings: Sequence[tuple[Claimed, Ending]]) -> None:
        with self._changed:
            for task, ending in endings:
                self._note_late(task, ending)
                self.endings.setdefault(task.key, []).append(ending)
            self._changed.notify_all()

    def _note_late(self, task: Claimed, what: object) -> None:
        if task.key in self.endings:
            self.late.append((task, what))

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, WAIT_SECONDS_MAX), "it never came"

    def wait_started(self, task: Claimed) -> None:
        self.wait(lambda: task.key in self.started)

    def wait_report(self, task: Claimed) -> Report:
        self.wait(lambda: bool(self.reports.get(task.key)))
        return self.reports[task.key][0]

    def wait_ending(self, task: Claimed) -> Ending:
        self.wait(lambda: task.key in self.endings)
        return self.endings[task.key][0]
