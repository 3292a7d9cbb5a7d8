"""Whoever waits for a job is told why it does not start."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from jobsvc.cli import output
from jobsvc.client import CallFailed, Client, JobEvent, state_name, wait_reason_name

SILENCE_SECONDS = 3.0
_WAITING = frozenset({"SCHEDULED", "QUEUED", "RETRYING"})


class Patience:
    """Says once on stderr why a job has not started, where it has not after three seconds."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._timer: threading.Timer | None = None
        self._done = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def start(self, job_id: str) -> None:
        self._timer = threading.Timer(SILENCE_SECONDS, self._explain, [job_id])
        self._timer.daemon = True
        self._timer.start()

    def heard(self, event: JobEvent) -> None:
        if self._timer is None:
            self.start(event.job_id)
        if state_name(event.state) not in _WAITING:
            self._stop()

    def _stop(self) -> None:
        self._done = True
        if self._timer is not None:
            self._timer.cancel()

    def _explain(self, job_id: str) -> None:
        try:
            answer = self._client.explain(job_id)
            text = f"waits: {wait_reason_name(answer.reason)}: {answer.message}"
            said = text if answer.reason else ""
        except (CallFailed, ValueError) as error:  # the latter where the client was closed
            said = f"why it waits is not known: {error}"
        if said and not self._done:
            output.note(said)
