"""Receiving what is fanned out: a thread that reads one exchange and starts over when it breaks.

What comes this way is transient and may be lost; whoever listens has another way to learn of it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import kombu

from jobsvc import telemetry, vital
from jobsvc.broker.topology import HEARTBEAT_SECONDS, HINT, Broker, abandon, broker_errors
from jobsvc.core.backoff import Backoff
from jobsvc.core.model import Change


class HintListener:
    """Owns a thread and a connection; `on_changes` is called on that thread."""

    def __init__(self, broker: Broker, on_changes: Callable[[Iterable[Change]], None]) -> None:
        self._broker = broker
        self._on_changes = on_changes
        self._stopping = threading.Event()
        self._log = telemetry.get_logger("hints")
        self._thread = vital.thread("hints", self._run)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        backoff = Backoff()
        while not self._stopping.is_set():
            connection = self._broker.connection()
            try:
                connection.connect()
                self._broker.listen(connection, HINT, self._receive)
                backoff.reset()
                self._listen(connection)
            except broker_errors(connection) as error:
                self._log.warning("hints interrupted", reason=str(error))
            except Exception:  # noqa: BLE001 - logged; whatever came, the next may be of use
                self._log.exception("hints failed")
            finally:
                abandon(connection)
            self._stopping.wait(backoff.next())

    def _listen(self, connection: kombu.Connection) -> None:
        while not self._stopping.is_set():
            with suppress(TimeoutError):  # nobody had anything to tell
                connection.drain_events(timeout=1.0)
            connection.heartbeat_check(rate=HEARTBEAT_SECONDS // 2)

    def _receive(self, message: Any) -> None:
        try:
            told = json.loads(message.body)
            changes = [Change(job_id, sequence) for job_id, sequence in told["changes"]]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._log.warning("unreadable hint", reason=str(error))
            return
        self._on_changes(changes)
