"""Pictures of a run: how a backlog drains, and how long jobs take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as pyplot

from scripts.benchmarks.results import Results

POINTS_MAX = 1000
LATENCIES = {
    "done": "submit to end seen, one job after the other",
    "quarter": "due to done, at a quarter of its peak",
    "half": "due to done, at half of its peak",
}


def draw(results: Results, directory: Path) -> None:
    """Those for which something was measured."""
    matplotlib.use("Agg")
    everyone = dict.fromkeys(who for curves in results.curves.values() for who in curves)
    colours = {who: f"C{number}" for number, who in enumerate(everyone)}
    if "drain" in results.curves:
        _draw_drain(results, colours, directory / "drain.png")
    if any(name in results.curves for name in LATENCIES):
        _draw_latencies(results, colours, directory / "latency.png")


def _draw_drain(results: Results, colours: Mapping[str, str], path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(9, 6))
    for who, rounds in results.curves["drain"].items():
        for label, seconds in _labelled(who, rounds):
            ended = range(1, len(seconds) + 1)
            axes.plot(*_thinned(seconds, ended), color=colours[who], label=label)
    axes.set(title="A backlog drained by one worker", xlabel="seconds", ylabel="jobs ended")
    _finish(figure, [axes], path)


def _draw_latencies(results: Results, colours: Mapping[str, str], path: Path) -> None:
    names = [name for name in LATENCIES if name in results.curves]
    figure, grid = pyplot.subplots(
        1, len(names), figsize=(6 * len(names), 5), sharey=True, squeeze=False
    )
    for axes, name in zip(grid[0], names, strict=True):
        for who, rounds in results.curves[name].items():
            for label, seconds in _labelled(who, rounds):
                millis = [second * 1000 for second in seconds]
                part = [(rank + 1) / len(seconds) for rank in range(len(seconds))]
                axes.step(*_thinned(millis, part), where="post", color=colours[who], label=label)
        axes.set(title=LATENCIES[name], xlabel="ms", xscale="log")
    grid[0][0].set_ylabel("part of the jobs")
    _finish(figure, grid[0], path)


def _labelled(
    who: str, rounds: Mapping[int, Sequence[float]]
) -> list[tuple[str | None, Sequence[float]]]:
    """One curve of each round, all of a side in one colour, with one label."""
    return [(None if turn else who, curve) for turn, curve in enumerate(rounds.values())]


def _thinned(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    step = -(-len(xs) // POINTS_MAX)
    return [*xs[::step], xs[-1]], [*ys[::step], ys[-1]]


def _finish(figure: Any, all_axes: Sequence[Any], path: Path) -> None:
    for axes in all_axes:
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
