from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobsvc.core import states
from jobsvc.core.states import (
    ARROWS,
    RETRYABLE_STATES,
    TERMINAL_EVENTS,
    TERMINAL_STATES,
    WAITING_STATES,
    EventType,
    JobState,
    backoff_seconds,
)


def test_a_state_waits_runs_or_has_ended() -> None:
    assert {*WAITING_STATES, JobState.RUNNING, *TERMINAL_STATES} == set(JobState)
    assert len(WAITING_STATES) + 1 + len(TERMINAL_STATES) == len(JobState)
    assert [state for state in JobState if state.terminal] == list(TERMINAL_STATES)
    assert [event for event in EventType if event.terminal] == list(TERMINAL_EVENTS)


def test_nothing_but_a_retry_leaves_an_end() -> None:
    assert {arrow for arrow in ARROWS if arrow[0] in TERMINAL_STATES} == {
        (state, EventType.RETRIED, JobState.QUEUED) for state in RETRYABLE_STATES
    }
    assert {a[0] for a in ARROWS if a[1] is EventType.RETRIED} == set(RETRYABLE_STATES)


def test_an_update_leaves_a_job_waiting() -> None:
    updated = [arrow for arrow in ARROWS if arrow[1] is EventType.UPDATED]
    assert {a[0] for a in updated} == {a[2] for a in updated} == set(WAITING_STATES)


def test_a_terminal_event_leads_to_its_end_and_nothing_else_does() -> None:
    for before, event, after in ARROWS:
        assert event.terminal == after.terminal
        if event.terminal:
            assert event.value == after.value
            assert before is not None


def test_a_history_begins_with_submitted_alone() -> None:
    assert {a[1] for a in ARROWS if a[0] is None} == {EventType.SUBMITTED}
    assert {a[0] for a in ARROWS if a[1] is EventType.SUBMITTED} == {None}


def test_an_attempt_begins_from_the_queue_alone() -> None:
    into_running = {(a[0], a[1]) for a in ARROWS if a[2] is JobState.RUNNING != a[0]}
    assert into_running == {(JobState.QUEUED, EventType.STARTED)}


def test_every_event_and_every_state_has_an_arrow() -> None:
    assert {a[1] for a in ARROWS} == set(EventType)
    assert {a[2] for a in ARROWS} == set(JobState)


def test_every_state_can_be_reached_and_come_to_an_end() -> None:
    reached: set[JobState | None] = {None}
    while more := {a[2] for a in ARROWS if a[0] in reached} - reached:
        reached |= more
    assert reached == {None, *JobState}
    ending: set[JobState | None] = set(TERMINAL_STATES)
    while before := {a[0] for a in ARROWS if a[2] in ending} - ending:
        ending |= before
    assert ending == reached


def test_the_docstring_names_every_arrow() -> None:
    assert states.__doc__ is not None
    documented = set()
    for line in states.__doc__.splitlines():
        if not (arrow := re.match(r"(.+?) -> (.+?)  +(.+?)  +", line)):
            arrow = re.match(r"(RUNNING|waiting) (\(stays\))  +(.+?)  +", line)
        if arrow is None:
            continue
        sources, targets, events = arrow.groups()
        last = re.sub(r"\(.*\)", "", events).split(", ")
        if targets == "(stays)":
            documented |= {(sources, event.strip(), sources) for event in last}
            continue
        for source in sources.split(" | "):
            for target in targets.split(" | "):
                documented.add((source, last[-1].strip(), target))
    waiting = {str(state) for state in WAITING_STATES}
    # The failure before an end leaves the job RUNNING until that follows.
    spoken = {("RUNNING", "ATTEMPT_FAILED", "RUNNING")}
    for source, event, target in documented:
        for each in waiting if source == "waiting" else {source}:
            stays = target == "waiting"
            spoken.add(("None" if each == "(none)" else each, event, each if stays else target))
    assert spoken == {(str(before), str(event), str(after)) for before, event, after in ARROWS}


@pytest.mark.parametrize(
    ("failures", "expected"), [(1, 10), (2, 20), (3, 40), (9, 2560), (10, 3600)]
)
def test_the_wait_doubles_up_to_its_maximum(failures: int, expected: float) -> None:
    assert backoff_seconds(failures, 10.0, 2.0, 3600.0, 0.0) == expected


def test_no_number_of_failures_is_too_many() -> None:
    assert backoff_seconds(100_000, 10.0, 10.0, 86_400.0, 0.0) == 86_400.0


def test_without_a_backoff_there_is_no_wait() -> None:
    assert backoff_seconds(50, 0.0, 10.0, 3600.0, 1.0) == 0.0


@given(
    failures=st.integers(1, 100),
    initial=st.floats(0, 86_400),
    multiplier=st.floats(1, 10),
    more=st.floats(0, 86_400),
    jitter=st.floats(0, 1),
)
def test_jitter_keeps_to_its_range(
    failures: int, initial: float, multiplier: float, more: float, jitter: float
) -> None:
    maximum = initial + more
    base = backoff_seconds(failures, initial, multiplier, maximum, 0.0)
    assert initial <= base <= maximum
    found = backoff_seconds(failures, initial, multiplier, maximum, jitter)
    assert base * (1 - jitter) * 0.999 <= found <= base * (1 + jitter) * 1.001


def test_jitter_goes_both_ways() -> None:
    found = [backoff_seconds(1, 100.0, 1.0, 100.0, 0.5) for _ in range(200)]
    assert min(found) < 90
    assert max(found) > 110
