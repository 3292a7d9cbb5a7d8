"""What only child processes can promise: that whatever a handler does hits its own job alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import psutil
import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Value

from jobsvc.core.attempts import AttemptFailed, Claimed, Ending, Interrupted, Stopped, Succeeded
from tests.harness.wait import until
from worker.child.values import encode_result
from worker.pool import HandlersError, ProcessPool
from worker.pool import child as child_module
from worker.pool import process as process_module
from worker.pool.base import Run
from worker.pool.child import Child, ChildLimits

from .recorder import Recorder, make_task

HANDLERS = "tests.unit.worker.sample_handlers"
ROOT = str(Path(__file__).parents[3])

MakePool = Callable[..., ProcessPool]


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    yield recorder
    assert recorder.late == []
    assert all(len(endings) == 1 for endings in recorder.endings.values())


@pytest.fixture
def make(recorder: Recorder) -> Iterator[MakePool]:
    pools: list[ProcessPool] = []

    def make(
        size: int = 1, cancel_grace_seconds: float = 0.1, limits: ChildLimits | None = None
    ) -> ProcessPool:
        pool = ProcessPool(
            size,
            [HANDLERS],
            recorder,
            {"PYTHONPATH": ROOT},
            limits,
            cancel_grace_seconds=cancel_grace_seconds,
        )
        pools.append(pool)
        pool.start()
        return pool

    yield make
    for pool in pools:
        pool.stop(0)
    assert psutil.Process().children(recursive=True) == []


def run(pool: ProcessPool, recorder: Recorder, task: Claimed) -> Ending:
    pool.submit([task])
    return recorder.wait_ending(task)


def result(ending: Ending) -> dict[str, object]:
    assert isinstance(ending, Succeeded)
    value: dict[str, object] = MessageToDict(Value.FromString(ending.result.data))
    return value


def waiter(directory: Path, name: str = "") -> dict[str, object]:
    return {
        "started": str(directory / f"started{name}"),
        "release": str(directory / f"release{name}"),
    }


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def warm_up(pool: ProcessPool, recorder: Recorder) -> None:
    """Run short tasks until the pool sends ahead."""
    tasks = [make_task("t.echo") for _ in range(100)]
    for task in tasks:
        pool.submit([task])
    for task in tasks:
        recorder.wait_ending(task)
    assert pool.average_run_seconds < 0.005


def ahead(pool: ProcessPool) -> int:
    with pool._lock:
        return sum(max(0, len(child.runs) - 1) for child in pool._children)


def test_the_child_is_on_its_own(
    make: MakePool, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DATABASE_URL", "DATABASE_URL_FILE", "BROKER_URL", "TOKENS", "TOKENS_FILE"):
        monkeypatch.setenv(f"JOBSVC_{name}", "secret")
    for name in [name for name in os.environ if name.startswith("JOBSVC_TEST_")]:
        monkeypatch.delenv(name)  # where the tests' own services are
    monkeypatch.setenv("JOBSVC_SMTP_URL", "smtp://localhost")
    seen = result(run(make(), recorder, make_task("t.process")))
    assert seen["pid"] == seen["group"] == seen["session"] != os.getpid()
    environment, modules = seen["environment"], seen["modules"]
    assert isinstance(environment, list)
    assert [name for name in environment if name.startswith("JOBSVC_")] == ["JOBSVC_SMTP_URL"]
    assert isinstance(modules, list)
    assert not {"grpc", "sqlalchemy", "kombu", "psycopg2"}.intersection(modules)
    ours = {name for name in modules if name.split(".")[0] == "jobsvc"}
    assert ours == {"jobsvc", "jobsvc.core", "jobsvc.core.attempts", "jobsvc.core.records"}


def test_a_file_of_the_working_directory_takes_no_modules_place(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("worker", "jobsvc", "queue", "token", "json", "asyncio"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')")
    (tmp_path / "shop.py").write_text(
        "from worker import job\n@job('shop.pack')\ndef pack(payload): return 'packed'\n"
    )
    monkeypatch.chdir(tmp_path)
    pool = ProcessPool(1, ["shop"], recorder)
    try:
        assert "shop.pack" in {info.name for info in pool.start()}
        assert isinstance(run(pool, recorder, make_task("shop.pack")), Succeeded)
    finally:
        pool.stop(0)


def test_prints_do_not_disturb(make: MakePool, recorder: Recorder) -> None:
    assert isinstance(run(make(), recorder, make_task("t.print")), Succeeded)


@pytest.mark.parametrize(
    ("job_type", "cause"),
    [
        ("t.exit", "exit code 3"),
        ("t.segfault", "signal 11 (SIGSEGV)"),
        ("t.close_everything", "signal 9 (SIGKILL)"),
        ("t.write_garbage", "signal 9 (SIGKILL)"),
    ],
)
def test_a_death_hits_its_own_job_alone(
    make: MakePool, recorder: Recorder, job_type: str, cause: str
) -> None:
    pool = make()
    warm_up(pool, recorder)
    lost = make_task(job_type)
    others = [make_task("t.echo") for _ in range(20)]
    for task in (lost, *others):
        pool.submit([task])
    ending = recorder.wait_ending(lost)
    assert isinstance(ending, AttemptFailed)
    assert ending.crashed
    assert ending.error.type == "WORKER_LOST"
    assert ending.error.message == f"the child process died: {cause}"
    for task in others:
        assert isinstance(recorder.wait_ending(task), Succeeded)


def test_a_death_takes_along_what_the_handler_started(
    make: MakePool, recorder: Recorder, tmp_path: Path
) -> None:
    pool = make()
    pids = tmp_path / "pids"
    ending = run(pool, recorder, make_task("t.fork_and_exit", {"pids": str(pids)}))
    assert isinstance(ending, AttemptFailed)
    orphans = [int(pid) for pid in pids.read_text().split()]
    wait_until(lambda: not any(is_alive(pid) for pid in orphans))
    assert isinstance(run(pool, recorder, make_task("t.echo")), Succeeded)


def below(child: Child) -> psutil.Process:
    """The process that runs handlers, below its guard."""
    (process,) = psutil.Process(child.process.pid).children()
    return process


def is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(("does", "code"), [("exit", 0), ("raise", 1), ("return", 0), ("tell", 1)])
def test_a_fork_does_not_speak_for_the_job(
    make: MakePool, recorder: Recorder, does: str, code: int
) -> None:
    pool = make()
    warm_up(pool, recorder)
    task = make_task("t.fork", {"does": does})
    others = [make_task("t.echo") for _ in range(20)]
    for each in (task, *others):
        pool.submit([each])
    assert result(recorder.wait_ending(task)) == {"by": "the handler", "code": code}
    assert task.key not in recorder.reports
    for other in others:
        assert isinstance(recorder.wait_ending(other), Succeeded)


@pytest.mark.parametrize(
    ("job_type", "expected"), [("t.multiprocessing", [1, 2]), ("t.preexec", "fine\n")]
)
def test_libraries_may_fork(
    make: MakePool, recorder: Recorder, job_type: str, expected: object
) -> None:
    pool = make()
    for _ in range(3):
        assert run(pool, recorder, make_task(job_type)) == Succeeded(encode_result(expected))


def test_a_guard_that_a_handler_has_stopped_holds_nothing_up(
    make: MakePool, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make()
    monkeypatch.setattr(child_module, "END_SECONDS_MAX", 0.1)
    ending = run(pool, recorder, make_task("t.stop_guard", timeout=0.2))
    assert isinstance(ending, AttemptFailed)
    assert ending.error.type == "TIMEOUT"


@pytest.mark.parametrize("how", ["timeout", "cancel"])
def test_a_kill_takes_along_what_has_left_the_session(
    make: MakePool, recorder: Recorder, tmp_path: Path, how: str
) -> None:
    pool = make()
    pid = tmp_path / "pid"
    timeout = 1.0 if how == "timeout" else 60.0
    task = make_task("t.start_daemon", {"pid": str(pid), "stay": True}, timeout=timeout)
    pool.submit([task])
    wait_until(pid.exists)
    if how == "cancel":
        pool.cancel(task.key)
    recorder.wait_ending(task)
    assert not is_alive(int(pid.read_text()))  # before the next attempt can begin


def test_a_death_from_outside(make: MakePool, recorder: Recorder, tmp_path: Path) -> None:
    pool = make()
    task = make_task("t.wait", waiter(tmp_path))
    pool.submit([task])
    wait_until((tmp_path / "started").exists)
    psutil.Process().children()[0].kill()
    ending = recorder.wait_ending(task)
    assert isinstance(ending, AttemptFailed)
    assert "signal 9" in ending.error.message


def test_an_idle_child_that_dies_is_replaced(make: MakePool, recorder: Recorder) -> None:
    pool = make()
    psutil.Process().children()[0].kill()
    assert isinstance(run(pool, recorder, make_task("t.echo")), Succeeded | AttemptFailed)
    assert isinstance(run(pool, recorder, make_task("t.echo")), Succeeded)


@pytest.mark.parametrize("job_type", ["t.hold_gil", "t.wait"])
def test_a_timeout_kills(make: MakePool, recorder: Recorder, tmp_path: Path, job_type: str) -> None:
    pool = make()
    before = result(run(pool, recorder, make_task("t.process")))["pid"]
    ending = run(pool, recorder, make_task(job_type, waiter(tmp_path), timeout=0.2))
    assert isinstance(ending, AttemptFailed)
    assert ending.error.type == "TIMEOUT"
    after = result(run(pool, recorder, make_task("t.process")))["pid"]
    assert after != before


@pytest.mark.parametrize("job_type", ["t.hold_gil", "t.wait"])
def test_a_cancellation_kills_who_does_not_heed(
    make: MakePool, recorder: Recorder, tmp_path: Path, job_type: str
) -> None:
    pool = make()
    task = make_task(job_type, waiter(tmp_path))
    pool.submit([task])
    recorder.wait_started(task)
    pool.cancel(task.key)
    assert recorder.wait_ending(task) == Stopped()
    assert isinstance(run(pool, recorder, make_task("t.echo")), Succeeded)


def test_a_handler_that_heeds_is_not_killed(
    make: MakePool, recorder: Recorder, tmp_path: Path
) -> None:
    pool = make(cancel_grace_seconds=30.0)
    before = result(run(pool, recorder, make_task("t.process")))["pid"]
    task = make_task("t.wait_for_cancel", {"seen": str(tmp_path / "seen")})
    pool.submit([task])
    recorder.wait_report(task)
    pool.cancel(task.key)
    assert recorder.wait_ending(task) == Stopped()
    assert result(run(pool, recorder, make_task("t.process")))["pid"] == before


def test_abandoning_kills_at_once(make: MakePool, recorder: Recorder, tmp_path: Path) -> None:
    pool = make(cancel_grace_seconds=30.0)
    task = make_task("t.wait", waiter(tmp_path))
    pool.submit([task])
    wait_until((tmp_path / "started").exists)
    pool.cancel(task.key)
    pool.abandon(task.key)
    assert recorder.wait_ending(task) == Interrupted()
    assert isinstance(run(pool, recorder, make_task("t.echo")), Succeeded)


def test_what_was_sent_ahead_is_taken_back_from_a_slow_child(
    make: MakePool, recorder: Recorder, tmp_path: Path
) -> None:
    pool = make(size=2)
    warm_up(pool, recorder)
    slow = [make_task("t.hold_gil") for _ in range(2)]
    quick = [make_task("t.echo") for _ in range(10)]
    with pool._lock:  # all at once, so that the quick ones are sent after the slow ones
        for task in (*slow, *quick):
            pool.submit([task])
    wait_until(lambda: len(recorder.started) >= 102 and ahead(pool) == 0)
    pool.cancel(slow[0].key)
    for task in quick:
        assert isinstance(recorder.wait_ending(task), Succeeded)
    assert slow[1].key not in recorder.endings


def sent_ahead(pool: ProcessPool, recorder: Recorder, first: Claimed, tasks: list[Claimed]) -> None:
    """Have `tasks` wait in the child behind `first`."""
    with pool._lock:
        for task in (first, *tasks):
            pool.submit([task])
    wait_until(lambda: ahead(pool) == len(tasks))


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that was sent ahead is taken back for the first one's slowness."""
    monkeypatch.setattr(process_module, "_AHEAD_SECONDS_MAX", 1000.0)


@pytest.mark.usefixtures("patient")
def test_what_was_sent_ahead_can_be_cancelled_and_withdrawn(
    make: MakePool, recorder: Recorder, tmp_path: Path
) -> None:
    pool = make()
    first = make_task("t.hold_gil")
    tasks = [make_task("t.echo") for _ in range(4)]
    sent_ahead(pool, recorder, first, tasks)
    pool.cancel(tasks[1].key)
    assert recorder.wait_ending(tasks[1]) == Stopped()
    pool.abandon(tasks[2].key)
    assert recorder.wait_ending(tasks[2]) == Interrupted()
    assert pool.withdraw(0) == [tasks[0], tasks[3]]
    assert recorder.started == [first.key]
    assert first.key not in recorder.endings


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("how", ["death", "timeout", "cancel", "abandon"])
def test_what_was_sent_ahead_of_a_kill_runs_elsewhere(
    make: MakePool, recorder: Recorder, tmp_path: Path, how: str
) -> None:
    pool = make()
    timeout = 0.5 if how == "timeout" else 60.0
    first = make_task("t.wait", waiter(tmp_path), timeout=timeout)
    tasks = [make_task("t.echo") for _ in range(4)]
    sent_ahead(pool, recorder, first, tasks)
    wait_until((tmp_path / "started").exists)
    if how == "death":
        psutil.Process().children()[0].kill()
    elif how == "cancel":
        pool.cancel(first.key)
    elif how == "abandon":
        pool.abandon(first.key)
    ending = recorder.wait_ending(first)
    if isinstance(ending, AttemptFailed):
        assert ending.crashed == (how == "death")
    kinds = {"cancel": Stopped, "abandon": Interrupted}
    assert isinstance(ending, kinds.get(how, AttemptFailed))
    for task in tasks:
        assert isinstance(recorder.wait_ending(task), Succeeded)
    assert recorder.started == [first.key, *(task.key for task in tasks)]


@pytest.mark.usefixtures("patient")
def test_what_was_sent_ahead_is_interrupted_by_a_stop(
    make: MakePool, recorder: Recorder, tmp_path: Path
) -> None:
    pool = make()
    first = make_task("t.wait", waiter(tmp_path))
    tasks = [make_task("t.echo") for _ in range(4)]
    sent_ahead(pool, recorder, first, tasks)
    wait_until((tmp_path / "started").exists)
    (tmp_path / "release").touch()
    with pool._lock:  # so that the first one's end is not seen before the stop
        assert ahead(pool) == 4
        for child in pool._children:
            pool._recall(child)
    pool.stop(20)
    assert isinstance(recorder.endings[first.key][0], Succeeded)
    assert all(len(recorder.endings[task.key]) == 1 for task in tasks)


@pytest.mark.parametrize("delay_seconds", [0.0, 0.0005, 0.001, 0.002, 0.005])
def test_an_end_in_the_moment_of_a_cancel_is_one_outcome(
    make: MakePool, recorder: Recorder, delay_seconds: float
) -> None:
    pool = make(size=2, cancel_grace_seconds=0.0)
    warm_up(pool, recorder)
    tasks = [make_task("t.echo") for _ in range(30)]
    for task in tasks:
        pool.submit([task])
    time.sleep(delay_seconds)
    for task in tasks[::3]:
        pool.cancel(task.key)
    for number, task in enumerate(tasks):
        ending = recorder.wait_ending(task)
        # Interrupted: started in a child that was being killed for another.
        allowed = Stopped | Succeeded if number % 3 == 0 else Succeeded | Interrupted
        assert isinstance(ending, allowed)
    assert isinstance(run(pool, recorder, make_task("t.echo")), Succeeded)


def state(pool: ProcessPool, recorder: Recorder) -> dict[str, object]:
    return result(run(pool, recorder, make_task("t.state")))


def pid_of(pool: ProcessPool, recorder: Recorder) -> object:
    return result(run(pool, recorder, make_task("t.process")))["pid"]


@pytest.mark.parametrize(
    "what",
    [
        *("alarm", "handler", "mask", "umask", "directory", "limit", "locale", "environment"),
        *("affinity", "stdout", "socket timeout", "context", "zombie"),
    ],
)
def test_what_a_job_leaves_is_put_back_in_order(
    make: MakePool, recorder: Recorder, what: str
) -> None:
    pool = make()
    before, pid = state(pool, recorder), pid_of(pool, recorder)
    assert isinstance(run(pool, recorder, make_task("t.leave", {"what": what})), Succeeded)
    assert state(pool, recorder) == before
    assert pid_of(pool, recorder) == pid


@pytest.mark.parametrize("what", ["process", "thread", "memory"])
def test_a_child_is_replaced_where_it_cannot_be_put_back_in_order(
    make: MakePool, recorder: Recorder, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    pool = make(limits=ChildLimits(memory_bytes=200_000_000))
    before, pid = state(pool, recorder), pid_of(pool, recorder)
    task = make_task("t.leave", {"what": what})
    others = [make_task("t.state") for _ in range(2)]
    with pool._lock:  # so that they may be sent ahead
        for each in (task, *others):
            pool.submit([each])
    assert isinstance(recorder.wait_ending(task), Succeeded)
    for other in others:
        assert result(recorder.wait_ending(other)) == before
    assert pid_of(pool, recorder) != pid
    assert recorder.started.count(others[0].key) == 1
    assert "a child process is replaced: after a job of t.leave it " in caplog.text


def test_more_memory_than_a_child_may_have_is_a_failure_that_says_so(
    make: MakePool, recorder: Recorder
) -> None:
    pool = make(limits=ChildLimits(memory_limit_bytes=256 << 20))
    pid = pid_of(pool, recorder)
    ending = run(pool, recorder, make_task("t.take_memory", {"bytes": 300 << 20}))
    assert isinstance(ending, AttemptFailed)
    assert not ending.crashed
    assert ending.error.type == "MemoryError"
    assert "the process may have 256 MiB (JOBSVC_CHILD_MEMORY_LIMIT)" in ending.error.message
    small = run(pool, recorder, make_task("t.take_memory", {"bytes": 100 << 20}))
    assert isinstance(small, Succeeded)
    assert pid_of(pool, recorder) == pid


@pytest.mark.parametrize("limits", [ChildLimits(jobs=50), ChildLimits(age_seconds=0.2)])
def test_a_worn_child_is_replaced_without_a_gap(
    make: MakePool, recorder: Recorder, limits: ChildLimits
) -> None:
    pool = make(limits=limits)
    first = result(run(pool, recorder, make_task("t.process")))["pid"]
    seen = {first}

    def run_one() -> bool:
        seen.add(result(run(pool, recorder, make_task("t.process")))["pid"])
        return len(seen) == 3

    wait_until(run_one)
    wait_until(lambda: len(psutil.Process().children()) <= 2)
    assert first not in {child.pid for child in psutil.Process().children()}


def test_what_a_worn_child_still_runs_has_its_slot(
    make: MakePool, recorder: Recorder, tmp_path: Path
) -> None:
    pool = make(limits=ChildLimits(jobs=1))
    long, next_one = make_task("t.wait", waiter(tmp_path)), make_task("t.echo")
    pool.submit([long])
    pool.submit([next_one])
    wait_until(lambda: sum(child.usable for child in pool._children) == 2)
    pool._wake()
    wait_until((tmp_path / "started").exists)
    assert recorder.started == [long.key]
    (tmp_path / "release").touch()
    assert isinstance(recorder.wait_ending(next_one), Succeeded)
    assert recorder.started == [long.key, next_one.key]


def test_handlers_that_kill_their_process_at_import(recorder: Recorder) -> None:
    module = "tests.unit.worker.deadly_handlers"
    pool = ProcessPool(2, [module], recorder, {"PYTHONPATH": ROOT})
    with pytest.raises(HandlersError, match=rf"loaded the handlers from {module}: signal 9"):
        pool.start()
    assert psutil.Process().children() == []


def test_handlers_that_replace_threads(recorder: Recorder) -> None:
    module = "tests.unit.worker.patching_handlers"
    pool = ProcessPool(1, [module], recorder, {"PYTHONPATH": ROOT})
    with pytest.raises(HandlersError, match=rf"{module} replace Python's threads"):
        pool.start()


def test_handlers_that_go_away_and_come_back(recorder: Recorder, tmp_path: Path) -> None:
    module = tmp_path / "volatile_handlers.py"
    text = f"from {HANDLERS} import *\n"
    module.write_text(text)
    path = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    pool = ProcessPool(1, ["volatile_handlers"], recorder, path)
    pool.start()
    types = pool.job_types
    assert not pool.broken
    module.write_text("raise RuntimeError('the volume is gone')")
    assert isinstance(run(pool, recorder, make_task("t.exit")), AttemptFailed)
    until(lambda: pool.broken, 20, "it knows")
    assert "the volume is gone" in pool.broken
    assert (pool.slots, pool.job_types) == (0, frozenset())
    module.write_text(text)
    until(lambda: not pool.broken, 20, "it works again")
    assert (pool.slots, pool.job_types) == (1, types)
    assert isinstance(run(pool, recorder, make_task("t.echo")), Succeeded)
    pool.stop(0)


def test_a_child_that_cannot_start_is_tried_again(
    make: MakePool, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make()
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert isinstance(run(pool, recorder, make_task("t.exit")), AttemptFailed)
    task = make_task("t.echo")
    pool.submit([task])
    wait_until(lambda: pool._start_failures >= 2)
    assert task.key not in recorder.endings
    monkeypatch.undo()
    assert isinstance(recorder.wait_ending(task), Succeeded)


def test_the_children_and_what_they_have_started_die_with_their_parent(tmp_path: Path) -> None:
    daemon = tmp_path / "pid"
    script = f"""
import sys, time
sys.path.insert(0, {ROOT!r})
from tests.unit.worker.recorder import Recorder, make_task
from worker.pool import ProcessPool
pool = ProcessPool(2, [{HANDLERS!r}], Recorder(), {{"PYTHONPATH": {ROOT!r}}})
pool.start()
pool.submit([make_task("t.hold_gil")])
pool.submit([make_task("t.start_daemon", {{"pid": {str(daemon)!r}, "stay": True}})])
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script]) as parent:
        wait_until(daemon.exists)
        pids = {child.pid for child in psutil.Process(parent.pid).children(recursive=True)}
        pids.add(int(daemon.read_text()))
        parent.kill()
    assert len(pids) >= 5  # each child has its guard
    wait_until(lambda: not any(map(is_alive, pids)))


def test_a_task_that_the_child_passes_over_is_taken_back_too(
    make: MakePool, recorder: Recorder, tmp_path: Path
) -> None:
    """While the parent holds the first task's ticket, the child may take the second's."""
    pool = make()
    # So long ago that what is behind it is taken back.
    first = Run(make_task("t.echo"), 0.0, started=time.monotonic() - 1.0)
    second = Run(make_task("t.wait", waiter(tmp_path)), 0.0)
    with pool._lock:
        (child,) = pool._children
        below(child).suspend()
        until(lambda: below(child).status() == psutil.STATUS_STOPPED, 20, "the child stands still")
        for number, run in ((101, first), (102, second)):
            pool._owners[run.task.key] = child, number
            child.send_tasks({number: run})
        overtaken = Overtaken(child, tmp_path / "started")
        child._tickets_theirs = cast(socket.socket, overtaken)
        pool._wake()
    until(lambda: first.task.key in pool._waiting, 20, "the first is taken back")
    assert list(child.runs.values()) == [second]
    (tmp_path / "release").touch()
    assert isinstance(recorder.wait_ending(second.task), Succeeded)
    assert isinstance(recorder.wait_ending(first.task), Succeeded)


class Overtaken:
    """The tickets' end that the parent takes back from; the child wakes behind the first one."""

    def __init__(self, child: Child, started: Path) -> None:
        self._child = child
        self._end = child._tickets_theirs
        self._started = started

    def recv(self, size: int, flags: int) -> bytes:
        ticket = self._end.recv(size, flags)
        below(self._child).resume()
        until(self._started.exists, 20, "the child runs the second")
        return ticket

    def close(self) -> None:
        self._end.close()
