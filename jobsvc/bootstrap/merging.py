"""Metrics of several processes, told as those of one.

What is counted is summed, of processes that have ended too: a counter never falls, as it would not
in one process that goes on. What each kind of gauge becomes, `metrics` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from prometheus_client import Metric

from jobsvc import metrics

# A family's name, its documentation, its type, and of each sample the name, labels and value: fit
# for JSON.
Sample = tuple[str, dict[str, str], float]
Family = tuple[str, str, str, list[Sample]]
Snapshot = list[Family]

_COUNTED = ("counter", "histogram", "summary")


class Source(Protocol):
    def collect(self) -> Iterable[Metric]: ...


def snapshot(*sources: Source) -> Snapshot:
    """What these tell now."""
    return [
        (
            family.name,
            family.documentation,
            family.type,
            [(sample.name, sample.labels, sample.value) for sample in family.samples],
        )
        for source in sources
        for family in source.collect()
    ]


def counted(told: Snapshot) -> Snapshot:
    """What is left to tell of a process that has ended."""
    return [family for family in told if family[2] in _COUNTED]


def value(told: Snapshot, name: str) -> float | None:
    """Of a metric without labels."""
    return next((samples[0][2] for family, _, _, samples in told if family == name), None)


def merge(told: Iterable[Snapshot]) -> Snapshot:
    heads: dict[str, tuple[str, str]] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for name, documentation, kind, samples in (family for each in told for family in each):
        heads.setdefault(name, (documentation, kind))
        merged = values.setdefault(name, {})
        for sample, labels, value in samples:
            key = sample, tuple(labels.items())
            merged[key] = _rule(name, sample)((merged[key], value)) if key in merged else value
    return [
        (name, *head, [(sample, dict(labels), v) for (sample, labels), v in values[name].items()])
        for name, head in heads.items()
    ]


def families(told: Snapshot) -> Iterable[Metric]:
    for name, documentation, kind, samples in told:
        family = Metric(name, documentation, kind)
        for sample, labels, value in samples:
            family.add_sample(sample, labels, value)
        yield family


def _rule(family: str, sample: str) -> Callable[[tuple[float, float]], float]:
    if family in metrics.SMALLEST or sample.endswith("_created"):
        return min
    return max if family in metrics.LARGEST else sum
