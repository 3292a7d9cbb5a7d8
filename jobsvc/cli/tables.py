"""Lists as tables that fit a terminal, or as one JSON resource a line."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from jobsvc.cli import output
from jobsvc.cli.output import Format
from jobsvc.client import state_name, to_json

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration
    from google.protobuf.timestamp_pb2 import Timestamp

WIDTH = 100
SHORTEST = 6  # of a column that had to give way
GAP = "  "

Cell = Callable[[Any], object]


@dataclass(frozen=True, slots=True)
class Column:
    """`whole`: is never cut, since it will be copied."""

    title: str
    cell: Cell
    whole: bool = False


def show(found: Iterable[Any], chosen: Format, columns: Sequence[Column]) -> None:
    if chosen is Format.JSON:
        for message in found:
            output.line(to_json(message))
        return
    rows = [[output.clean(str(c.cell(message))) for c in columns] for message in found]
    width = max(WIDTH, shutil.get_terminal_size((WIDTH, 0)).columns)
    for text in lines([c.title for c in columns], rows, [c.whole for c in columns], width):
        output.line(text)


def lines(
    titles: Sequence[str], rows: Sequence[Sequence[str]], whole: Sequence[bool], width: int
) -> Iterable[str]:
    """The table; its widest columns give way where it is too wide, down to a few characters."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    room = width - len(GAP) * (len(titles) - 1)
    while sum(widths) > room:
        loose = [n for n, w in enumerate(widths) if not whole[n] and w > SHORTEST]
        if not loose:
            break
        widths[max(loose, key=lambda n: widths[n])] -= 1
    for row in (titles, *rows):
        yield GAP.join(_fit(text, w) for text, w in zip(row, widths, strict=True)).rstrip()


def _fit(text: str, width: int) -> str:
    return text.ljust(width) if len(text) <= width else f"{text[: width - 1]}…"


def span(duration: Duration) -> str:
    return _span(duration.seconds + duration.nanos / 1e9)


def _span(seconds: float) -> str:
    """The two greatest units, or less: 3d4h, 5m30s, 0.2s."""
    whole = int(seconds)
    for unit, name, smaller, small in (
        (86_400, "d", 3_600, "h"),
        (3_600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if whole >= unit:
            rest = whole % unit // smaller
            return f"{whole // unit}{name}" + (f"{rest}{small}" if rest else "")
    return f"{seconds:.1f}s" if seconds < 10 and seconds != whole else f"{whole}s"


def age(moment: Timestamp) -> str:
    """How long ago; of what lies ahead, with a plus."""
    seconds = (datetime.now(UTC) - moment.ToDatetime(UTC)).total_seconds()
    return _span(seconds) if seconds >= 0 else f"+{_span(-seconds)}"


def _age_of(field: str) -> Cell:
    return lambda message: age(getattr(message, field)) if message.HasField(field) else "-"


def _some(field: str) -> Cell:
    """The value, a dash for none."""
    return lambda message: getattr(message, field) or "-"


def _count(field: str) -> Cell:
    """A dash for what is not known."""
    return lambda message: "-" if getattr(message, field) < 0 else getattr(message, field)


def _rate(queue: Any) -> str:
    if not queue.HasField("rate_limit"):
        return "-"
    return f"{queue.rate_limit.max_starts}/{span(queue.rate_limit.period)}"


JOBS = (
    Column("JOB_ID", lambda j: j.job_id, whole=True),
    Column("TYPE", lambda j: j.job_type),
    Column("QUEUE", lambda j: j.queue),
    Column("STATE", lambda j: state_name(j.state), whole=True),
    Column("TRY", lambda j: f"{j.attempt}/{j.max_attempts}", whole=True),
    Column("AGE", _age_of("create_time"), whole=True),
    Column("ERROR", lambda j: j.error.type or "-"),
)
TYPES = (
    Column("TYPE", lambda t: t.name),
    Column("QUEUE", _some("queue")),
    Column("WORKERS", lambda t: t.live_worker_count, whole=True),
    Column("TRIES", _some("max_attempts"), whole=True),
    Column("TIMEOUT", lambda t: span(t.timeout) if t.HasField("timeout") else "-", whole=True),
    Column("DESCRIPTION", lambda t: t.description),
)
QUEUES = (
    Column("QUEUE", lambda q: q.name),
    Column("PAUSED", lambda q: "yes" if q.paused else "no", whole=True),
    Column("MAX", _some("max_running"), whole=True),
    Column("RATE", _rate),
    Column("SCHED", lambda q: q.scheduled_count, whole=True),
    Column("QUEUED", lambda q: q.queued_count, whole=True),
    Column("RUN", lambda q: q.running_count, whole=True),
    Column("RETRY", lambda q: q.retrying_count, whole=True),
    Column("READY", _count("ready_message_count"), whole=True),
    Column("UNACK", lambda q: q.unacknowledged_message_count, whole=True),
    Column(
        "OLDEST",
        lambda q: span(q.oldest_queued_age) if q.HasField("oldest_queued_age") else "-",
        whole=True,
    ),
    Column("WORKERS", lambda q: q.live_worker_count, whole=True),
)
WORKERS = (
    Column("WORKER_ID", lambda w: w.worker_id, whole=True),
    Column("HOST", lambda w: w.host),
    Column("PID", lambda w: w.pid, whole=True),
    Column("VERSION", lambda w: w.version),
    Column("QUEUES", lambda w: ",".join(w.queues)),
    Column("SLOTS", lambda w: f"{len(w.running_job_ids)}/{w.concurrency}", whole=True),
    Column("UP", _age_of("start_time"), whole=True),
    Column("SEEN", _age_of("last_heartbeat_time"), whole=True),
)
FAILURES = (
    Column("TYPE", lambda g: g.job_type),
    Column("ERROR", lambda g: g.error_type),
    Column("JOBS", lambda g: g.job_count, whole=True),
    Column("FIRST", _age_of("first_time"), whole=True),
    Column("LAST", _age_of("last_time"), whole=True),
    Column("SUCH_AS", lambda g: next(iter(g.sample_job_ids), "-"), whole=True),
)
SCHEDULES = (
    Column("SCHEDULE", lambda s: s.schedule_id),
    Column("CRON", lambda s: s.cron),
    Column("ZONE", lambda s: s.time_zone),
    Column("TYPE", lambda s: s.request.job_type),
    Column("PAUSED", lambda s: "yes" if s.paused else "no", whole=True),
    Column("NEXT", _age_of("next_time"), whole=True),
    Column("LAST", _age_of("last_time"), whole=True),
)
