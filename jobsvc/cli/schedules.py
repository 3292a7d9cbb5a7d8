"""The commands for schedules."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from jobsvc.cli import inputs, output, tables
from jobsvc.cli.options import (
    Connection,
    JobType,
    Json,
    Label,
    Output,
    Priority,
    Queue,
    Watch,
    checked,
    with_options,
)
from jobsvc.client import JobOptions, MissedTicks, Overlap, Schedule, new_job

app = typer.Typer(help="Jobs that recur.", no_args_is_help=True)


class Missed(StrEnum):
    SKIP = "skip"
    RUN_ONCE = "run-once"


class Overlapping(StrEnum):
    ALLOW = "allow"
    SKIP = "skip"


_MISSED = {
    Missed.SKIP: MissedTicks.MISSED_TICKS_SKIP,
    Missed.RUN_ONCE: MissedTicks.MISSED_TICKS_RUN_ONCE,
}
_OVERLAP = {
    Overlapping.ALLOW: Overlap.OVERLAP_ALLOW,
    Overlapping.SKIP: Overlap.OVERLAP_SKIP,
}

ScheduleId = Annotated[str, typer.Argument(metavar="SCHEDULE_ID", show_default=False)]
Cron = Annotated[
    str,
    typer.Argument(metavar="CRON", help="Minute, hour, day, month, weekday.", show_default=False),
]
TimeZone = Annotated[str, typer.Option(metavar="ZONE", help="Such as Europe/Berlin.")]


@app.command("list")
@with_options
def list_schedules(server: Connection, watch: Watch = False, output_format: Output = None) -> None:
    """List the schedules."""
    chosen = output.format_or_default(output_format)
    with server.open() as client:
        output.again_and_again(
            lambda: tables.show(client.schedules.list(), chosen, tables.SCHEDULES), watch
        )


@app.command()
@with_options
def get(server: Connection, schedule_id: ScheduleId, output_format: Output = None) -> None:
    """Print a schedule."""
    with server.open() as client:
        output.resource(client.schedules.get(schedule_id), output.format_or_default(output_format))


@app.command()
@with_options
def create(
    server: Connection,
    schedule_id: ScheduleId,
    cron: Cron,
    job_type: JobType,
    json: Json = None,
    time_zone: TimeZone = "UTC",
    queue: Queue = "",
    priority: Priority = 0,
    label: Label = None,
    missed_ticks: Annotated[
        Missed, typer.Option(help="What happens to ticks while no server ran.")
    ] = Missed.SKIP,
    overlap: Annotated[
        Overlapping, typer.Option(help="What happens while the last job has not ended.")
    ] = Overlapping.ALLOW,
    paused: Annotated[bool, typer.Option("--paused", help="Submit nothing yet.")] = False,
    output_format: Output = None,
) -> None:
    """Submit a job again and again."""
    payload = inputs.payload(json)
    options = JobOptions(queue=queue, priority=priority, labels=inputs.labels(label or []))
    schedule = Schedule(
        schedule_id=schedule_id,
        cron=cron,
        time_zone=time_zone,
        request=checked(lambda: new_job(job_type, payload, **options)),
        missed_ticks=_MISSED[missed_ticks],
        overlap=_OVERLAP[overlap],
        paused=paused,
    )
    with server.open() as client:
        made = client.schedules.create(schedule)
    output.resource(made, output.format_or_default(output_format))


@app.command()
@with_options
def update(
    server: Connection,
    schedule_id: ScheduleId,
    cron: Annotated[str | None, typer.Option(metavar="CRON")] = None,
    time_zone: Annotated[str | None, typer.Option(metavar="ZONE")] = None,
    payload: Annotated[
        str | None, typer.Option(metavar="JSON", help="In place of the payload; @FILE or -.")
    ] = None,
    missed_ticks: Missed | None = None,
    overlap: Overlapping | None = None,
    paused: Annotated[bool | None, typer.Option("--pause/--resume")] = None,
    etag: Annotated[str, typer.Option(help="Refuse if it has changed since this was read.")] = "",
    output_format: Output = None,
) -> None:
    """Change a schedule."""
    changed = Schedule(schedule_id=schedule_id, etag=etag)
    paths = []
    for name, value in (("cron", cron), ("time_zone", time_zone), ("paused", paused)):
        if value is not None:
            setattr(changed, name, value)
            paths.append(name)
    if missed_ticks is not None:
        changed.missed_ticks = _MISSED[missed_ticks]
        paths.append("missed_ticks")
    if overlap is not None:
        changed.overlap = _OVERLAP[overlap]
        paths.append("overlap")
    with server.open() as client:
        if payload is not None:
            found = inputs.payload(payload)
            before = client.schedules.get(schedule_id)
            changed.request.CopyFrom(before.request)
            new = new_job(before.request.job_type, found)
            changed.request.payload.CopyFrom(new.payload)
            changed.etag = etag or before.etag
            paths.append("request")
        if not paths:
            raise typer.BadParameter("say what to change, for example --cron or --pause")
        after = client.schedules.update(changed, paths)
    output.resource(after, output.format_or_default(output_format))


@app.command()
@with_options
def delete(server: Connection, schedule_id: ScheduleId) -> None:
    """Delete a schedule; its jobs stay."""
    with server.open() as client:
        client.schedules.delete(schedule_id)


@app.command()
@with_options
def trigger(server: Connection, schedule_id: ScheduleId, output_format: Output = None) -> None:
    """Submit one job of a schedule now."""
    with server.open() as client:
        output.resource(
            client.schedules.trigger(schedule_id), output.format_or_default(output_format)
        )
