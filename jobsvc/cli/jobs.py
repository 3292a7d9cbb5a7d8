"""The commands for jobs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Annotated

import typer

from jobsvc.cli import inputs, output, tables
from jobsvc.cli.options import (
    After,
    Connection,
    Delay,
    JobId,
    JobType,
    Json,
    Key,
    Label,
    Output,
    Priority,
    Queue,
    Reason,
    SomeJobId,
    Wanted,
    Watch,
    with_options,
)
from jobsvc.cli.output import Format
from jobsvc.cli.waiting import Patience
from jobsvc.client import (
    BulkResponse,
    Client,
    FilterOptions,
    GetResultResponse,
    JobChanges,
    JobOptions,
    is_terminal,
)

app = typer.Typer()

Limit = Annotated[int, typer.Option(min=0, metavar="N", help="How many at most; 0 = all.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Count what matches, change nothing.")]
MaxCount = Annotated[int, typer.Option(metavar="N", help="How many jobs at most; 0 for 10,000.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask, on a terminal, whether to go on.")]


NOT_ENDED = 5  # of a wait that ran out
BULK_HELP = "One job by its id, or all that the options name."


@app.command()
@with_options
def submit(
    server: Connection,
    job_type: JobType,
    json: Json = None,
    queue: Queue = "",
    priority: Priority = 0,
    delay: Delay = None,
    key: Key = "",
    label: Label = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Print the result once it is there.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job to its end.")] = False,
    output_format: Output = None,
) -> None:
    """Submit a job and print its id."""
    if wait and watch:
        raise typer.BadParameter("give --wait or --watch, not both")
    payload = inputs.payload(json)
    options = _job_options(queue, priority, delay, key, label)
    with server.open() as client:
        job = client.submit(job_type, payload, **options).job
        as_json = output_format is Format.JSON
        if wait:
            output.note(job.job_id)
            with Patience(client) as patience:
                patience.start(job.job_id)
                found = client.wait(job.job_id)
            raise typer.Exit(_print_result(found, as_json))
        if watch and as_json:
            output.note(job.job_id)
        elif as_json:
            output.resource(job, Format.JSON)
        else:
            output.line(job.job_id)
        if watch:
            raise typer.Exit(_follow(client, job.job_id, 0, output_format or Format.TABLE))


@app.command()
@with_options
def run(
    server: Connection,
    job_type: JobType,
    json: Json = None,
    queue: Queue = "",
    priority: Priority = 0,
    delay: Delay = None,
    key: Key = "",
    label: Label = None,
    output_format: Output = None,
) -> None:
    """Submit a job, follow it to its end and print its result."""
    payload = inputs.payload(json)
    options = _job_options(queue, priority, delay, key, label)
    chosen = output.format_or_default(output_format)
    result = GetResultResponse()
    with server.open() as client, output.following(chosen) as view, Patience(client) as patience:
        for message in client.run(job_type, payload, **options):
            if isinstance(message, GetResultResponse):
                result = message
                break
            if message.sequence == 1:
                output.note(message.job_id)
            patience.heard(message)
            view.show(message)
    raise typer.Exit(_print_result(result, chosen is Format.JSON))


@app.command()
@with_options
def get(
    server: Connection,
    job_id: JobId,
    output_format: Output = None,
) -> None:
    """Print a job as it stands."""
    with server.open() as client:
        output.resource(client.get(job_id), output.format_or_default(output_format))


@app.command()
@with_options
def watch(
    server: Connection,
    wanted: Wanted,
    job_id: SomeJobId = None,
    after_sequence: After = 0,
    resume_token: Annotated[
        str, typer.Option(metavar="TOKEN", help="Without a job: go on where this one stood.")
    ] = "",
    output_format: Output = None,
) -> None:
    """Follow a job to its end; without one, every job that the options name, from now on."""
    chosen = output.format_or_default(output_format)
    options = wanted.options
    if job_id is None and after_sequence:
        raise typer.BadParameter("goes with a JOB_ID", param_hint="--after-sequence")
    if job_id is not None and (options or resume_token):
        raise typer.BadParameter("give a JOB_ID or options that name jobs, not both")
    with server.open() as client:
        if job_id is not None:
            raise typer.Exit(_follow(client, job_id, after_sequence, chosen))
        try:
            for event, token in client.watch_jobs(resume_token, **options):
                resume_token = token
                if event is not None:
                    output.events([event], chosen, with_job=True)
        finally:
            if resume_token:
                output.note(f"to go on from here: --resume-token {resume_token}")


@app.command()
@with_options
def events(
    server: Connection,
    job_id: JobId,
    after_sequence: After = 0,
    output_format: Output = None,
) -> None:
    """Print a job's history so far."""
    with server.open() as client:
        output.events(
            client.events(job_id, after_sequence), output.format_or_default(output_format)
        )


@app.command()
@with_options
def result(
    server: Connection,
    job_id: JobId,
    wait: Annotated[
        str | None, typer.Option(metavar="SPAN", help="Wait that long for the job to end.")
    ] = None,
    output_format: Output = None,
) -> None:
    """Print how a job ended. Exit code 5 where it has not, after --wait."""
    seconds = inputs.span(wait, "--wait") or 0.0
    with server.open() as client:
        found = client.result(job_id, seconds)
    as_json = output.format_or_default(output_format) is Format.JSON
    code = _print_result(found, as_json)
    raise typer.Exit(NOT_ENDED if seconds and not is_terminal(found.state) else code)


@app.command("list")
@with_options
def list_jobs(
    server: Connection,
    wanted: Wanted,
    full: Annotated[
        bool, typer.Option("--full", help="With payloads and tracebacks, as JSON.")
    ] = False,
    limit: Limit = 50,
    watch: Watch = False,
    output_format: Output = None,
) -> None:
    """List jobs, newest first."""
    chosen = Format.JSON if full else output.format_or_default(output_format)
    size = min(limit, 1000) or 1000

    def show(client: Client) -> None:
        found = client.jobs(full=full, page_size=size, **wanted.options)
        tables.show(islice(found, limit or None), chosen, tables.JOBS)

    with server.open() as client:
        output.again_and_again(lambda: show(client), watch)


@app.command()
@with_options
def explain(server: Connection, job_id: JobId, output_format: Output = None) -> None:
    """Say why a job is not running."""
    with server.open() as client:
        output.resource(client.explain(job_id), output.format_or_default(output_format))


@app.command()
@with_options
def update(
    server: Connection,
    job_id: JobId,
    priority: Annotated[int | None, typer.Option(help="0 to 9; greater goes first.")] = None,
    schedule_time: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="2026-01-31T12:00:00Z, a span ahead such as 2h, or now."),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="K=V", help="In place of all there are; may be repeated."),
    ] = None,
    no_labels: Annotated[bool, typer.Option("--no-labels", help="Take all labels away.")] = False,
    output_format: Output = None,
) -> None:
    """Change a job that waits."""
    changes = JobChanges()
    if priority is not None:
        changes["priority"] = priority
    if (moment := inputs.moment(schedule_time, "--schedule-time", ahead=True)) is not None:
        changes["schedule_time"] = moment
    if label or no_labels:
        changes["labels"] = inputs.labels(label or [])
    if label and no_labels:
        raise typer.BadParameter("give --label or --no-labels, not both")
    if not changes:
        raise typer.BadParameter("say what to change: --priority, --schedule-time or --label")
    with server.open() as client:
        job = client.update(job_id, **changes)
    output.resource(job, output.format_or_default(output_format))


@app.command(help=f"Cancel waiting jobs, and ask running ones to stop. {BULK_HELP}")
@with_options
def cancel(
    server: Connection,
    wanted: Wanted,
    job_id: SomeJobId = None,
    reason: Reason = "",
    dry_run: DryRun = False,
    max_count: MaxCount = 0,
    yes: Yes = False,
    output_format: Output = None,
) -> None:
    chosen = output.format_or_default(output_format)
    options = wanted.options
    with server.open() as client:
        if _one(job_id, options):
            output.resource(client.cancel(job_id or "", reason), chosen)
            return
        bulk = partial(client.admin.cancel_jobs, reason=reason, max_count=max_count, **options)
        _change_many("cancel", bulk, dry_run, yes, chosen)


@app.command(help=f"Run failed or cancelled jobs again, with fresh attempts. {BULK_HELP}")
@with_options
def retry(
    server: Connection,
    wanted: Wanted,
    job_id: SomeJobId = None,
    dry_run: DryRun = False,
    max_count: MaxCount = 0,
    yes: Yes = False,
    output_format: Output = None,
) -> None:
    chosen = output.format_or_default(output_format)
    options = wanted.options
    with server.open() as client:
        if _one(job_id, options):
            output.resource(client.retry(job_id or ""), chosen)
            return
        bulk = partial(client.admin.retry_jobs, max_count=max_count, **options)
        _change_many("retry", bulk, dry_run, yes, chosen)


@app.command(help=f"Delete ended jobs with their events and results. {BULK_HELP}")
@with_options
def delete(
    server: Connection,
    wanted: Wanted,
    job_id: SomeJobId = None,
    dry_run: DryRun = False,
    max_count: MaxCount = 0,
    yes: Yes = False,
    output_format: Output = None,
) -> None:
    chosen = output.format_or_default(output_format)
    options = wanted.options
    with server.open() as client:
        if _one(job_id, options):
            client.delete(job_id or "")
            return
        bulk = partial(client.admin.delete_jobs, max_count=max_count, **options)
        _change_many("delete", bulk, dry_run, yes, chosen)


@app.command()
@with_options
def types(server: Connection, output_format: Output = None) -> None:
    """List the job types that workers have announced."""
    with server.open() as client:
        tables.show(client.job_types(), output.format_or_default(output_format), tables.TYPES)


def _one(job_id: str | None, options: FilterOptions) -> bool:
    """Whether one job is meant, rather than all that match."""
    if job_id is not None and options:
        raise typer.BadParameter("give a JOB_ID or options that name jobs, not both")
    if job_id is None and not options:
        raise typer.BadParameter("give a JOB_ID, or options that name jobs")
    return job_id is not None


def _change_many(
    what: str, bulk: Callable[..., BulkResponse], dry_run: bool, yes: bool, chosen: Format
) -> None:
    """On a terminal it counts first, and asks."""
    if not dry_run and not yes and sys.stdin.isatty() and sys.stdout.isatty():
        answer = bulk(dry_run=True)
        more = " and more" if answer.more else ""
        typer.confirm(f"{what} {answer.matched_count}{more} jobs?", abort=True)
    output.resource(bulk(dry_run=dry_run), chosen)


def _job_options(
    queue: str, priority: int, delay: str | None, key: str, label: list[str] | None
) -> JobOptions:
    options = JobOptions(
        queue=queue, priority=priority, idempotency_key=key, labels=inputs.labels(label or [])
    )
    seconds = inputs.span(delay, "--delay")
    if seconds is not None:
        options["delay"] = seconds
    return options


def _print_result(result: GetResultResponse, as_json: bool) -> int:
    """The exit code."""
    if as_json:
        output.resource(result, Format.JSON)
    else:
        output.outcome(result)
    return output.exit_code(result.state)


def _follow(client: Client, job_id: str, after_sequence: int, chosen: Format) -> int:
    """The exit code, once the job has ended."""
    state = 0
    with output.following(chosen) as view, Patience(client) as patience:
        for event in client.watch(job_id, after_sequence):
            patience.heard(event)
            view.show(event)
            state = event.state
    if not is_terminal(state):  # the last event was seen already
        state = client.result(job_id).state
    return output.exit_code(state)
