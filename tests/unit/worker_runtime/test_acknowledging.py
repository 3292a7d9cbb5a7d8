from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from worker.runtime.acknowledging import Unacknowledged


def received(count: int) -> Unacknowledged:
    made = Unacknowledged()
    for tag in range(1, count + 1):
        made.add(tag)
    return made


def test_what_is_done_in_order_takes_one_call() -> None:
    tags = received(5)
    assert tags.take([2, 1, 3], keep=0) == (3, [])
    assert tags.take([5, 4], keep=0) == (5, [])
    assert len(tags) == 0


def test_what_is_done_beyond_a_gap_is_acknowledged_alone() -> None:
    tags = received(4)
    assert tags.take([1, 3, 4], keep=0) == (1, [3, 4])
    assert tags.take([2], keep=0) == (2, [])


def test_what_is_beyond_a_gap_waits_once_for_the_gap_to_close() -> None:
    tags = received(5)
    rounds: tuple[tuple[list[int], tuple[int | None, list[int]]], ...] = (
        ([2, 3], (None, [3])),
        ([1], (2, [])),
        ([5], (None, [])),
        ([], (None, [5])),
    )
    waiting = []
    for done, told in rounds:
        assert tags.take(done, keep=1) == told
        waiting.append(tags.waiting)
    assert waiting == [True, False, True, False]


def test_what_goes_back_is_part_of_no_acknowledgement() -> None:
    tags = received(3)
    tags.remove(2)
    assert tags.take([1, 3], keep=0) == (3, [])  # the broker has 2 no more


def test_a_tag_that_is_not_known_is_left_to_the_broker() -> None:
    assert received(1).take([7], keep=5) == (None, [7])


@given(st.lists(st.tuples(st.sets(st.integers(1, 30)), st.integers(0, 5)), max_size=8))
def test_each_is_acknowledged_once_and_no_other_is(rounds: list[tuple[set[int], int]]) -> None:
    tags = received(30)
    open_tags, done_tags = set(range(1, 31)), set[int]()
    for chosen, keep in rounds:
        new = chosen - done_tags
        done_tags |= new
        up_to, singles = tags.take(new, keep)
        told = {tag for tag in open_tags if up_to is not None and tag <= up_to}
        assert up_to is None or up_to in open_tags
        assert told.isdisjoint(singles)
        assert len(singles) == len(set(singles))
        told.update(singles)
        assert told <= open_tags & done_tags
        open_tags -= told
        assert len(open_tags & done_tags) <= keep
