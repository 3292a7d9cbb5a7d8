"""Streams of those who need no token: how many there may be."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from jobsvc.errors import LimitReached


@dataclass(slots=True)
class Crowd:
    """Of one connection, and in all. Where there is no room in all, the connection that has most
    loses its oldest to one that has fewer."""

    connection_max: int = 16
    streams_max: int = 1_000
    _streams: dict[asyncio.Timeout, str] = field(default_factory=dict)  # oldest first
    _counts: Counter[str] = field(default_factory=Counter)

    @asynccontextmanager
    async def held(self, peer: str) -> AsyncIterator[None]:
        """Raises LimitReached, at once or in the middle."""
        if self._counts[peer] >= self.connection_max:
            raise LimitReached(f"a connection may have {self.connection_max} streams of this kind")
        if len(self._streams) >= self.streams_max:
            self._make_room(self._counts[peer])
        try:
            async with asyncio.timeout(None) as limit:
                self._streams[limit] = peer
                self._counts[peer] += 1
                try:
                    yield
                finally:
                    self._leave(limit)
        except TimeoutError:
            raise LimitReached(self._full) from None

    @property
    def _full(self) -> str:
        return f"this server has {self.streams_max} streams of this kind; try another"

    def _make_room(self, count: int) -> None:
        most = max(self._counts, key=self._counts.__getitem__)
        if self._counts[most] <= count + 1:
            raise LimitReached(self._full)
        limit = next(each for each, peer in self._streams.items() if peer == most)
        self._leave(limit)
        limit.reschedule(asyncio.get_running_loop().time())

    def _leave(self, limit: asyncio.Timeout) -> None:
        peer = self._streams.pop(limit, None)
        if peer is None:
            return
        self._counts[peer] -= 1
        if not self._counts[peer]:
            del self._counts[peer]
