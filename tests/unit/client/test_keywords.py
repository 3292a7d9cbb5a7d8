"""A keyword that nobody knows is an error, wherever the client takes keywords."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from jobsvc.client import Client, new_filter, new_job

PROGRAM = """\
from jobsvc.client import Client

def submit(client: Client) -> str:
    client.submit("demo.echo", {}, idempotency="order-17")
    client.admin.delete_jobs(job_type=["none"], states=["SUCCEEDED"])
    return client.submit("demo.echo", {}, queue="slow").job.job_id
"""


def callables() -> dict[str, Callable[..., Any]]:
    """All of the client that takes more keywords than its signature writes out."""
    client = Client(channel=grpc.insecure_channel("127.0.0.1:1"))
    found: list[Callable[..., Any]] = [new_job, new_filter]
    for service in (client, client.admin, client.schedules):
        found += [
            member
            for name, member in inspect.getmembers(service, callable)
            if not name.startswith("_")
        ]
    return {
        each.__qualname__: each
        for each in found
        if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(each).parameters.values())
    }


@pytest.mark.parametrize("name", callables())
def test_an_unknown_keyword_is_a_type_error_at_the_call(name: str) -> None:
    call = callables()[name]
    required = [
        "x"
        for parameter in inspect.signature(call).parameters.values()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and parameter.default is parameter.empty
    ]
    with pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'typo'"):
        call(*required, typo=1)


def test_the_error_names_what_there_is() -> None:
    with pytest.raises(TypeError, match=r"'idempotency'; it takes .*\bidempotency_key\b"):
        new_job("demo.echo", {}, idempotency="order-17")  # type: ignore[call-arg]


def test_all_that_take_keywords_are_looked_at() -> None:
    assert {"Client.submit", "Client.run", "Client.watch_jobs", "Admin.delete_jobs"} <= set(
        callables()
    )


@pytest.mark.parametrize("text", ["job_types", "error_types", "states"])
def test_a_text_is_not_taken_for_a_list_of_letters(text: str) -> None:
    with pytest.raises(TypeError, match=rf"{text} is a list, not the text 'none'"):
        new_filter(**{text: "none"})  # type: ignore[arg-type]


def test_a_type_checker_sees_it_in_a_program_of_somebody_else(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    # Away from here, so that it finds the packages as installed ones.
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", program.name]
    told = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, check=False)
    assert told.stdout.count("error:") == 2, told.stdout + told.stderr
    assert 'program.py:4: error: Unexpected keyword argument "idempotency"' in told.stdout
    assert 'program.py:5: error: Unexpected keyword argument "job_type"' in told.stdout
