"""The `jobsvc` command. Exit codes: 0 fine, and for what follows a job to its end 0 SUCCEEDED,
1 FAILED, 3 CANCELLED; 2 usage; 4 the server said no, or could not be reached; 5 a wait for a result
ran out; 74 stdout could not be written.

Servers and workers are imported by the commands that start them: a client command is not to wait
for what it does not use.
"""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from jobsvc.cli import jobs, operators, output, processes, schedules
from jobsvc.client import CallFailed
from jobsvc.errors import DatabaseUnavailable, JobsvcError
from jobsvc.settings import SettingsError

FAILED = 1
USAGE = 2
REFUSED = 4

app = typer.Typer(
    help="A durable job service.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for commands in (processes.app, jobs.app, operators.app):
    app.add_typer(commands)
app.add_typer(operators.queues, name="queues")
app.add_typer(schedules.app, name="schedules")


def main() -> None:
    try:
        "".join(sys.argv).encode()
        app()
    except CallFailed as failed:
        output.note(str(failed))
        sys.exit(REFUSED)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(USAGE)
    except DatabaseUnavailable as error:
        _end(error.explained)
    except JobsvcError as error:
        _end(str(error))
    except UnicodeEncodeError:
        output.note("the command line is not UTF-8 text")
        sys.exit(USAGE)


def _end(why: str) -> NoReturn:
    """Says it last, behind what a server or worker has logged."""
    if telemetry := sys.modules.get("jobsvc.telemetry"):
        telemetry.flush()
    output.note(why)
    sys.exit(FAILED)
