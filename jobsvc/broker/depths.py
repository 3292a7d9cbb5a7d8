"""How many messages wait in the broker's queues, by its own count."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from jobsvc import telemetry
from jobsvc.broker.topology import Broker, BrokerUnavailable, abandon, broker_errors

# A count is good for this long; nobody waits longer for one; a broker that did not answer is left
# alone for so long.
FRESH_SECONDS = 1.0
PATIENCE_SECONDS = 1.0
DOWN_SECONDS = 2.0


class Depths:
    """Asks on a connection of its own, beside the event loop that it belongs to."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._known: dict[str, tuple[float, int]] = {}  # by queue: when it was asked for, how many
        self._asking: asyncio.Task[None] | None = None
        self._down_until = 0.0
        self._log = telemetry.get_logger("depths")

    async def ready(self, queues: Mapping[str, int]) -> dict[str, int]:
        """Messages that are ready to be delivered, of `queues`: name -> generation. Those of which
        the broker did not tell in time are missing."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (now := time.monotonic()) < deadline and now >= self._down_until:
            wanted = {n: g for n, g in queues.items() if not self._is_fresh(n, now)}
            if not wanted:
                break
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask(wanted), name="depths")
            await asyncio.wait({self._asking}, timeout=deadline - now)
        oldest = now - FRESH_SECONDS - PATIENCE_SECONDS
        known = {name: self._known[name] for name in queues if name in self._known}
        return {name: count for name, (asked, count) in known.items() if asked >= oldest}

    def _is_fresh(self, name: str, now: float) -> bool:
        return name in self._known and self._known[name][0] > now - FRESH_SECONDS

    async def _ask(self, queues: Mapping[str, int]) -> None:
        asked = time.monotonic()
        try:
            counts = await asyncio.to_thread(self._read, queues)
        except BrokerUnavailable as error:
            self._log.debug("queues not counted", reason=str(error))
            self._down_until = time.monotonic() + DOWN_SECONDS
        else:
            self._known.update((name, (asked, count)) for name, count in counts.items())

    def _read(self, queues: Mapping[str, int]) -> dict[str, int]:
        connection = self._broker.connection()
        try:
            connection.connect()
            counts = {
                name: self._broker.depth(connection, name, generation) or 0
                for name, generation in queues.items()
            }
            connection.release()  # with a goodbye, or the broker warns of each
        except broker_errors(connection) as error:
            raise BrokerUnavailable(f"the broker did not tell: {error}") from error
        finally:
            abandon(connection)
        return counts
