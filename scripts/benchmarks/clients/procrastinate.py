"""Of Procrastinate."""

from __future__ import annotations

import asyncio

from scripts.benchmarks.clients.loops import follow_polled, obey
from scripts.benchmarks.orders import PAYLOAD, Done, Order
from scripts.benchmarks.peers.procrastinate_app import app, echo


def main(order: Order) -> None:
    asyncio.run(_run(order))


async def _run(order: Order) -> None:
    async with app.open_async():
        await obey(order, _Client())


class _Client:
    async def submit(self) -> str:
        return str(await echo.defer_async(payload=PAYLOAD))

    async def submit_bulk(self, count: int) -> None:
        await echo.batch_defer_async(*[{"payload": PAYLOAD}] * count)

    async def follow(self, done: Done) -> None:
        await follow_polled(self.submit, self._has_ended, done)

    async def _has_ended(self, job_id: str) -> bool:
        return str((await app.job_manager.get_job_status_async(int(job_id))).value) == "succeeded"
