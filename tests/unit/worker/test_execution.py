"""From a handler's end, whatever it is, to one ending."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import BaseModel, Field

import worker.echo  # noqa: F401 - into the registry that all tests share
from jobsvc.core.attempts import (
    AttemptFailed,
    Claimed,
    Ending,
    Input,
    Report,
    Snoozed,
    Stopped,
    Succeeded,
)
from worker import Abort, Blob, JobCancelled, JobContext, job, registry
from worker.child import execution
from worker.child.execution import AttemptContext, run
from worker.child.values import encode_result
from worker.registry import HandlersError, load

from . import sample_handlers
from .recorder import make_task

HERE = "tests.unit.worker"


@pytest.fixture(autouse=True)
def loop_is_closed() -> Iterator[None]:
    yield
    execution.close()


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_definitions", dict(registry._definitions))


def ending_of(task: Claimed, *, cancel: bool = False) -> Ending:
    reports: list[Report] = []
    context = AttemptContext(task, reports.append)
    if cancel:
        context.ask_to_stop()
    ending = run(task, context)
    context.log("too late")
    assert reports == []
    return ending


def failure_of(task: Claimed) -> AttemptFailed:
    ending = ending_of(task)
    assert isinstance(ending, AttemptFailed)
    return ending


@pytest.mark.parametrize("job_type", ["t.echo", "t.echo_async"])
def test_success(job_type: str) -> None:
    payload: dict[str, object] = {"n": 3, "items": [1.5, None, {"a": "b"}]}
    assert ending_of(make_task(job_type, payload)) == Succeeded(encode_result(payload))


@pytest.mark.parametrize(
    "error",
    ["SystemExit", "KeyboardInterrupt", "GeneratorExit", "CancelledError", "MemoryError"],
)
def test_whatever_is_raised_is_a_failure(error: str) -> None:
    failed = failure_of(make_task("t.raise", {"error": error}))
    assert failed.error.type == error
    assert failed.error.retryable
    assert failed.retry_after is None
    assert "sample_handlers.py" in failed.error.traceback
    assert "execution.py" not in failed.error.traceback


async def raise_in_a_loop(payload: dict[str, Any]) -> None:
    sample_handlers.raise_it(payload)


@pytest.mark.parametrize("error", ["SystemExit", "KeyboardInterrupt", "GeneratorExit"])
def test_whatever_a_coroutine_raises_is_a_failure(error: str) -> None:
    job("t.raise_async")(raise_in_a_loop)
    assert failure_of(make_task("t.raise_async", {"error": error})).error.type == error


def test_an_error_that_cannot_be_printed() -> None:
    failed = failure_of(make_task("t.raise", {"error": "UnprintableError"}))
    assert failed.error.type == "UnprintableError"
    assert "SystemExit" in failed.error.message
    assert "sample_handlers.py" in failed.error.traceback


def test_an_error_that_is_too_long() -> None:
    failed = failure_of(make_task("t.raise", {"error": "ValueError"}))
    assert failed.error.message == "x" * 4096
    assert len(failed.error.traceback) <= 32 * 1024
    assert "raise errors[" in failed.error.traceback


def recurse(payload: dict[str, Any]) -> None:
    recurse(payload)


def test_a_recursion_without_end() -> None:
    job("t.recurse")(recurse)
    failed = failure_of(make_task("t.recurse"))
    assert failed.error.type == "RecursionError"
    assert 0 < len(failed.error.traceback) <= 32 * 1024


def abort(payload: dict[str, Any]) -> None:
    raise Abort("no such user")


def test_exceptions_that_say_more() -> None:
    job("t.abort")(abort)
    aborted = failure_of(make_task("t.abort"))
    assert (aborted.error.type, aborted.error.message) == ("Abort", "no such user")
    assert not aborted.error.retryable
    retried = failure_of(make_task("t.raise", {"error": "Retry"}))
    assert (retried.error.type, retried.error.retryable) == ("Retry", True)
    assert retried.retry_after == 60
    assert ending_of(make_task("t.raise", {"error": "Snooze"})) == Snoozed(30)


def give_a_handle(payload: dict[str, Any]) -> object:
    return object()


def give_too_much(payload: dict[str, Any]) -> str:
    return "x" * 50_000_000


def give_a_generator(payload: dict[str, Any]) -> Any:
    return (number for number in range(1))


@pytest.mark.parametrize(
    ("function", "error_type"),
    [
        (give_a_handle, "RESULT_INVALID"),
        (give_a_generator, "RESULT_INVALID"),
        (give_too_much, "RESULT_TOO_LARGE"),
    ],
)
def test_results_that_cannot_be_kept(function: Any, error_type: str) -> None:
    job("t.give")(function)
    failed = failure_of(make_task("t.give"))
    assert (failed.error.type, failed.error.retryable) == (error_type, False)


class Order(BaseModel):
    amount: int = Field(strict=True, gt=0)
    token: bytes = b""


def take_order(payload: Order) -> int:
    return payload.amount


def take_blob(payload: bytes) -> Blob:
    return Blob(payload[::-1], "text/plain")


def test_a_model_is_validated() -> None:
    job("t.order")(take_order)
    succeeded = ending_of(make_task("t.order", {"amount": 3, "token": "abc"}))
    assert succeeded == Succeeded(encode_result(3))
    failed = failure_of(make_task("t.order", {"amount": -98765}))
    assert (failed.error.type, failed.error.retryable) == ("INVALID_PAYLOAD", False)
    assert failed.error.message == "payload.amount: Input should be greater than 0"


def test_blobs_go_where_they_are_expected() -> None:
    job("t.blob")(take_blob)
    blob = make_task("t.blob", b"abc", content_type="text/csv")
    assert ending_of(blob) == Succeeded(Input(b"cba", "text/plain"))
    for task in (
        make_task("t.blob", {}),
        make_task("t.echo", b"abc", content_type="text/csv"),
        make_task("t.echo", b"\xff\xff"),
    ):
        assert failure_of(task).error.type == "INVALID_PAYLOAD"


def test_the_echo_of_the_service_gives_back_either() -> None:
    load([])
    payload: dict[str, object] = {"a": [1, {"b": None}]}
    assert ending_of(make_task("demo.echo", payload)) == Succeeded(encode_result(payload))
    blob = make_task("demo.echo", b"\0\1", content_type="image/png")
    assert ending_of(blob) == Succeeded(Input(b"\0\1", "image/png"))


def test_an_unknown_job_type_can_be_retried_elsewhere() -> None:
    failed = failure_of(make_task("t.nobody"))
    assert (failed.error.type, failed.error.retryable) == ("UNKNOWN_JOB_TYPE", True)


def stop(payload: dict[str, Any], ctx: JobContext) -> None:
    raise JobCancelled


@pytest.mark.parametrize("job_type", ["t.echo", "t.raise", "t.stop"])
def test_who_was_asked_to_stop_is_cancelled(job_type: str) -> None:
    job("t.stop")(stop)
    task = make_task(job_type, {"error": "MemoryError"})
    assert ending_of(task, cancel=True) == Stopped()


def test_stopping_without_being_asked_is_a_failure() -> None:
    job("t.stop")(stop)
    assert failure_of(make_task("t.stop")).error.type == "JobCancelled"


def test_loading_names_the_module_that_fails() -> None:
    told = r"broken_handlers'.*RuntimeError: broken on purpose \(.*/broken_handlers\.py, line 3\)"
    with pytest.raises(HandlersError, match=told):
        load([f"{HERE}.broken_handlers"])
    with pytest.raises(HandlersError, match=r"'no\.such': ModuleNotFoundError: .*'no'$"):
        load(["no.such"])


class Unschemable(BaseModel):
    call: Callable[[], int]


def take_unschemable(payload: Unschemable) -> None: ...


def test_loading_names_the_type_without_a_schema() -> None:
    job("t.unschemable")(take_unschemable)
    with pytest.raises(HandlersError, match=r"'t\.unschemable' .*take_unschemable"):
        load([])
