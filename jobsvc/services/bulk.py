"""Changing every job that a filter matches, a batch at a time.

A batch is found, changed and committed by itself, so that its locks are short and what it leaves is
told at once. Jobs are visited newest first, each at most once. Whoever hangs up stops it after the
batch that is under way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial

from jobsvc import telemetry
from jobsvc.core.model import Effects, Job, JobFilter
from jobsvc.core.states import RETRYABLE_STATES, TERMINAL_STATES, JobState
from jobsvc.outbox import Outbox
from jobsvc.services.threads import AsyncDatabase
from jobsvc.store import verbs
from jobsvc.store.database import Database, Transaction
from jobsvc.store.reads import listing
from jobsvc.store.reads.listing import Search
from jobsvc.store.verbs import Answers, Wanted

BATCH = 500

_Verb = Callable[[Transaction, Collection[str], Wanted], tuple[Answers, Effects]]


@dataclass(frozen=True, slots=True)
class Extent:
    """At most so many jobs; `dry_run`: they are counted and stay as they are."""

    max_count: int
    dry_run: bool = False


@dataclass(slots=True)
class Counts:
    """`more`: others match beyond those that were counted."""

    matched: int = 0
    changed: int = 0
    more: bool = False


class Bulk:
    """Belongs to one event loop. Each raises DatabaseUnavailable; what was changed until then
    stays so."""

    def __init__(self, database: Database, threads: AsyncDatabase, outbox: Outbox) -> None:
        self._database = database
        self._threads = threads
        self._outbox = outbox
        self._log = telemetry.get_logger("bulk")

    async def cancel(self, wanted: JobFilter, extent: Extent, reason: str, actor: str) -> Counts:
        """Those that have not ended and whose cancel was not requested yet."""

        def verb(tx: Transaction, ids: Collection[str], still: Wanted) -> tuple[Answers, Effects]:
            return verbs.cancel_many(tx, ids, reason, actor, still)

        states = frozenset(JobState) - frozenset(TERMINAL_STATES)
        search = Search(_within(wanted, states), uncancelled=True)
        return await self._change("cancel", search, extent, verb, actor)

    async def retry(self, wanted: JobFilter, extent: Extent, actor: str) -> Counts:
        """Those that are FAILED or CANCELLED, but for those whose unique key another job holds. Of
        several with the same key that are found together one is retried."""

        def verb(tx: Transaction, ids: Collection[str], still: Wanted) -> tuple[Answers, Effects]:
            return verbs.retry_many(tx, ids, actor, still)

        search = Search(_within(wanted, frozenset(RETRYABLE_STATES)), free=True)
        return await self._change("retry", search, extent, verb, actor)

    async def delete(self, wanted: JobFilter, extent: Extent, actor: str) -> Counts:
        """Those that have ended."""

        def verb(tx: Transaction, ids: Collection[str], still: Wanted) -> tuple[Answers, Effects]:
            return verbs.delete_many(tx, ids, still), Effects()

        search = Search(_within(wanted, frozenset(TERMINAL_STATES)))
        return await self._change("delete", search, extent, verb, actor)

    async def _change(
        self, what: str, search: Search, extent: Extent, verb: _Verb, actor: str
    ) -> Counts:
        counts = Counts()
        try:
            await self._go_through(search, extent, verb, counts)
        finally:
            self._log.info(
                "jobs changed in bulk",
                verb=what,
                dry_run=extent.dry_run,
                matched=counts.matched,
                changed=counts.changed,
                actor=actor,
            )
        return counts

    async def _go_through(
        self, search: Search, extent: Extent, verb: _Verb, counts: Counts
    ) -> None:
        after = ""
        while search.filter.states:
            left = extent.max_count - counts.matched
            limit = max(left if extent.dry_run else min(left, BATCH), 1)
            find = partial(listing.find, search=search, after=after, limit=limit)
            ids, after = await self._threads.run(self._database.scan, find)
            if ids and not left:
                counts.more = True
                return
            counts.matched += len(ids)
            if ids and not extent.dry_run:
                counts.changed += await self._threads.run(self._write, search, verb, ids)
            if not after:
                return

    def _write(self, search: Search, verb: _Verb, ids: Collection[str]) -> int:
        """In one go, so that what was committed is told although the caller has gone."""
        still = partial(listing.matches, search)
        answers, effects = self._database.write(lambda tx: verb(tx, ids, still))
        self._outbox.tell(effects)
        changed = [job for job in answers.values() if isinstance(job, Job)]
        for job in changed:
            if job.state is JobState.RUNNING:
                self._outbox.control({"cancel": job.job_id})
        return len(changed)


def _within(wanted: JobFilter, states: frozenset[JobState]) -> JobFilter:
    """The filter for those of its jobs that are in one of `states`; with no states it matches
    none."""
    return replace(wanted, states=wanted.states & states if wanted.states else states)
