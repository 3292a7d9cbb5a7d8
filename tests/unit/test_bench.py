"""What scripts/bench makes of what it measures."""

from __future__ import annotations

import json

import pytest

from scripts.benchmarks.report import AIMS, TITLES, Aim, Measure, render, render_aims
from scripts.benchmarks.results import Results


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
