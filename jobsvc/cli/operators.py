"""The commands for operators: queues, workers, failures."""

from __future__ import annotations

from typing import Annotated

import typer

from jobsvc.cli import inputs, output, tables
from jobsvc.cli.options import Connection, Output, Wanted, Watch, with_options
from jobsvc.cli.output import Format
from jobsvc.client import Client, QueueChanges
from jobsvc.client import Queue as QueueMessage
from jobsvc.core.states import JobState

app = typer.Typer()
queues = typer.Typer(help="List queues, pause and resume them, limit them.", no_args_is_help=True)

# What has failed and may matter still: neither SUCCEEDED nor CANCELLED.
UNRESOLVED = [state for state in JobState if state not in {JobState.SUCCEEDED, JobState.CANCELLED}]

QueueName = Annotated[str, typer.Argument(metavar="QUEUE", show_default=False)]


@app.command()
@with_options
def workers(server: Connection, watch: Watch = False, output_format: Output = None) -> None:
    """List the workers."""
    chosen = output.format_or_default(output_format)
    with server.open() as client:
        output.again_and_again(
            lambda: tables.show(client.admin.workers(), chosen, tables.WORKERS), watch
        )


@app.command()
@with_options
def failures(
    server: Connection, wanted: Wanted, watch: Watch = False, output_format: Output = None
) -> None:
    """Group failures by job type and error type, most jobs first: of jobs that have neither
    succeeded since nor been cancelled, unless --state says which."""
    chosen = output.format_or_default(output_format)
    options = wanted.options
    options.setdefault("states", UNRESOLVED)

    def show(client: Client) -> None:
        tables.show(client.admin.failures(**options), chosen, tables.FAILURES)

    with server.open() as client:
        output.again_and_again(lambda: show(client), watch)


@queues.command("list")
@with_options
def list_queues(server: Connection, watch: Watch = False, output_format: Output = None) -> None:
    """List the queues, and how much is in them."""
    chosen = output.format_or_default(output_format)
    with server.open() as client:
        output.again_and_again(
            lambda: tables.show(client.admin.queues(), chosen, tables.QUEUES), watch
        )


@queues.command()
@with_options
def pause(server: Connection, queue: QueueName, output_format: Output = None) -> None:
    """Start no more jobs of a queue; those that run go on."""
    with server.open() as client:
        _show_queue(client.admin.pause_queue(queue), output_format)


@queues.command()
@with_options
def resume(server: Connection, queue: QueueName, output_format: Output = None) -> None:
    """Start jobs of a queue again."""
    with server.open() as client:
        _show_queue(client.admin.resume_queue(queue), output_format)


@queues.command()
@with_options
def update(
    server: Connection,
    queue: QueueName,
    max_running: Annotated[
        int | None, typer.Option(metavar="N", help="How many may run at once; 0 = no limit.")
    ] = None,
    rate_limit: Annotated[
        str | None,
        typer.Option(metavar="N/SPAN", help="How many may start in a span: 100/1m; 0 = no limit."),
    ] = None,
    output_format: Output = None,
) -> None:
    """Limit a queue, over all workers."""
    changes = QueueChanges()
    if max_running is not None:
        changes["max_running"] = max_running
    if rate_limit is not None:
        changes["rate_limit"] = inputs.rate(rate_limit, "--rate-limit")
    if not changes:
        raise typer.BadParameter("say what to change: --max-running or --rate-limit")
    with server.open() as client:
        _show_queue(client.admin.update_queue(queue, **changes), output_format)


def _show_queue(queue: QueueMessage, output_format: Format | None) -> None:
    jobs = (queue.scheduled_count, queue.queued_count, queue.running_count, queue.retrying_count)
    if not any(jobs) and not queue.live_worker_count:
        # It was made by this, if it was a typo, as a queue may be held back before its first job.
        output.note(f"nobody consumes the queue {queue.name!r}, and no job is in it: is it meant?")
    output.resource(queue, output.format_or_default(output_format))
