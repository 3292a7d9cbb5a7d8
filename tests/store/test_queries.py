from __future__ import annotations

import pytest

from jobsvc.core.attempts import Input, JobError, Log, Succeeded
from jobsvc.core.model import JobEvent, JobOutcome
from jobsvc.core.states import JobState
from jobsvc.errors import JobUnknown
from jobsvc.store.hot import watching
from jobsvc.store.reads import lookups
from tests.store.house import FATAL, House, new_id


def told(house: House, lines: int) -> str:
    """A running job with `lines` events beside the first two."""
    claimed = house.start(input=Input(b"payload"))
    house.report(claimed, *(Log("INFO", str(n)) for n in range(lines)))
    return claimed.job_id


def after(
    house: House, cursors: list[tuple[str, int]], limit: int
) -> dict[tuple[str, int], list[int]]:
    found = watching.events_after(house.database, cursors, limit)
    assert all(e.job_id == cursor[0] for cursor, events in found.items() for e in events)
    return {cursor: [e.sequence for e in events] for cursor, events in found.items()}


def test_a_job_comes_with_its_payload_and_many_without(house: House) -> None:
    first, second = told(house, 0), told(house, 0)
    assert house.get(first).input == Input(b"payload")
    found = house.database.read(lambda c: lookups.get_jobs(c, [first, new_id(), second]))
    assert set(found) == {first, second}
    assert found[first].input is None
    assert house.database.read(lambda c: lookups.get_jobs(c, [])) == {}


def test_an_unknown_job_is_said_to_be_so(house: House) -> None:
    for query in (lookups.get_job, lookups.get_outcome):
        with pytest.raises(JobUnknown) as caught:
            house.database.read(lambda c, q=query: q(c, new_id()))  # type: ignore[misc]
        assert caught.value.job_id


def test_an_outcome_is_a_state_then_a_result_or_an_error(house: House) -> None:
    def outcome(job_id: str) -> JobOutcome:
        return house.database.read(lambda c: lookups.get_outcome(c, job_id))

    running = house.start()
    assert outcome(running.job_id) == JobOutcome(running.job_id, JobState.RUNNING)
    house.finish(running, Succeeded(Input(b"")))
    assert outcome(running.job_id).result == Input(b"")
    failed = house.start()
    house.finish(failed, FATAL)
    assert outcome(failed.job_id).error == FATAL.error
    cancelled = house.cancel(house.submit(), "enough")
    assert outcome(cancelled.job_id).error == JobError("CANCELLED", "enough")


def test_events_are_listed_in_order_page_by_page(house: House) -> None:
    job_id = told(house, 5)

    def page(start: int, limit: int) -> list[int]:
        found: list[JobEvent] = house.database.read(
            lambda c: lookups.list_events(c, job_id, start, limit)
        )
        return [event.sequence for event in found]

    assert page(0, 100) == [1, 2, 3, 4, 5, 6, 7]
    assert [page(0, 3), page(3, 3), page(6, 3), page(7, 3)] == [[1, 2, 3], [4, 5, 6], [7], []]


def test_heads_tell_how_far_a_job_is(house: House) -> None:
    job_id = told(house, 3)
    heads = {job_id: (5, JobState.RUNNING)}
    assert house.database.read(lambda c: lookups.heads(c, [job_id, new_id()])) == heads
    assert watching.heads(house.database, [job_id, new_id()]) == heads


def test_many_cursors_are_read_at_once(house: House) -> None:
    first, second, other = told(house, 3), told(house, 1), told(house, 0)
    cursors = [(first, 0), (first, 4), (second, 2), (other, 2), (new_id(), 0)]
    assert after(house, cursors, 100) == {
        (first, 0): [1, 2, 3, 4, 5],
        (first, 4): [5],
        (second, 2): [3],
    }
    assert after(house, cursors, 2) == {(first, 0): [1, 2], (first, 4): [5], (second, 2): [3]}
    assert after(house, [], 10) == {}


def test_a_thousand_cursors_are_read_at_once(house: House) -> None:
    job_id = told(house, 0)
    cursors = [(job_id, 0), *((new_id(), 3) for _ in range(999))]
    assert after(house, cursors, 10) == {(job_id, 0): [1, 2]}
