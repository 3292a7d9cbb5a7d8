"""Lists of jobs and of their failures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from jobsvc.core.model import FailureGroup, Job, JobFilter
from jobsvc.services.threads import AsyncDatabase
from jobsvc.store.database import Connection, Database
from jobsvc.store.reads import listing
from jobsvc.store.reads.listing import Search

T = TypeVar("T")

GROUPED_MAX = 100_000  # jobs, the newest of those that match
GROUPED_AT_ONCE = 2_000
SAMPLES_MAX = 5


class Lists:
    """Belongs to one event loop. Raises DatabaseUnavailable."""

    def __init__(self, database: Database, threads: AsyncDatabase) -> None:
        self._database = database
        self._threads = threads

    async def jobs(
        self,
        wanted: JobFilter,
        after: str,
        limit: int,
        *,
        full: bool,
        gather: Callable[[Iterator[Job], str], T],
    ) -> T:
        """What `gather` makes of up to `limit` jobs behind the id `after`, newest first, and of the
        last id that was looked at (empty at the end of the list). They are read as it takes them;
        it runs beside the event loop, and perhaps twice. `full`: with payload and traceback."""

        search = Search(wanted)

        def read_all(connection: Connection) -> T:
            jobs, last = listing.page(connection, search, after, limit)
            return gather(iter(jobs), last)

        def read_in_turn(connection: Connection) -> T:
            ids, last = listing.find(connection, search, after, limit)
            return gather(listing.read(connection, ids, full=full), last)

        if full or limit > listing.READ_JOBS:
            return await self._threads.run(self._database.scan, read_in_turn)
        return await self._threads.read(read_all)

    async def failure_groups(self, wanted: JobFilter) -> list[FailureGroup]:
        """Of the newest jobs that match and have an error, most jobs first."""
        groups: dict[tuple[str, str], FailureGroup] = {}
        search = Search(wanted, failed=True)
        left, after = GROUPED_MAX, ""
        while True:
            limit = min(left, GROUPED_AT_ONCE)
            step = partial(self._group, groups, search, after, limit)
            count, after = await self._threads.run(step)
            left -= count
            if not after or not left:
                break
        return await self._threads.run(lambda: sorted(groups.values(), key=place))

    def _group(
        self,
        groups: dict[tuple[str, str], FailureGroup],
        search: Search,
        after: str,
        limit: int,
    ) -> tuple[int, str]:
        def read(connection: Connection) -> tuple[Sequence[Any], str]:
            ids, last = listing.find(connection, search, after, limit)
            return listing.failures(connection, ids), last

        failures, last = self._database.scan(read)
        by_type: defaultdict[tuple[str, str], list[Any]] = defaultdict(list)
        for job in failures:
            by_type[job.job_type, job.error_type].append(job)
        for key, more in by_type.items():
            groups[key] = _grown(groups.get(key), more)
        return len(failures), last


def _grown(group: FailureGroup | None, jobs: Sequence[Any]) -> FailureGroup:
    """With jobs that are older than those that it has."""
    times = [job.error_time for job in jobs]
    ids = [job.id for job in jobs[:SAMPLES_MAX]]
    count = len(jobs)
    if group is not None:
        times += [group.first_time, group.last_time]
        ids = [*group.sample_job_ids, *ids][:SAMPLES_MAX]
        count += group.job_count
    first = jobs[0]
    return FailureGroup(first.job_type, first.error_type, count, min(times), max(times), tuple(ids))


def place(group: FailureGroup) -> tuple[int, str, str]:
    """Where it stands among all groups."""
    return -group.job_count, group.job_type, group.error_type
