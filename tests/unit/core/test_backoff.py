from __future__ import annotations

from jobsvc.core import backoff
from jobsvc.core.backoff import Backoff


def test_each_wait_is_random_below_a_bound_that_doubles() -> None:
    for _ in range(100):
        waits = Backoff()
        for bound in (0.4, 0.8, 1.6, 3.2, 5.0, 5.0):
            assert backoff.SECONDS_MIN <= waits.next() <= bound


def test_it_goes_on_for_as_long_as_what_it_waits_for_is_away() -> None:
    """For days, at the longest wait."""
    waits = Backoff()
    longest = [waits.next() for _ in range(50_000)][5:]
    assert max(longest) <= backoff.SECONDS_MAX
    assert min(longest) < 1 < 4 < max(longest)
    assert waits.failures == 50_000


def test_a_success_begins_it_anew() -> None:
    waits = Backoff()
    for _ in range(10):
        waits.next()
    waits.reset()
    assert waits.failures == 0
    assert waits.next() <= 2 * backoff.SECONDS_MIN
