"""The use cases of operators: queues, workers, job types, and why a job is not running."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from jobsvc import telemetry
from jobsvc.broker.depths import Depths
from jobsvc.core.attempts import JobTypeInfo
from jobsvc.core.model import Effects
from jobsvc.core.operations import Explanation, JobType, Queue, RateLimit, Worker
from jobsvc.outbox import Outbox
from jobsvc.services.threads import AsyncDatabase
from jobsvc.store import queues, registry
from jobsvc.store.database import Transaction
from jobsvc.store.reads import explaining
from jobsvc.store.verbs.submitting import (
    DEFAULT_MAX_ATTEMPTS,
    DEFAULT_QUEUE,
    DEFAULT_TIMEOUT_SECONDS,
)


class Operations:
    """Belongs to one event loop. Raises the errors of jobsvc.errors."""

    def __init__(self, threads: AsyncDatabase, outbox: Outbox) -> None:
        self._threads = threads
        self._outbox = outbox
        self._depths = Depths(outbox.broker)
        self._log = telemetry.get_logger("operations")

    async def explain(self, job_id: str) -> Explanation:
        reachable = self._outbox.broker_reachable
        return await self._threads.read(lambda c: explaining.explain(c, job_id, reachable))

    async def list_job_types(self, after: str, limit: int) -> list[JobType]:
        """With the service's defaults where a handler names none."""
        found = await self._threads.read(lambda c: registry.list_types(c, after, limit))
        return [replace(each, info=_with_defaults(each)) for each in found]

    async def list_workers(self, after: str, limit: int) -> list[Worker]:
        return await self._threads.read(lambda c: registry.list_workers(c, after, limit))

    async def list_queues(self, after: str, limit: int) -> list[Queue]:
        found = await self._threads.read(lambda c: queues.list_queues(c, after, limit))
        return await self._with_depths(found)

    async def set_paused(self, name: str, paused: bool, actor: str) -> Queue:
        queue = await self._change(name, lambda tx: queues.set_paused(tx, name, paused))
        done = "queue paused" if paused else "queue resumed"
        self._log.info(done, queue=name, actor=actor)
        return queue

    async def set_limits(
        self,
        name: str,
        mask: Collection[str],
        max_running: int | None,
        rate_limit: RateLimit | None,
        actor: str,
    ) -> Queue:
        """Those of `max_running` and `rate_limit` that `mask` names; None is no limit."""
        queue = await self._change(
            name, lambda tx: queues.set_limits(tx, name, mask, max_running, rate_limit)
        )
        rate = queue.rate_limit
        self._log.info(
            "queue limited",
            queue=name,
            max_running=queue.max_running,
            max_starts=rate and rate.max_starts,
            period=rate and rate.period,
            actor=actor,
        )
        return queue

    async def _change(self, name: str, change: Callable[[Transaction], Effects]) -> Queue:
        self._outbox.tell(await self._threads.write(change))
        queue = await self._threads.read(lambda c: queues.get_queue(c, name))
        return (await self._with_depths([queue]))[0]

    async def _with_depths(self, found: list[Queue]) -> list[Queue]:
        ready = await self._depths.ready({queue.name: queue.generation for queue in found})
        return [replace(queue, ready_messages=ready.get(queue.name)) for queue in found]


def _with_defaults(job_type: JobType) -> JobTypeInfo:
    info = job_type.info
    return replace(
        info,
        queue=info.queue or DEFAULT_QUEUE,
        max_attempts=info.max_attempts or DEFAULT_MAX_ATTEMPTS,
        timeout=info.timeout or DEFAULT_TIMEOUT_SECONDS,
    )
