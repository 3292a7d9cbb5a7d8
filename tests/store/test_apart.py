"""Who ran in a worker when it died is a suspect, and runs again alone in one."""

from __future__ import annotations

import pytest

from jobsvc.core.attempts import Claimed, Interrupted, Snoozed
from jobsvc.core.model import DAY
from jobsvc.core.states import CRASHES_MAX, JobState
from jobsvc.store import hot, verbs
from jobsvc.store.verbs import ClaimResult
from tests.store.house import (
    CRASH,
    DONE,
    EVERY_TYPE,
    FATAL,
    LEASE_SECONDS,
    RETRYABLE,
    House,
    new_token,
    worker,
)


def lose(house: House, *worker_ids: str) -> None:
    house.wait(LEASE_SECONDS + 1)
    house.reap()
    house.wait(DAY)
    house.promote()


def claim_among_others(house: House, *job_ids: str) -> ClaimResult:
    given = dict.fromkeys(job_ids, 0)
    token = new_token()
    return house.write(
        lambda tx: verbs.claim(tx, given, EVERY_TYPE, "w2", token, LEASE_SECONDS, given, True)
    )


def suspect(house: House) -> Claimed:
    claimed = house.start()
    lose(house)
    assert house.row(claimed.job_id).apart
    return claimed


def test_a_poisonous_job_fails_and_its_neighbours_do_not(house: House) -> None:
    poison, *innocent = (house.submit(max_attempts=10) for _ in range(4))
    house.claim_all([poison, *innocent])
    lose(house)
    found = claim_among_others(house, poison, *innocent)
    assert found.claimed == ()
    assert set(found.apart) == {poison, *innocent}
    for job_id in innocent:
        assert house.finish(house.claim(job_id), DONE)
    while house.get(poison).state is not JobState.FAILED:
        house.claim(poison)
        lose(house)
    assert house.row(poison).crashes == CRASHES_MAX
    assert [house.get(job_id).state for job_id in innocent] == [JobState.SUCCEEDED] * 3


def test_who_was_never_alone_is_not_given_up(house: House) -> None:
    """By workers of an older release, say, which know nothing of it."""
    ids = [house.submit(max_attempts=10) for _ in range(2)]
    for _ in range(CRASHES_MAX + 1):
        assert len(house.claim_all(ids)) == 2
        lose(house)
    assert [house.get(job_id).state for job_id in ids] == [JobState.QUEUED] * 2
    error = house.get(ids[0]).error
    assert error is not None
    told = "worker w1 stopped renewing its lease, and ran 1 more jobs; this one runs again apart"
    assert error.message.startswith(told)


def test_a_neighbour_whose_lease_is_not_over_yet_counts_as_one(house: House) -> None:
    first = house.start(max_attempts=10)
    house.change(first.job_id, crashes=0)
    house.wait(10)
    second = house.start()
    house.wait(LEASE_SECONDS - 9)
    assert house.reap() == 1
    assert house.get(first.job_id).error is not None
    assert "1 more jobs" in str(house.get(first.job_id).error)
    assert house.get(second.job_id).state is JobState.RUNNING


@pytest.mark.parametrize(
    ("ending", "stays"),
    [
        (RETRYABLE, False),
        (CRASH, False),  # of its child alone: it is known who did it
        (Snoozed(1.0), False),
        (Interrupted(), True),
    ],
)
def test_an_attempt_that_ends_by_itself_ends_the_suspicion(
    house: House, ending: object, stays: bool
) -> None:
    job_id = suspect(house).job_id
    assert house.finish(house.claim(job_id), ending)  # type: ignore[arg-type]
    assert house.row(job_id).apart is stays


def test_a_retry_by_hand_does_not(house: House) -> None:
    claimed = house.start(max_attempts=1)
    lose(house)
    assert house.get(claimed.job_id).state is JobState.FAILED
    house.retry(claimed.job_id)
    assert claim_among_others(house, claimed.job_id).apart == (claimed.job_id,)


def test_a_death_of_a_child_makes_nobody_a_suspect(house: House) -> None:
    claimed = house.start()
    house.finish(claimed, CRASH)
    assert not house.row(claimed.job_id).apart


def test_a_lease_lost_by_a_worker_that_lives_makes_nobody_a_suspect(house: House) -> None:
    """Its row was locked by somebody else, and could not be renewed."""
    claimed = house.start()
    house.wait(LEASE_SECONDS + 1)
    house.announce(worker("w1"))
    assert house.reap() == 1
    assert not house.row(claimed.job_id).apart


def test_a_claim_of_many_takes_all_others(house: House) -> None:
    job_id = suspect(house).job_id
    other, expired, unknown = house.submit(), house.submit(), house.submit("unheard")
    found = claim_among_others(house, job_id, other, expired, unknown)
    assert {each.job_id for each in found.claimed} == {other, expired}
    assert found.apart == (job_id,)
    assert house.get(job_id).state is JobState.QUEUED


def test_one_that_has_no_place_with_the_worker_does_not_wait_for_it(house: House) -> None:
    expired, other_type = house.submit(), house.submit("other")
    house.claim_all([expired, other_type])
    lose(house)
    house.change(expired, expire_time=house.now())
    given = {expired: 0, other_type: 0}
    demo = frozenset({"demo"})
    found = house.write(
        lambda tx: verbs.claim(tx, given, demo, "w2", new_token(), LEASE_SECONDS, given, True)
    )
    assert (found.claimed, found.apart) == ((), ())
    assert house.get(expired).state is JobState.FAILED
    assert house.row(other_type).held


def test_the_statement_for_what_is_plain_leaves_them(pg_house: House) -> None:
    job_id, other = pg_house.submit(), pg_house.submit()
    pg_house.change(job_id, apart=True)
    given = {job_id: 0, other: 0}
    found = hot.claim(pg_house.database, given, EVERY_TYPE, "w2", new_token(), LEASE_SECONDS)
    assert [each.job_id for each in found.claimed] == [other]


def test_one_that_fails_for_good_is_no_suspect(house: House) -> None:
    job_id = suspect(house).job_id
    house.finish(house.claim(job_id), FATAL)
    assert not house.row(job_id).apart
