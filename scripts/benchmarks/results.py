"""What was measured in a run."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scripts.benchmarks.nodes import Cpu

PARTS = ("clients", "server", "worker", "children", "PostgreSQL", "RabbitMQ")


class Figure:
    """One quantity of one side, phase or size; of each round, its value and what it cost."""

    def __init__(self) -> None:
        self.values: dict[int, float] = {}
        self.cpu: dict[int, Cpu] = {}

    @property
    def median(self) -> float:
        return statistics.median(self.values.values())

    @property
    def cost(self) -> Cpu:
        """Medians of the CPU time a job, in microseconds by part; empty where there is none."""
        parts = [part for part in PARTS if any(part in cpu for cpu in self.cpu.values())]
        return {
            part: statistics.median(cpu[part] for cpu in self.cpu.values() if part in cpu)
            for part in parts
        }

    def ratios(self, other: Figure) -> list[float]:
        """To the other's value in the same round, of the rounds that both have."""
        return [
            value / other.values[turn]
            for turn, value in self.values.items()
            if other.values.get(turn)
        ]


class Results:
    """`figures` by quantity and by whose it is, as they came; `curves` by name, whose, and round:
    sorted seconds."""

    def __init__(self) -> None:
        self.figures: defaultdict[str, dict[str, Figure]] = defaultdict(dict)
        self.curves: defaultdict[str, dict[str, dict[int, list[float]]]] = defaultdict(dict)
        self.failures: list[str] = []

    def notes(self, who: str, turn: int) -> Notes:
        return Notes(self, who, turn)

    def find(self, key: str, who: str) -> Figure | None:
        return self.figures.get(key, {}).get(who)

    def as_json(self) -> dict[str, object]:
        return {
            "figures": {
                key: {
                    who: {"rounds": figure.values, "cpu_us": figure.cpu}
                    for who, figure in whose.items()
                }
                for key, whose in self.figures.items()
            },
            "curves": self.curves,
            "failures": self.failures,
        }


@dataclass(frozen=True, slots=True)
class Notes:
    """Takes what is measured of one side, phase or size in one round."""

    results: Results
    who: str
    turn: int

    def value(self, key: str, value: float, cpu: Cpu | None = None) -> None:
        figure = self.results.figures[key].setdefault(self.who, Figure())
        figure.values[self.turn] = value
        if cpu:
            figure.cpu[self.turn] = cpu

    def figure(self, key: str) -> Figure:
        """Raises KeyError if nothing was noted."""
        return self.results.figures[key][self.who]

    def milliseconds(
        self,
        seconds: Sequence[float],
        keys: Mapping[int, str],
        cpu: Cpu | None = None,
    ) -> None:
        """The percentiles that the keys are of."""
        for percent, key in keys.items():
            self.value(key, percentile(seconds, percent) * 1000, cpu)

    def curve(self, name: str, seconds: Sequence[float]) -> None:
        self.results.curves[name].setdefault(self.who, {})[self.turn] = sorted(seconds)


def percentile(values: Sequence[float], percent: int) -> float:
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
