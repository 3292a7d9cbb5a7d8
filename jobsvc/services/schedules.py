"""The use cases of ScheduleService, and the tick."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from jobsvc import metrics, telemetry
from jobsvc.core.attempts import JobTypeInfo
from jobsvc.core.model import Effects, Schedule
from jobsvc.outbox import Outbox
from jobsvc.services.threads import AsyncDatabase
from jobsvc.services.upkeep import Once
from jobsvc.store import registry, schedules
from jobsvc.store.database import Database
from jobsvc.store.schedules import NewJobOf, Outcome, Tick
from jobsvc.store.verbs import Submitted

T = TypeVar("T")
Types = Mapping[str, JobTypeInfo]

log = telemetry.get_logger("schedules")


class Schedules:
    """Belongs to one event loop. Raises the errors of jobsvc.errors. Where a `prepare` checks a
    request against the job types, it is run in a thread: a payload may be large."""

    def __init__(self, threads: AsyncDatabase, outbox: Outbox) -> None:
        self._threads = threads
        self._outbox = outbox

    async def create(self, prepare: Callable[[Types], Schedule], actor: str) -> Schedule:
        asked = await self._prepared(prepare)
        schedule = await self._threads.write(lambda tx: schedules.create(tx, asked))
        log.info("schedule created", schedule_id=schedule.schedule_id, actor=actor)
        return schedule

    async def get(self, schedule_id: str) -> Schedule:
        return await self._threads.read(lambda c: schedules.get(c, schedule_id))

    async def list_page(self, after: str, limit: int, bytes_max: int) -> tuple[list[Schedule], str]:
        """As jobsvc.store.schedules.list_page."""
        return await self._threads.read(lambda c: schedules.list_page(c, after, limit, bytes_max))

    async def update(
        self,
        schedule_id: str,
        etag: str,
        prepare: Callable[[Types], Mapping[str, Any]],
        actor: str,
    ) -> Schedule:
        """Sets the fields of the Schedule that `prepare` answers."""
        changes = await self._prepared(prepare)
        schedule = await self._threads.write(
            lambda tx: schedules.update(tx, schedule_id, etag, changes)
        )
        log.info("schedule updated", schedule_id=schedule_id, fields=sorted(changes), actor=actor)
        return schedule

    async def delete(self, schedule_id: str, actor: str) -> None:
        await self._threads.write(lambda tx: schedules.delete(tx, schedule_id))
        log.info("schedule deleted", schedule_id=schedule_id, actor=actor)

    async def trigger(self, schedule_id: str, new_job: NewJobOf, actor: str) -> Submitted:
        submitted, effects = await self._threads.write(
            lambda tx: schedules.trigger(tx, schedule_id, new_job)
        )
        self._outbox.tell(effects)
        log.info(
            "schedule triggered", schedule_id=schedule_id, job_id=submitted.job_id, actor=actor
        )
        return submitted

    async def _prepared(self, prepare: Callable[[Types], T]) -> T:
        return await self._threads.run(prepare, await self._threads.read(registry.load_types))


def ticking(new_job: NewJobOf) -> Once:
    """For upkeep: submits what is due."""

    def tick_once(database: Database, limit: int) -> tuple[int, Effects]:
        ticks, effects = database.write(lambda tx: schedules.tick(tx, limit, new_job))
        for tick in ticks:
            _tell(tick)
        return len(ticks), effects

    return tick_once


def _tell(tick: Tick) -> None:
    metrics.TICKS.labels(tick.outcome).inc()
    fields = {
        "schedule_id": tick.schedule.schedule_id,
        "outcome": tick.outcome,
        "tick": tick.time.isoformat(),
        "job_id": tick.schedule.last_job_id,
    }
    match tick.outcome:
        case Outcome.BROKEN:
            log.error("schedule paused", **fields, reason=tick.reason)
        case Outcome.MISSED:
            log.warning("ticks missed", **fields)
        case _:
            log.info("schedule ticked", **fields)
