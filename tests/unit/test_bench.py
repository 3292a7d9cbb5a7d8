"""The table of scripts/bench."""

from __future__ import annotations

import pytest

from scripts.benchmarks.report import ROWS, Aim, render, render_cpu


def _line(table: str, title: str) -> str:
    (line,) = (line for line in table.splitlines() if line.startswith(title))
    return line.removeprefix(title)


@pytest.mark.parametrize(
    ("aim", "ours", "theirs", "reached"),
    [
        (Aim(2.5, "Celery"), 250.0, 100.0, True),
        (Aim(2.5, "Celery"), 249.0, 100.0, False),
        (Aim(1, "Celery", at_most=True), 100.0, 100.0, True),
        (Aim(1, "Celery", at_most=True), 101.0, 100.0, False),
        (Aim(30, at_most=True), 30.0, 1.0, True),
        (Aim(30, at_most=True), 30.1, 1.0, False),
    ],
)
def test_an_aim_is_reached_at_its_bound(
    aim: Aim, ours: float, theirs: float, reached: bool
) -> None:
    assert aim.holds(ours, theirs) is reached


def test_a_row_shows_medians_ranges_ratios_and_each_aim() -> None:
    rounds = {"jobsvc": [90.0, 300.0, 310.0], "Celery": [100.0, 120.0, 90.0], "echo": [1000.0]}
    line = _line(render({"submit_64": rounds}), "submit, 64 in flight, jobs/s")
    assert line.split("  ")[0] == ""
    cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
    assert cells == [
        "300 (90.0-310)",
        "100 (90.0-120)",
        "-",
        "1000",
        "-",
        "3.00",
        "-",
        "0.30",
        "-",
        ">= 2.5 x Celery reached, >= 0.5 x echo MISSED",
    ]


def test_an_aim_is_not_judged_without_the_side_that_it_names() -> None:
    table = render({"submit_64": {"jobsvc": [300.0]}})
    assert "reached" not in table
    assert "MISSED" not in table


def test_rows_that_were_not_measured_are_left_out() -> None:
    assert len(render({ROWS[0].key: {"jobsvc": [1.0]}}).splitlines()) == 2


def test_cpu_is_summed_over_the_parts_that_there_are() -> None:
    table = render_cpu({"drain": {"jobsvc": {"server": [10.0], "worker": [300.0, 200.0, 250.0]}}})
    assert _line(table, "drain, jobsvc").split() == ["-", "10", "250", "-", "-", "-", "260"]
