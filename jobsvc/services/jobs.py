"""The use cases of JobService."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from jobsvc import telemetry
from jobsvc.core.model import Job, JobEvent, JobOutcome, JobUpdate, NewJob
from jobsvc.core.states import JobState
from jobsvc.errors import JobUnknown, RegistryChanged, SequenceOutOfRange
from jobsvc.outbox import Outbox
from jobsvc.services.submitting import GroupCommit, Registry
from jobsvc.services.threads import AsyncDatabase
from jobsvc.services.watch import WatchHub
from jobsvc.store import registry, verbs
from jobsvc.store.database import Connection, Database
from jobsvc.store.reads import lookups
from jobsvc.store.verbs import Answer, Submitted

__all__ = ["Jobs", "Registry", "Submitted"]

# A thread and its connection are for others too.
PREVIEWS_AT_ONCE = 100


class Jobs:
    """Belongs to one event loop. Raises the errors of jobsvc.errors."""

    def __init__(
        self, database: Database, threads: AsyncDatabase, outbox: Outbox, hub: WatchHub
    ) -> None:
        self._threads = threads
        self._outbox = outbox
        self._hub = hub
        self._group_commit = GroupCommit(database, threads, outbox)
        self._registry = Registry(-1, {})
        self._log = telemetry.get_logger("jobs")

    async def submit(
        self, prepare: Callable[[Registry], NewJob], *, heavy: bool = False
    ) -> Submitted:
        """Answers when the job is durable. `prepare` checks the request against the job types; it
        is called again when they turn out to have changed. `heavy`: it takes long enough to be
        better run beside the event loop."""
        while True:
            known = await self._known_types()
            job = await self._threads.run(prepare, known) if heavy else prepare(known)
            try:
                submitted = await self._group_commit.submit(job, known)
            except RegistryChanged:
                await self._load_types()
                continue
            return submitted

    async def submit_many(self, prepare: Callable[[Registry], list[NewJob]]) -> list[Submitted]:
        """All or none."""
        while True:
            known = await self._known_types()
            jobs = await self._threads.run(prepare, known)
            try:
                submitted = await self._group_commit.submit_all(jobs, known)
            except RegistryChanged:
                await self._load_types()
                continue
            return submitted

    async def preview(self, prepare: Callable[[Registry], NewJob]) -> Submitted:
        """What `submit` would answer, with nothing stored: the job that one of its keys already
        has, or a job under no id."""
        (answer,) = await self.preview_many(lambda known: [prepare(known)])
        if not isinstance(answer, Submitted):
            raise answer
        return answer

    async def preview_many(self, prepare: Callable[[Registry], Sequence[NewJob]]) -> list[Answer]:
        """As `preview`, with the errors among the answers."""
        known = await self._load_types()
        jobs = await self._threads.run(prepare, known)
        answers: list[Answer] = []
        for start in range(0, len(jobs), PREVIEWS_AT_ONCE):
            batch = jobs[start : start + PREVIEWS_AT_ONCE]
            answers += await self._threads.read(partial(_previews, batch, known))
        return answers

    async def get(self, job_id: str) -> Job:
        """With its payload."""
        return await self._threads.read(lambda connection: lookups.get_job(connection, job_id))

    async def result(self, job_id: str, wait_seconds: float) -> JobOutcome:
        """Waits for the job's end if it has not ended yet, at most so long."""
        if wait_seconds > 0:
            last, state = await self._head(job_id)
            if not state.terminal:
                await self._await_end(job_id, last, wait_seconds)
        return await self._threads.read(lambda c: lookups.get_outcome(c, job_id))

    async def list_events(self, job_id: str, after_sequence: int, limit: int) -> list[JobEvent]:
        """The up to `limit` events that follow `after_sequence`, in order."""

        def read(connection: Connection) -> list[JobEvent]:
            events = lookups.list_events(connection, job_id, after_sequence, limit)
            if not events:
                head = lookups.heads(connection, [job_id]).get(job_id)
                if head is None:
                    raise JobUnknown(job_id)
                if after_sequence > head[0]:
                    raise SequenceOutOfRange(after_sequence, 1, head[0])
            return events

        return await self._threads.read(read)

    async def cancel(self, job_id: str, reason: str, actor: str) -> Job:
        job, effects = await self._threads.write(lambda tx: verbs.cancel(tx, job_id, reason, actor))
        self._outbox.tell(effects)
        if job.state is JobState.RUNNING:
            self._outbox.control({"cancel": job_id})
        self._log.info("cancel requested", job_id=job_id, state=job.state, actor=actor)
        return job

    async def retry(self, job_id: str, actor: str) -> Job:
        job, effects = await self._threads.write(lambda tx: verbs.retry(tx, job_id, actor))
        self._outbox.tell(effects)
        self._log.info("job retried", job_id=job_id, actor=actor)
        for change in effects.changes:
            if change.job_id != job_id:
                self._log.info("job replaced", job_id=change.job_id, replaced_by=job_id)
        return job

    async def update(self, job_id: str, update: JobUpdate, actor: str) -> Job:
        job, effects = await self._threads.write(lambda tx: verbs.update(tx, job_id, update, actor))
        self._outbox.tell(effects)
        self._log.info("job updated", job_id=job_id, state=job.state, actor=actor)
        return job

    async def delete(self, job_id: str, actor: str) -> None:
        """Its watchers are told by the hub's next sweep."""
        await self._threads.write(lambda tx: verbs.delete(tx, job_id))
        self._log.info("job deleted", job_id=job_id, actor=actor)

    async def _head(self, job_id: str) -> tuple[int, JobState]:
        if job_id not in (heads := await self._hub.heads([job_id])):
            raise JobUnknown(job_id)
        return heads[job_id]

    async def _await_end(self, job_id: str, after_sequence: int, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                async for _ in self._hub.watch(job_id, after_sequence, heartbeat_seconds=60):
                    pass
        except TimeoutError:
            return  # not ended in time, which is an answer too

    async def _known_types(self) -> Registry:
        return self._registry if self._registry.revision >= 0 else await self._load_types()

    async def _load_types(self) -> Registry:
        # The revision first: types that change in between are then found to be newer.
        self._registry = await self._threads.read(
            lambda c: Registry(registry.registry_revision(c), registry.load_types(c))
        )
        return self._registry


def _previews(jobs: Sequence[NewJob], known: Registry, connection: Connection) -> list[Answer]:
    return [verbs.preview(connection, job, known.types.get(job.job_type)) for job in jobs]
