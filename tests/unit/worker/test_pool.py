"""What holds for both kinds of pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Value

from jobsvc.core.attempts import (
    AttemptFailed,
    Claimed,
    Ending,
    Interrupted,
    Log,
    Output,
    Progress,
    Stopped,
    Succeeded,
)
from tests.harness.wait import until
from worker import registry
from worker.child.values import encode_result
from worker.pool import HandlersError, Pool, make_pool

from .recorder import Recorder, make_task

HANDLERS = "tests.unit.worker.sample_handlers"
ROOT = str(Path(__file__).parents[3])

Isolation = Literal["process", "thread"]
MakePool = Callable[[int], Pool]


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    yield recorder
    assert recorder.late == []
    assert all(len(endings) == 1 for endings in recorder.endings.values())


@pytest.fixture(params=["process", "thread"])
def make(request: pytest.FixtureRequest, recorder: Recorder) -> Iterator[MakePool]:
    pools: list[Pool] = []

    def make(size: int) -> Pool:
        isolation: Isolation = request.param
        pool = make_pool(isolation, size, [HANDLERS], recorder, {"PYTHONPATH": ROOT})
        pools.append(pool)
        pool.start()
        return pool

    yield make
    for pool in pools:
        pool.stop(0)


def waiter(directory: Path) -> dict[str, object]:
    return {"started": str(directory / "started"), "release": str(directory / "release")}


def test_the_job_types_are_announced(recorder: Recorder) -> None:
    for isolation in ("process", "thread"):
        pool = make_pool(isolation, 1, [HANDLERS], recorder, {"PYTHONPATH": ROOT})
        types = {info.name: info for info in pool.start()}
        pool.stop(0)
        assert "demo.echo" in types
        echo = types["t.echo"]
        assert echo.description == "Gives back what it got."
        assert (echo.timeout, echo.max_attempts, echo.queue) == (120, 5, "slow")


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_handlers_that_cannot_be_imported(isolation: Isolation, recorder: Recorder) -> None:
    module = "tests.unit.worker.broken_handlers"
    pool = make_pool(isolation, 2, [HANDLERS, module], recorder, {"PYTHONPATH": ROOT})
    with pytest.raises(HandlersError, match=rf"{module}'.*RuntimeError: broken on purpose"):
        pool.start()
    with pytest.raises(RuntimeError, match="stopped"):
        pool.submit([make_task("t.echo")])
    pool.stop(0)


def test_a_task_runs_to_its_result(make: MakePool, recorder: Recorder) -> None:
    pool = make(2)
    payload: dict[str, object] = {"n": 1, "text": "x" * 900_000}
    task = make_task("t.echo", payload)
    pool.submit([task])
    assert recorder.wait_ending(task) == Succeeded(encode_result(payload))
    assert recorder.started == [task.key]


def test_every_task_gets_one_outcome(make: MakePool, recorder: Recorder) -> None:
    pool = make(2)
    tasks = [make_task("t.echo", {"n": n}) for n in range(500)]
    for task in tasks:
        pool.submit([task])
    recorder.wait(lambda: len(recorder.endings) == 500)
    assert sorted(recorder.started) == sorted(task.key for task in tasks)
    for n, task in enumerate(tasks):
        assert recorder.endings[task.key] == [Succeeded(encode_result({"n": n}))]
    assert pool.average_run_seconds < 0.1


def test_tasks_start_in_order(make: MakePool, recorder: Recorder) -> None:
    pool = make(1)
    tasks = [make_task("t.echo") for _ in range(200)]
    for task in tasks:
        pool.submit([task])
    recorder.wait(lambda: len(recorder.endings) == 200)
    assert recorder.started == [task.key for task in tasks]


def test_reports_arrive_in_order_before_the_outcome(make: MakePool, recorder: Recorder) -> None:
    task = make_task("t.tell")
    make(1).submit([task])
    recorder.wait_ending(task)
    reports = recorder.reports[task.key]
    assert reports[0] == Log("WARNING", "first")
    assert reports[1] == Output(text="text")
    assert reports[2] == Output(data=b"\xff data")
    assert reports[-1] == Progress(1000, 1000, "going")
    assert len(reports) == 3 + 10


def test_a_progress_held_back_is_told_while_the_handler_runs(
    make: MakePool, recorder: Recorder, tmp_path: Path
) -> None:
    task = make_task("t.tell_and_wait", waiter(tmp_path))
    make(1).submit([task])
    recorder.wait(lambda: Progress(100, 0.0, "") in recorder.reports.get(task.key, []))
    assert task.key not in recorder.endings
    (tmp_path / "release").touch()
    assert isinstance(recorder.wait_ending(task), Succeeded)


def test_slots(make: MakePool, recorder: Recorder, tmp_path: Path) -> None:
    pool = make(2)
    until(lambda: pool.slots == 2, 20, "both are ready")
    task = make_task("t.wait", waiter(tmp_path))
    pool.submit([task])
    until((tmp_path / "started").exists, 20, "the handler runs")
    assert pool.slots == 2
    pool.abandon(task.key)
    recorder.wait_ending(task)
    # A thread stays with its handler; a process is killed, and another started.
    assert pool.slots == 1
    (tmp_path / "release").touch()
    until(lambda: pool.slots == 2, 20, "both are ready again")


def test_cancelling_what_has_not_started(
    make: MakePool, recorder: Recorder, tmp_path: Path
) -> None:
    pool = make(1)
    running, waiting = make_task("t.wait", waiter(tmp_path)), make_task("t.echo")
    pool.submit([running])
    pool.submit([waiting])
    recorder.wait_started(running)
    pool.cancel(waiting.key)
    assert recorder.wait_ending(waiting) == Stopped()
    assert waiting.key not in recorder.started
    assert running.key not in recorder.endings


@pytest.mark.parametrize("raises", [False, True])
def test_cancelling_a_handler_that_heeds(
    make: MakePool, recorder: Recorder, tmp_path: Path, raises: bool
) -> None:
    pool = make(1)
    seen = tmp_path / "seen"
    task = make_task("t.wait_for_cancel", {"seen": str(seen), "raise": raises})
    pool.submit([task])
    recorder.wait_report(task)
    pool.cancel(task.key)
    assert recorder.wait_ending(task) == Stopped()
    after = make_task("t.echo")
    pool.submit([after])
    assert isinstance(recorder.wait_ending(after), Succeeded)
    assert seen.exists()


def test_what_is_unknown_or_over_cannot_be_cancelled(make: MakePool, recorder: Recorder) -> None:
    pool = make(1)
    task = make_task("t.echo")
    pool.submit([task])
    assert isinstance(recorder.wait_ending(task), Succeeded)
    for token in (task.key, ("nobody", "nothing")):
        pool.cancel(token)
        pool.abandon(token)
    after = make_task("t.echo")
    pool.submit([after])
    assert isinstance(recorder.wait_ending(after), Succeeded)


def test_a_timeout(make: MakePool, recorder: Recorder, tmp_path: Path) -> None:
    pool = make(1)
    task = make_task("t.wait", waiter(tmp_path), timeout=0.3)
    pool.submit([task])
    ending = recorder.wait_ending(task)
    assert isinstance(ending, AttemptFailed)
    assert (ending.error.type, ending.error.retryable) == ("TIMEOUT", True)
    assert "0.3 s" in ending.error.message
    (tmp_path / "release").touch()  # a thread cannot be killed, and has to end by itself
    after = make_task("t.echo")
    pool.submit([after])
    assert isinstance(recorder.wait_ending(after), Succeeded)


def test_withdrawing(make: MakePool, recorder: Recorder, tmp_path: Path) -> None:
    pool = make(1)
    running = make_task("t.wait", waiter(tmp_path))
    pool.submit([running])
    recorder.wait_started(running)
    waiting = [make_task("t.echo") for _ in range(3)]
    for task in waiting:
        pool.submit([task])
    assert pool.withdraw(60.0) == []
    assert pool.withdraw(0.0) == waiting
    assert pool.withdraw(0.0) == []
    (tmp_path / "release").touch()
    assert isinstance(recorder.wait_ending(running), Succeeded)
    pool.stop(1)
    assert list(recorder.endings) == [running.key]


def test_what_could_not_start_says_that_runs_are_long(
    make: MakePool, recorder: Recorder, tmp_path: Path
) -> None:
    """Short ones have ended; a long one takes the slot, and nobody is to claim ahead for it."""
    pool = make(1)
    for task in (short := [make_task("t.echo") for _ in range(60)]):
        pool.submit([task])
    recorder.wait(lambda: len(recorder.endings) == len(short))
    pool.submit([running := make_task("t.wait", waiter(tmp_path))])
    recorder.wait_started(running)
    before = pool.average_run_seconds
    assert pool.withdraw(before) == []
    assert pool.average_run_seconds == before
    pool.submit([make_task("t.echo")])
    until(lambda: pool.withdraw(2 * before), 10, "a task has waited for too long")
    assert pool.average_run_seconds >= 2 * before
    (tmp_path / "release").touch()
    assert isinstance(recorder.wait_ending(running), Succeeded)


def test_stopping_waits_for_what_runs(make: MakePool, recorder: Recorder, tmp_path: Path) -> None:
    pool = make(1)
    running, waiting = make_task("t.wait", waiter(tmp_path)), make_task("t.echo")
    pool.submit([running])
    pool.submit([waiting])
    recorder.wait_started(running)
    (tmp_path / "release").touch()
    pool.stop(20)
    assert isinstance(recorder.endings[running.key][0], Succeeded)
    # It had started, or is given back.
    assert isinstance(recorder.endings[waiting.key][0], Succeeded | Interrupted)
    with pytest.raises(RuntimeError, match="stopped"):
        pool.submit([make_task("t.echo")])
    pool.stop(0)


def test_stopping_interrupts_what_does_not_end(
    make: MakePool, recorder: Recorder, tmp_path: Path
) -> None:
    pool = make(1)
    running, waiting = make_task("t.wait", waiter(tmp_path)), make_task("t.echo")
    pool.submit([running])
    pool.submit([waiting])
    recorder.wait_started(running)
    pool.stop(0.05)
    assert recorder.endings == {
        waiting.key: [Interrupted()],
        running.key: [Interrupted()],
    }
    (tmp_path / "release").touch()


def test_abandoning(make: MakePool, recorder: Recorder, tmp_path: Path) -> None:
    pool = make(1)
    task = make_task("t.wait", waiter(tmp_path))
    pool.submit([task])
    recorder.wait_started(task)
    pool.abandon(task.key)
    assert recorder.wait_ending(task) == Interrupted()
    (tmp_path / "release").touch()
    after = make_task("t.echo")
    pool.submit([after])
    assert isinstance(recorder.wait_ending(after), Succeeded)


def test_a_listener_that_raises_stops_nothing(make: MakePool, recorder: Recorder) -> None:
    pool = make(1)
    told: list[str] = []

    def fail(tasks: Sequence[Claimed]) -> None:
        told.append("started")
        raise RuntimeError("the listener is broken")

    recorder.on_started = fail  # type: ignore[method-assign]
    for _ in range(2):
        task = make_task("t.echo")
        pool.submit([task])
        assert isinstance(recorder.wait_ending(task), Succeeded)
    assert told == ["started", "started"]


def test_a_lost_lease_is_seen_in_a_thread(recorder: Recorder, tmp_path: Path) -> None:
    seen: list[bool] = []
    pool = make_pool("thread", 1, [HANDLERS], recorder)
    pool.start()
    handler = registry.find("t.wait_for_cancel")
    assert handler is not None
    task = make_task("t.wait_for_cancel", {"seen": str(tmp_path / "seen")})
    pool.submit([task])
    recorder.wait_report(task)
    _, context = pool._running[task.key]  # type: ignore[attr-defined]
    pool.abandon(task.key)
    seen.append(context.lease_lost)
    assert seen == [True]
    pool.stop(5)


def test_async_handlers_share_one_loop(make: MakePool, recorder: Recorder) -> None:
    pool = make(1)
    first, *others = [result(run(pool, recorder, make_task("t.loop"))) for _ in range(3)]
    assert others == [first, first]  # the same process, and nothing left on the loop


@pytest.mark.parametrize("how", [("t.loop", {"exit": True}), ("t.heedless_task", {})])
def test_a_loop_that_is_not_free_is_not_used_again(
    make: MakePool, recorder: Recorder, how: tuple[str, dict[str, object]]
) -> None:
    pool = make(1)
    before = result(run(pool, recorder, make_task("t.loop")))
    run(pool, recorder, make_task(*how))
    after = result(run(pool, recorder, make_task("t.loop")))
    assert after["others"] == before["others"]


def test_a_cancel_is_raised_in_an_async_handler(
    make: MakePool, recorder: Recorder, tmp_path: Path
) -> None:
    pool = make(1)
    seen = tmp_path / "seen"
    task = make_task("t.sleep_async", {"seen": str(seen)})
    pool.submit([task])
    recorder.wait_report(task)
    pool.cancel(task.key)
    assert recorder.wait_ending(task) == Stopped()
    until(seen.exists, 20, "its finally runs")
    assert isinstance(run(pool, recorder, make_task("t.echo")), Succeeded)


def run(pool: Pool, recorder: Recorder, task: Claimed) -> Ending:
    pool.submit([task])
    return recorder.wait_ending(task)


def result(ending: Ending) -> dict[str, object]:
    assert isinstance(ending, Succeeded), ending
    value: dict[str, object] = MessageToDict(Value.FromString(ending.result.data))
    return value
