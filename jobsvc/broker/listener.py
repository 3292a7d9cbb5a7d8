"""Receiving what is fanned out: a thread that reads one exchange and starts over when it breaks.

What comes this way is transient and may be lost; whoever listens has another way to learn of it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import kombu

from jobsvc import metrics, telemetry, vital
from jobsvc.broker.topology import HEARTBEAT_SECONDS, HINT, Broker, abandon, broker_errors
from jobsvc.core.backoff import Backoff
from jobsvc.core.model import Change

# Another service that was not heard for so long has gone; each tells that it is there more often.
GONE_SECONDS = 60.0


class HintListener:
    """Owns a thread and a connection; `on_changes` is called on that thread.

    It also notices a second service on the vhost, which would else go on in silence: workers drop
    what they cannot find in their database, so each service loses messages to the other.
    """

    def __init__(self, broker: Broker, on_changes: Callable[[Iterable[Change]], None]) -> None:
        self._broker = broker
        self._on_changes = on_changes
        self._other_heard = float("-inf")
        metrics.BROKER_SHARED.set_function(lambda: self.shared)
        self._stopping = threading.Event()
        self._log = telemetry.get_logger("hints")
        self._thread = vital.thread("hints", self._run)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    @property
    def shared(self) -> bool:
        """Whether another service uses the vhost."""
        return time.monotonic() - self._other_heard < GONE_SECONDS

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
            service = told.get("service", self._broker.service)  # older releases do not say
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._log.warning("unreadable hint", reason=str(error))
            return
        if service == self._broker.service:
            self._on_changes(changes)
        else:
            self._hear_other()

    def _hear_other(self) -> None:
        if not self.shared:
            self._log.error(
                "another service, with another database, uses the same vhost of the broker: each "
                "takes messages of the other's jobs, which then wait for a minute and more; give "
                "each a vhost of its own in JOBSVC_BROKER_URL"
            )
        self._other_heard = time.monotonic()
