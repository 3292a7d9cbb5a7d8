"""What scripts/bench makes of what it measures."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import pytest

from scripts.benchmarks.clients.loops import obey
from scripts.benchmarks.orders import Done, Order
from scripts.benchmarks.report import AIMS, TITLES, Aim, Measure, render, render_aims
from scripts.benchmarks.results import Notes, Results
from scripts.benchmarks.sections import QUICK, Effort, Race, Stage
from scripts.benchmarks.sides import Side


def _results(values: dict[str, dict[str, list[float]]]) -> Results:
    results = Results()
    for key, whose in values.items():
        for who, rounds in whose.items():
            for turn, value in enumerate(rounds):
                results.notes(who, turn).value(key, value)
    return results


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


@pytest.mark.parametrize(
    ("must", "good", "at_most", "value", "verdict"),
    [
        (0.6, 0.8, False, 0.59, "MISSED"),
        (0.6, 0.8, False, 0.6, "reached"),
        (0.6, 0.8, False, 0.8, "good"),
        (12.0, 8.0, True, 12.1, "MISSED"),
        (12.0, 8.0, True, 12.0, "reached"),
        (12.0, 8.0, True, 8.0, "good"),
        (28.0, None, True, 28.0, "reached"),
        (None, 1.0, False, 0.9, "not yet"),
        (None, 1.0, False, 1.0, "good"),
    ],
)
def test_a_bound_is_reached_at_itself(
    must: float | None, good: float | None, at_most: bool, value: float, verdict: str
) -> None:
    aim = Aim("", Measure("drain"), None, must, good, at_most)
    assert aim.verdict(value) == verdict


def test_the_ratio_of_an_aim_is_the_median_of_the_ratios_of_the_rounds() -> None:
    results = _results(
        {"drain": {"jobsvc": [100, 900, 400]}, "submit_64": {"echo": [1000, 1000, 200]}}
    )
    aim = Aim("", Measure("drain"), Measure("submit_64", "echo"), 1.2, 1.8)
    assert aim.values(results) == [0.1, 0.9, 2.0]


def test_a_ratio_is_taken_of_the_rounds_that_both_have() -> None:
    results = _results({"drain": {"jobsvc": [100, 900]}})
    results.notes("Celery", 1).value("drain", 300)
    aim = Aim("", Measure("drain"), Measure("drain", "Celery"), 10, 15)
    assert aim.values(results) == [3.0]


def test_an_aim_is_not_judged_without_all_that_it_compares() -> None:
    assert len(render_aims(_results({"drain": {"jobsvc": [300.0]}})).splitlines()) == 1
    lines = render_aims(_results({"drain": {"jobsvc": [300.0], "Celery": [100.0]}})).splitlines()
    assert [_cells(line) for line in lines[1:]] == [
        ["drain / Celery", "3.00", ">= 10", ">= 15", "MISSED"]
    ]


def test_every_aim_is_of_quantities_in_the_table() -> None:
    keys = {measure.key for aim in AIMS for measure in (aim.of, aim.to) if measure}
    assert keys <= TITLES.keys()


def test_a_line_shows_median_range_ratio_and_the_cost_of_each_process() -> None:
    results = Results()
    for turn, (ours, theirs) in enumerate([(90.0, 100.0), (300.0, 120.0), (310.0, 90.0)]):
        results.notes("jobsvc", turn).value("submit_64", ours, {"server": 10 + turn, "clients": 5})
        results.notes("Celery", turn).value("submit_64", theirs)
    _, first, second = render(results).splitlines()
    assert _cells(first) == [
        "submit, 64 in flight, jobs/s", "jobsvc", "300 (90.0-310)", "5", "11", "16"
    ]  # fmt: skip
    assert _cells(second) == ["Celery", "100 (90.0-120)", "2.50"]


def test_quantities_that_were_not_measured_are_left_out() -> None:
    assert len(render(_results({"drain": {"jobsvc": [1.0]}})).splitlines()) == 2


def test_percentiles_are_in_milliseconds() -> None:
    results = Results()
    results.notes("jobsvc", 0).milliseconds([0.001, 0.002, 0.003], {50: "done_p50"})
    assert results.figures["done_p50"]["jobsvc"].values == {0: 2.0}


def test_all_that_was_measured_can_be_kept() -> None:
    results = _results({"drain": {"jobsvc": [1.0, 2.0]}})
    results.notes("jobsvc", 0).curve("drain", [2.0, 1.0])
    kept = json.loads(json.dumps(results.as_json()))
    assert kept["figures"]["drain"]["jobsvc"]["rounds"] == {"0": 1.0, "1": 2.0}
    assert kept["curves"]["drain"]["jobsvc"] == {"0": [1.0, 2.0]}


class _First(Side):
    name = "first"


class _Second(Side):
    name = "second"


class _Missing(Side):
    name = "missing"

    @classmethod
    def missing(cls) -> str:
        return "what it needs"


def _raced(turn: int, race: Race[Any], left_out: type[Side] | None = None) -> Results:
    nodes: Any = None  # these sides start nothing
    stage = Stage(nodes, QUICK, turn, Results(), lambda side: side is not left_out)
    race.run("race", stage)
    return stage.results


def _note(side: Side, effort: Effort, notes: Notes) -> None:
    notes.value("drain", 1.0)


@pytest.mark.parametrize(
    ("turn", "order"),
    [(0, ["first", "second"]), (1, ["second", "first"]), (2, ["first", "second"])],
)
def test_sides_take_turns_to_go_first(turn: int, order: list[str]) -> None:
    results = _raced(turn, Race(_note, (_First, _Second)))
    assert list(results.figures["drain"]) == order


def test_sides_that_cannot_be_had_or_were_not_chosen_are_left_out() -> None:
    results = _raced(0, Race(_note, (_First, _Missing, _Second)), left_out=_Second)
    assert list(results.figures["drain"]) == ["first"]
    assert not results.failures


def test_a_side_that_fails_keeps_what_it_has_and_leaves_the_others_theirs() -> None:
    def fail_first(side: Side, effort: Effort, notes: Notes) -> None:
        notes.value("drain", 1.0)
        if isinstance(side, _First):
            raise AssertionError("broken")
        notes.value("flow", 1.0)

    results = _raced(0, Race(fail_first, (_First, _Second)))
    assert list(results.figures["drain"]) == ["first", "second"]
    assert list(results.figures["flow"]) == ["second"]
    assert results.failures == ["round 1: race, first: broken"]


class _Client:
    """Answers submits only once `expected` of them are there."""

    def __init__(self, expected: int = 1) -> None:
        self.submitted = 0
        self.bulks: list[int] = []
        self._barrier = asyncio.Barrier(expected)

    async def submit(self) -> str:
        self.submitted += 1
        number = self.submitted
        if number > 1:  # the first is the warm-up
            await self._barrier.wait()
        return f"job{number}"

    async def submit_bulk(self, count: int) -> None:
        await asyncio.sleep(0)
        self.bulks.append(count)

    async def follow(self, done: Done) -> None:
        raise NotImplementedError


async def _obeyed(
    order: Order,
    client: _Client,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Done:
    monkeypatch.setattr("sys.stdin", io.StringIO("go\n"))
    await obey(order, client)
    up, done = capsys.readouterr().out.splitlines()
    assert up == "up"
    return Done(**json.loads(done))


async def test_at_a_fixed_rate_a_job_is_timed_from_when_it_was_due(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # None is answered before all were submitted: late ones delay no other.
    order = Order("rate", rate=1000.0, seconds=0.005)
    done = await _obeyed(order, _Client(expected=5), monkeypatch, capsys)
    assert (done.warmed_up, done.count) == (1, 5)
    first, *others = (done.due[f"job{number}"] for number in range(2, 7))
    assert [at - first for at in others] == pytest.approx([0.001, 0.002, 0.003, 0.004], abs=1e-6)


async def test_a_backlog_has_as_many_jobs_as_were_ordered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = _Client()
    order = Order("fill", in_flight=2, bulk=500, count=1200)
    done = await _obeyed(order, client, monkeypatch, capsys)
    assert sorted(client.bulks) == [200, 500, 500]
    assert done.count == 1200
