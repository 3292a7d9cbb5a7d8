"""A job that kills its worker, whatever runs beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobsvc.core.states import CRASHES_MAX, JobState
from jobsvc.store.tables import jobs
from tests.harness import Service, until
from tests.harness.load import QUICK_RETRY
from tests.harness.service import LEASE_SECONDS

pytestmark = pytest.mark.timeout(150)

INNOCENTS = 3
# So long that the job which kills its worker comes again while they run, if it may run beside them.
SECONDS = 2 * LEASE_SECONDS
HANDLERS = {"concurrency": str(INNOCENTS + 1), "handlers": "worker.handlers,tests.harness.handlers"}
END_SECONDS_MAX = 100.0


def test_a_job_that_kills_its_worker_takes_no_neighbour_with_it(
    service: Service, tmp_path: Path
) -> None:
    service.server()
    service.worker(**HANDLERS)
    client = service.client()
    told = tmp_path / "told"
    told.mkdir()
    options = {"retry_policy": QUICK_RETRY, "max_attempts": 10}
    innocents = [
        client.submit("test.innocent", {"path": str(told), "seconds": SECONDS}, **options)  # type: ignore[arg-type]
        for _ in range(INNOCENTS)
    ]
    payload = {"path": str(told), "others": INNOCENTS}
    poison = client.submit("test.poison", payload, **options)  # type: ignore[arg-type]
    ids = [answer.job.job_id for answer in (*innocents, poison)]

    def ended() -> bool:
        if not service.workers[-1].running:  # as its supervisor would
            service.worker(**HANDLERS)
        return service.count(jobs.c.finish_time.is_not(None)) == len(ids)

    until(ended, END_SECONDS_MAX, "all have ended")
    states = [service.count(jobs.c.id == i, jobs.c.state == JobState.SUCCEEDED) for i in ids]
    assert states == [1] * INNOCENTS + [0]
    failures = [service.history(job_id).count("ATTEMPT_FAILED") for job_id in ids]
    assert failures == [1] * INNOCENTS + [CRASHES_MAX]
    (_, *alone) = [e for e in service.errors("WORKER_LOST") if str(e.job_id) == ids[-1]]
    assert all("apart" not in event.detail["error"]["message"] for event in alone)
    service.wait_idle()
    service.check(ids, len(ids))
