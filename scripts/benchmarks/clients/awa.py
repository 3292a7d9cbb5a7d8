"""Of awa."""

from __future__ import annotations

import asyncio
from typing import Any

from scripts.benchmarks.clients.loops import follow_polled, obey
from scripts.benchmarks.orders import PAYLOAD, Done, Order
from scripts.benchmarks.peers.awa_app import QUEUE, Echo, new_client


def main(order: Order) -> None:
    asyncio.run(_run(order))


async def _run(order: Order) -> None:
    async with new_client() as client:
        await obey(order, _Client(client))


class _Client:
    def __init__(self, client: Any) -> None:
        self._client = client
        self._arguments = Echo(PAYLOAD)

    async def submit(self) -> str:
        return str((await self._client.insert(self._arguments, queue=QUEUE)).id)

    async def submit_bulk(self, count: int) -> None:
        await self._client.enqueue_many_copy([self._arguments] * count, queue=QUEUE)

    async def follow(self, done: Done) -> None:
        await follow_polled(self.submit, self._has_ended, done)

    async def _has_ended(self, job_id: str) -> bool:
        return (await self._client.get_job(int(job_id))).finalized_at is not None
