"""From what was measured to one table, and to what was aimed at."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from scripts.benchmarks.results import PARTS, Figure, Results

OURS = "jobsvc"

_PAGES = {
    "list_newest": "a page of 50, the newest, p50, ms",
    "list_failed": "a page of 50, failed, p50, ms",
    "list_type": "a page of 50, of a type, p50, ms",
    "list_queue_failed": "a page of 50, of a queue and failed, p50, ms",
    "list_label": "a page of 50, with a label, p50, ms",
}
_SEEN = {
    "start_p50": "submit to start seen, p50, ms",
    "start_p99": "submit to start seen, p99, ms",
    "done_p50": "submit to end seen, p50, ms",
    "done_p99": "submit to end seen, p99, ms",
}
_PROBED = {
    "submit": "submit, 64 in flight, jobs/s",
    "fleet": "many jobs to one watcher, events/s",
    "drain": "claim and run, jobs/s",
    **_SEEN,
    **_PAGES,
}
# What each quantity is, in the order of the table.
TITLES = {
    "submit_1": "submit, 1 in flight, jobs/s",
    "call_ms": "a call, 1 in flight, ms",
    "submit_64": "submit, 64 in flight, jobs/s",
    "server_cpu": "CPU a job of the server at 64, us",
    "publish_64": "submit until all is on the broker, jobs/s",
    "submit_bulk": "submit, 500 a call, 4 calls, jobs/s",
    "drain": "drain of a backlog, jobs/s",
    "worker_cpu": "CPU a job of worker and children, us",
    "flow": "submitted at 64 and done, jobs/s",
    "quarter_p50": "due to done at a quarter of that, p50, ms",
    "quarter_p99": "due to done at a quarter of that, p99, ms",
    "half_p50": "due to done at half of that, p50, ms",
    "half_p99": "due to done at half of that, p99, ms",
    **_SEEN,
    "fleet": "many jobs to one watcher, events/s",
    "fan_out": "one job to many watchers, events/s",
    **_PAGES,
    "watcher": "an idle watcher in the server, KiB",
    "server_rss": "idle server, RSS, MiB",
    "server_uss": "idle server, USS, MiB",
    "worker_rss": "idle worker, RSS, MiB",
    "worker_uss": "idle worker, USS, MiB",
    "child_rss": "its child process, RSS, MiB",
    "child_uss": "its child process, USS, MiB",
    **{f"growth_{key}": f"growth: {title}" for key, title in _PROBED.items()},
    "load_p50": "pressure: due to done under load, p50, ms",
    "load_p99": "pressure: due to done under load, p99, ms",
    **{f"pressure_{key}": f"pressure: {title}" for key, title in _PROBED.items()},
    "finished": "pressure: finished jobs by then",
    **{
        f"{table}_{part}": f"pressure: {table}, {title}"
        for table in ("jobs", "job_events", "outbox")
        for part, title in {
            "mib": "table, MiB",
            "indexes_mib": "indexes, MiB",
            "dead": "dead rows",
        }.items()
    },
}


@dataclass(frozen=True, slots=True)
class Measure:
    key: str
    who: str = OURS


@dataclass(frozen=True, slots=True)
class Aim:
    """Bounds of a value, or of its ratio to another of the same round; None: there is no such."""

    title: str
    of: Measure
    to: Measure | None
    must: float | None
    good: float | None
    at_most: bool = False

    def values(self, results: Results) -> list[float]:
        """Of each round; empty where something of it was not measured."""
        ours = results.find(self.of.key, self.of.who)
        if ours is None:
            return []
        if self.to is None:
            return list(ours.values.values())
        theirs = results.find(self.to.key, self.to.who)
        return ours.ratios(theirs) if theirs else []

    def verdict(self, value: float) -> str:
        def reached(bound: float) -> bool:
            return value <= bound if self.at_most else value >= bound

        if self.must is not None and not reached(self.must):
            return "MISSED"
        if self.good is not None and reached(self.good):
            return "good"
        return "reached" if self.must is not None else "not yet"


def _rate(title: str, key: str, to: Measure, must: float | None, good: float) -> Aim:
    return Aim(title, Measure(key), to, must, good)


def _span(title: str, key: str, to: Measure | None, must: float, good: float | None = None) -> Aim:
    return Aim(title, Measure(key), to, must, good, at_most=True)


def _grown(title: str, of: Measure, to: Measure) -> Aim:
    return Aim(f"{title}, 10 M finished / none", of, to, 1.2, 1.1, at_most=True)


def _pressed(title: str, of: Measure, to: Measure) -> Aim:
    return Aim(f"{title}, transaction open / before", of, to, 0.7, 0.9)


_MANY = "10,000,000 rows"
_ECHO_64 = Measure("submit_64", "echo")
_ECHO_MS = Measure("call_ms", "echo")
# Rates as ours to theirs, times as theirs would have it: the more the better, or the less.
AIMS = (
    _rate("submit, 64 in flight / echo", "submit_64", _ECHO_64, 0.6, 0.8),
    _rate("submit, 64 in flight / Celery", "submit_64", Measure("submit_64", "Celery"), 1, 1.4),
    _rate("submit, 1 in flight / echo", "submit_1", Measure("submit_1", "echo"), 0.4, 0.5),
    _rate("submit, 1 in flight / Celery", "submit_1", Measure("submit_1", "Celery"), 0.7, 0.9),
    _rate("bulk / echo at 64", "submit_bulk", _ECHO_64, 3, 5),
    _rate("drain / echo at 64", "drain", _ECHO_64, 1.2, 1.8),
    _rate("drain / Celery", "drain", Measure("drain", "Celery"), 10, 15),
    _rate("drain / pg-boss", "drain", Measure("drain", "pg-boss"), None, 1),
    _rate("drain / awa", "drain", Measure("drain", "awa"), None, 1),
    _rate("submitted and done / Celery", "flow", Measure("flow", "Celery"), 5, 10),
    _span("submit to end seen, p50, in echoes at 1", "done_p50", _ECHO_MS, 12, 8),
    _span("submit to end seen, p50 / Celery", "done_p50", Measure("done_p50", "Celery"), 0.9, 0.6),
    _rate("one fleet watcher / bare stream", "fleet", Measure("fleet", "echo"), 0.7, 0.85),
    _span("server's CPU a job / echo's", "server_cpu", Measure("server_cpu", "echo"), 1.8, 1.4),
    _span("worker's and children's CPU a job, us", "worker_cpu", None, 450, 300),
    _span("a page of 50, p50, in echoes at 1", "list_newest", _ECHO_MS, 6, 4),
    _span("idle watcher, KiB", "watcher", None, 28),
    _span("idle server, RSS, MiB", "server_rss", None, 100),
    _span("idle worker, RSS, MiB", "worker_rss", None, 92),
    # Of rates the inverse, as a time a job.
    _grown("submit", Measure("growth_submit", "empty"), Measure("growth_submit", _MANY)),
    _grown("claim and run", Measure("growth_drain", "empty"), Measure("growth_drain", _MANY)),
    _grown("a page", Measure("growth_list_newest", _MANY), Measure("growth_list_newest", "empty")),
    *(
        _pressed(title, Measure(f"pressure_{key}", "during"), Measure(f"pressure_{key}", "before"))
        for key, title in {"submit": "submit", "drain": "claim and run", "fleet": "watch"}.items()
    ),
    # Of times the inverse, as a rate.
    *(
        _pressed(title, Measure(f"pressure_{key}", "before"), Measure(f"pressure_{key}", "during"))
        for key, title in {"done_p50": "end seen", "list_newest": "a page"}.items()
    ),
)


def render(results: Results) -> str:
    """The table: medians of rounds, over several with the range; the ratio of the first of each
    quantity to each other; the CPU time that a job, an event or a page took of each process."""
    head = ("", "", "median", "first / it", *PARTS, "sum")
    lines: list[tuple[str, ...]] = [head]
    for key, title in TITLES.items():
        whose = results.figures.get(key, {})
        first = next(iter(whose.values()), None)
        for who, figure in whose.items():
            assert first is not None
            ratio = "" if figure is first else _ratio(first, figure)
            name = title if figure is first else ""
            lines.append((name, who, _spread(list(figure.values.values())), ratio, *_cpu(figure)))
    return _align(lines, left=2)


def render_aims(results: Results) -> str:
    """What was aimed at, where all that it needs was measured."""
    lines = [("aim", "median", "must", "good", "")]
    for aim in AIMS:
        if values := aim.values(results):
            sign = "<=" if aim.at_most else ">="
            must, good = (
                "" if bound is None else f"{sign} {bound:g}" for bound in (aim.must, aim.good)
            )
            verdict = aim.verdict(statistics.median(values))
            lines.append((aim.title, _spread(values), must, good, verdict))
    return _align(lines, left=1)


def _ratio(first: Figure, figure: Figure) -> str:
    ratios = first.ratios(figure)
    return f"{statistics.median(ratios):.2f}" if ratios else ""


def _cpu(figure: Figure) -> Iterator[str]:
    cost = figure.cost
    for part in PARTS:
        yield f"{cost[part]:.0f}" if part in cost else ""
    yield f"{sum(cost.values()):.0f}" if cost else ""


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return _number(values[0])
    low, high = _number(min(values)), _number(max(values))
    return f"{_number(statistics.median(values))} ({low}-{high})"


def _number(value: float) -> str:
    """To three digits or so."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _align(lines: Sequence[tuple[str, ...]], left: int) -> str:
    """In columns, of which so many start at the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for line in lines:
        cells = [
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        texts.append("  ".join(cells).rstrip())
    return "\n".join(texts)
