"""Group commit: many callers' jobs in one transaction.

A writer takes what has gathered, stores it in one transaction and answers everyone. While it is at
that the next ones gather; when nothing is under way, a request waits for nobody.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from jobsvc import telemetry
from jobsvc.core.attempts import JobTypeInfo
from jobsvc.core.model import Effects, NewJob
from jobsvc.errors import (
    DatabaseUnavailable,
    IdempotencyKeyReused,
    JobsvcError,
    LimitReached,
    RegistryChanged,
    UniqueConflict,
)
from jobsvc.outbox import Outbox
from jobsvc.services.threads import AsyncDatabase
from jobsvc.store import hot, verbs
from jobsvc.store import queues as queue_rows
from jobsvc.store.database import CommitUnknown, Database, Transaction
from jobsvc.store.hot.submitting import Known
from jobsvc.store.reads import lookups
from jobsvc.store.verbs import Answer, Submitted

GROUP_MAX = 256
GROUP_BYTES_MAX = 8 * 1024 * 1024
# Larger ones would keep the event loop from others for milliseconds.
LOOP_GROUP_MAX = 64
LOOP_BYTES_MAX = 64 * 1024
CROWD = 4
QUIET_SECONDS = 0.002
GATHER_SECONDS_MAX = 0.025
# Beyond this many waiting requests the database is not keeping up, and waiting longer helps nobody.
WAITING_MAX = 10_000

Result = Submitted | BaseException


@dataclass(frozen=True, slots=True)
class Registry:
    """The job types as of a revision."""

    revision: int
    types: Mapping[str, JobTypeInfo]


@dataclass(frozen=True, slots=True)
class _Waiting:
    job: NewJob
    registry: Registry
    answer: asyncio.Future[Submitted]


class GroupCommit:
    """Belongs to one event loop."""

    def __init__(self, database: Database, threads: AsyncDatabase, outbox: Outbox) -> None:
        self._database = database
        self._threads = threads
        self._outbox = outbox
        self._waiting: deque[_Waiting] = deque()
        self._writer: asyncio.Task[None] | None = None
        self._last_size = 0
        self._queues: set[str] = set()  # that the database is known to know
        self._log = telemetry.get_logger("jobs")

    async def submit(self, job: NewJob, registry: Registry) -> Submitted:
        """Answers when the job is durable. Raises RegistryChanged when the job was checked against
        an older registry than the database has: nothing was stored."""
        if len(self._waiting) >= WAITING_MAX:
            raise LimitReached("too many submits are waiting for the database; try again")
        answer: asyncio.Future[Submitted] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(job, registry, answer))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())
        return await answer

    async def submit_all(self, jobs: Sequence[NewJob], registry: Registry) -> list[Submitted]:
        """All or none, in one transaction of their own."""
        try:
            submitted, effects = await self._threads.run(self._store_all, jobs, registry)
        except CommitUnknown:
            stored = await self._threads.run(self._stored, jobs)
            if len(stored) < len(jobs):
                raise
            return [stored[job.job_id] for job in jobs]
        self._tell(submitted, effects)
        return submitted

    def _store_all(
        self, jobs: Sequence[NewJob], registry: Registry
    ) -> tuple[list[Submitted], Effects]:
        """In a thread of the pool."""
        if (plain := hot.submit_all(self._database, jobs, self._known(registry))) is not None:
            return plain

        def store(tx: Transaction) -> tuple[list[Submitted], Effects]:
            _require(registry, tx)
            answers, effects = verbs.submit(tx, jobs, registry.types)
            for index, answer in enumerate(answers):
                if isinstance(answer, IdempotencyKeyReused | UniqueConflict):
                    raise type(answer)(answer.job_id, index)
            self._name_queues(tx, answers)
            return [a for a in answers if isinstance(a, Submitted)], effects

        return self._database.write(store, numbered=True)

    async def _write(self) -> None:
        try:
            while group := await self._gathered():
                jobs = [w.job for w in group]
                results: Sequence[Result] = ()
                try:
                    results = await self._store(jobs, group[0].registry)
                except BaseException as error:
                    results = [error] * len(group)
                    if not isinstance(error, Exception):
                        raise
                finally:
                    _answer(group, results)
        finally:
            self._writer = None

    async def _gathered(self) -> list[_Waiting]:
        """The next group. After one of some size more are on their way, and a transaction costs
        nearly the same for many as for one: so it waits while they keep coming in. A lone caller
        is never kept waiting."""
        if self._last_size >= CROWD:
            loop = asyncio.get_running_loop()
            latest = loop.time() + GATHER_SECONDS_MAX
            before = -1
            while before < len(self._waiting) < GROUP_MAX and loop.time() < latest:
                before = len(self._waiting)
                await asyncio.sleep(QUIET_SECONDS)
        group = self._next_group()
        self._last_size = len(group)
        return group

    def _next_group(self) -> list[_Waiting]:
        group: list[_Waiting] = []
        size = 0
        while self._waiting and len(group) < GROUP_MAX and size < GROUP_BYTES_MAX:
            if group and self._waiting[0].registry is not group[0].registry:
                break  # checked against other job types: a group of its own
            waiting = self._waiting.popleft()
            if not waiting.answer.done():  # else its caller hung up before it was stored
                group.append(waiting)
                size += len(waiting.job.input.data)
        return group

    async def _store(self, jobs: Sequence[NewJob], registry: Registry) -> list[Result]:
        """What is plain goes by one statement, the others by the verb; one bad job fails alone."""
        stored: Mapping[str, Submitted] = {}
        try:
            stored = await self._store_plain(jobs, self._known(registry))
        except CommitUnknown as error:
            found = await self._threads.run(self._stored, jobs)
            return [found.get(job.job_id, error) for job in jobs]
        except JobsvcError as error:
            return [error] * len(jobs)
        except Exception:  # noqa: BLE001 - the verb finds out whose fault it is
            self._log.exception("cannot store by one statement", count=len(jobs))
        others = [job for job in jobs if job.job_id not in stored]
        if not others:
            return [stored[job.job_id] for job in jobs]
        answers = iter(await self._threads.run(self._store_by_verb, others, registry))
        return [stored.get(job.job_id) or next(answers) for job in jobs]

    async def _store_plain(self, jobs: Sequence[NewJob], known: Known) -> Mapping[str, Submitted]:
        if len(jobs) > LOOP_GROUP_MAX or _size(jobs) > LOOP_BYTES_MAX:
            return await self._threads.run(self._store_many_plain, jobs, known)
        if not (plain := hot.PlainJobs(self._database, jobs, known)):
            return {}
        rows = await self._threads.once(hot.SUBMIT, *plain.parameters)
        stored, effects = plain.stored(rows)
        if stored:
            loop = asyncio.get_running_loop()
            # Behind those whom the answer is about to wake.
            loop.call_soon(loop.call_soon, self._tell, stored.values(), effects)
        return stored

    def _store_many_plain(self, jobs: Sequence[NewJob], known: Known) -> Mapping[str, Submitted]:
        """In a thread of the pool."""
        stored, effects = hot.submit(self._database, jobs, known)
        if stored:
            self._tell(stored.values(), effects)
        return stored

    def _store_by_verb(self, jobs: Sequence[NewJob], registry: Registry) -> list[Result]:
        """When the database refuses the group for what is in it, each goes by itself."""

        def store(tx: Transaction) -> tuple[list[Answer], Effects]:
            _require(registry, tx)
            answers, effects = verbs.submit(tx, jobs, registry.types)
            self._name_queues(tx, answers)
            return answers, effects

        try:
            answers, effects = self._database.write(store, numbered=True)
        except CommitUnknown as error:
            found = self._stored(jobs)
            return [found.get(job.job_id, error) for job in jobs]
        except JobsvcError as error:
            return [error] * len(jobs)
        except Exception as error:  # noqa: BLE001 - handed to whoever asked
            if len(jobs) == 1:
                return [error]
            return [self._store_by_verb([job], registry)[0] for job in jobs]
        self._tell(answers, effects)
        return list(answers)

    def _known(self, registry: Registry) -> Known:
        return Known(registry.revision, registry.types, self._queues)

    def _name_queues(self, tx: Transaction, answers: Collection[Answer]) -> None:
        """A queue is known, and listed, from the commit of its first job on."""
        if new := _queues(answers) - self._queues:
            queue_rows.add_queues(tx, new)

    def _tell(self, answers: Collection[Answer], effects: Effects) -> None:
        """Committed. Nobody watches a job that is new; one that was replaced, somebody may."""
        submitted = [answer for answer in answers if isinstance(answer, Submitted)]
        self._queues |= {each.job.queue for each in submitted if each.job is not None}
        self._outbox.tell(effects, watched=any(each.replaced for each in submitted))
        self._log_submitted(submitted)

    def _stored(self, jobs: Sequence[NewJob]) -> dict[str, Submitted]:
        """After a COMMIT of unknown outcome: which of the jobs are there. Their ids are random, so
        what is there is ours."""
        wanted = [job.job_id for job in jobs]
        try:
            there = self._database.read(lambda connection: lookups.get_jobs(connection, wanted))
        except DatabaseUnavailable:
            return {}
        found = {job_id: Submitted(job_id, job) for job_id, job in there.items()}
        self._log_submitted(found.values())
        return found

    def _log_submitted(self, submitted: Iterable[Submitted]) -> None:
        with telemetry.together():
            for each in submitted:
                self._log_one(each)

    def _log_one(self, submitted: Submitted) -> None:
        job = submitted.job
        if submitted.already_existed or job is None:
            self._log.info("submit repeated", job_id=submitted.job_id)
            return
        self._log.info(
            "job submitted",
            job_id=job.job_id,
            job_type=job.job_type,
            queue=job.queue,
            state=job.state,
            trace_id=job.trace_id,
        )
        for replaced in submitted.replaced:
            self._log.info("job replaced", job_id=replaced, replaced_by=job.job_id)


def _size(jobs: Iterable[NewJob]) -> int:
    return sum(len(job.input.data) for job in jobs)


def _queues(answers: Collection[Answer]) -> set[str]:
    return {a.job.queue for a in answers if isinstance(a, Submitted) and a.job is not None}


def _require(registry: Registry, tx: Transaction) -> None:
    if registry.revision != tx.registry_revision:
        raise RegistryChanged


def _answer(group: Sequence[_Waiting], results: Sequence[Result]) -> None:
    for waiting, result in zip(group, results, strict=True):
        if waiting.answer.done():
            continue
        if isinstance(result, BaseException):
            waiting.answer.set_exception(result)
        else:
            waiting.answer.set_result(result)
