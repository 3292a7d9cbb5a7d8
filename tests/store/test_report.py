from __future__ import annotations

import pytest

from jobsvc.core.attempts import Log, Output, Progress, Report
from jobsvc.core.model import DAY, Effects
from jobsvc.store.verbs.running import LOG_BYTES_MAX, OUTPUT_BYTES_MAX
from tests.store.house import DONE, RETRYABLE, House


def test_what_a_handler_tells_is_kept_in_order_and_exactly(house: House) -> None:
    claimed = house.start()
    told: list[Report] = [
        Progress(1.5, 10.0, "ü"),
        Log("INFO", "line\nline"),
        Output(text="text"),
        Output(data=b"\x00\xff"),
        Output(data=b""),
        Progress(10.0, 10.0),
    ]
    assert house.report(claimed, *told)
    events = house.events(claimed.job_id)[2:]
    assert [event.report for event in events] == told
    assert [event.type for event in events] == [
        *("PROGRESS", "LOG", "OUTPUT", "OUTPUT", "OUTPUT", "PROGRESS")
    ]
    assert {(event.state, event.attempt, event.worker_id) for event in events} == {
        ("RUNNING", 1, "w1")
    }
    assert house.get(claimed.job_id).progress == told[-1]
    (change,) = house.effects.changes
    assert change.last_sequence == 8


def test_a_report_needs_the_lease(house: House) -> None:
    stale = house.start(max_attempts=3)
    house.wait(31)
    house.reap()
    assert not house.report(stale, Log("INFO", "waiting"))
    house.wait(DAY)
    house.promote()
    fresh = house.claim(stale.job_id)
    before = house.row(stale.job_id)
    assert not house.report(stale, Log("INFO", "late"), Progress(1, 1))
    assert house.effects == Effects()
    assert house.row(stale.job_id) == before
    assert house.report(fresh, Log("INFO", "mine"))
    assert house.finish(fresh, DONE)
    assert not house.report(fresh, Log("INFO", "after the end"))


@pytest.mark.parametrize(
    ("entry", "what", "limit"),
    [
        (Log("DEBUG", "é" * 512 * 1024), "log", LOG_BYTES_MAX),
        (Output(text="é" * 512 * 1024), "output", OUTPUT_BYTES_MAX),
        (Output(data=b"x" * 1024 * 1024), "output", OUTPUT_BYTES_MAX),
    ],
    ids=["log", "text", "data"],
)
def test_a_budget_is_8_mib_and_one_last_warning(
    house: House, entry: Report, what: str, limit: int
) -> None:
    claimed = house.start()
    column = f"{what}_bytes"
    assert limit == 8 * 1024 * 1024
    house.change(claimed.job_id, **{column: limit - 2 * 1024 * 1024})
    small: Report = Log("INFO", "!") if what == "log" else Output(text="!")
    assert house.report(claimed, entry)
    assert house.report(claimed, entry)  # to the last byte
    assert getattr(house.row(claimed.job_id), column) == limit
    assert house.report(claimed, small, small, Progress(1, 2), entry)
    assert house.report(claimed, small)
    kept = house.events(claimed.job_id)[2:]
    assert [event.report for event in kept[:2]] == [entry, entry]
    warning, progress = (event.report for event in kept[2:])
    assert isinstance(warning, Log)
    assert warning.level == "WARNING"
    assert what in warning.message
    assert str(limit) in warning.message
    assert progress == Progress(1, 2)


def test_the_budgets_are_apart_and_of_the_job_not_the_attempt(house: House) -> None:
    claimed = house.start()
    house.change(claimed.job_id, output_bytes=OUTPUT_BYTES_MAX)
    house.report(claimed, Output(text="!"), Log("INFO", "still told"))
    assert [e.type for e in house.events(claimed.job_id)[2:]] == ["LOG", "LOG"]
    assert house.finish(claimed, RETRYABLE)
    house.wait(DAY)
    house.promote()
    again = house.claim(claimed.job_id)
    before = house.row(again.job_id).last_sequence
    assert house.report(again, Output(text="!"))
    assert house.row(again.job_id).last_sequence == before
