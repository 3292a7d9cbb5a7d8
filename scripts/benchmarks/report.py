"""From what was measured to a table with ratios and aims."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

OURS = "jobsvc"
OTHERS = ("Celery", "unconfirmed", "echo", "empty")
PARTS = ("clients", "server", "worker", "children", "PostgreSQL", "RabbitMQ")

Rounds = Mapping[str, Sequence[float]]  # by side


@dataclass(frozen=True, slots=True)
class Aim:
    """A bound of our value, or of its ratio to `of`'s."""

    bound: float
    of: str = ""
    at_most: bool = False

    def __str__(self) -> str:
        relation = "<=" if self.at_most else ">="
        return f"{relation} {self.bound:g}" + (f" x {self.of}" if self.of else "")

    def holds(self, ours: float, theirs: float) -> bool:
        value = ours / theirs if self.of else ours
        return value <= self.bound if self.at_most else value >= self.bound


@dataclass(frozen=True, slots=True)
class Row:
    key: str
    title: str
    aims: tuple[Aim, ...] = ()


ROWS = (
    Row("submit_1", "submit, 1 in flight, jobs/s"),
    Row("submit_64", "submit, 64 in flight, jobs/s", (Aim(2.5, "Celery"), Aim(0.5, "echo"))),
    Row("publish_64", "the same until all is on the broker, jobs/s"),
    Row("submit_bulk", "submit, 500 a call, jobs/s"),
    Row("drain", "drain of a backlog, jobs/s", (Aim(10, "Celery"),)),
    Row("flow", "submitted and done, jobs/s"),
    Row("start_p50", "submit to start seen, p50, ms"),
    Row("start_p99", "submit to start seen, p99, ms"),
    Row("done_p50", "submit to done seen, p50, ms", (Aim(1, "Celery", at_most=True),)),
    Row("done_p99", "submit to done seen, p99, ms", (Aim(1, "Celery", at_most=True),)),
    Row("fan_out", "one job to many watchers, events/s"),
    Row("fleet", "many jobs to one watcher, events/s", (Aim(5000),)),
    Row("scale_submit", "submit behind finished jobs, jobs/s", (Aim(0.9, "empty"),)),
    Row("scale_drain", "drain behind finished jobs, jobs/s", (Aim(0.9, "empty"),)),
    Row("list_newest", "a page of 50, the newest, p50, ms"),
    Row("list_failed", "the same, failed"),
    Row("list_type", "the same, of a type"),
    Row("list_queue_failed", "the same, of a queue and failed"),
    Row("list_label", "the same, with a label"),
    Row("watcher", "an idle watcher in the server, KiB", (Aim(30, at_most=True),)),
    Row("server_rss", "idle server, RSS, MiB", (Aim(120, at_most=True),)),
    Row("server_uss", "idle server, USS, MiB"),
    Row("worker_rss", "idle worker, RSS, MiB", (Aim(120, at_most=True),)),
    Row("worker_uss", "idle worker, USS, MiB"),
    Row("child_rss", "its child process, RSS, MiB"),
    Row("child_uss", "its child process, USS, MiB"),
)


def render(measured: Mapping[str, Rounds]) -> str:
    """The table of the rows that were measured: medians, over several rounds with the range."""
    head = ("", OURS, *OTHERS, *(f"/ {side}" for side in OTHERS), "aim")
    return _align(
        [head, *(_cells(r, measured[r.key]) for r in ROWS if OURS in measured.get(r.key, ()))]
    )


def render_cpu(measured: Mapping[str, Mapping[str, Rounds]]) -> str:
    """CPU time a job by phase, side and part; the machine's cores share it."""
    lines: list[tuple[str, ...]] = [("CPU, microseconds a job", *PARTS, "sum")]
    for phase, sides in measured.items():
        for side, parts in sides.items():
            spent = [statistics.median(parts[p]) if p in parts else None for p in PARTS]
            numbers = ["-" if s is None else f"{s:.0f}" for s in spent]
            total = sum(s for s in spent if s is not None)
            lines.append((f"{phase}, {side}", *numbers, f"{total:.0f}"))
    return _align(lines)


def _cells(row: Row, rounds: Rounds) -> tuple[str, ...]:
    medians = {side: statistics.median(values) for side, values in rounds.items()}
    ours = medians[OURS]
    shown = [_shown(rounds[side]) if side in rounds else "-" for side in (OURS, *OTHERS)]
    ratios = [f"{ours / medians[side]:.2f}" if side in medians else "-" for side in OTHERS]
    return row.title, *shown, *ratios, ", ".join(_judged(row.aims, medians))


def _judged(aims: Iterable[Aim], medians: Mapping[str, float]) -> Iterable[str]:
    for aim in aims:
        if not aim.of or aim.of in medians:
            reached = aim.holds(medians[OURS], medians.get(aim.of, 1.0))
            yield f"{aim} {'reached' if reached else 'MISSED'}"


def _shown(values: Sequence[float]) -> str:
    def text(value: float) -> str:
        return f"{value:.0f}" if value >= 100 else f"{value:.1f}"

    if len(values) == 1:
        return text(values[0])
    return f"{text(statistics.median(values))} ({text(min(values))}-{text(max(values))})"


def _align(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for first, *rest in lines:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        texts.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(texts)
