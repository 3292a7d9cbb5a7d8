"""Handlers that behave, misbehave and crash, for the tests of the pools."""

from __future__ import annotations

import asyncio
import ctypes
import decimal
import io
import locale
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worker import JobContext, Retry, Snooze, job

Payload = dict[str, Any]


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise SystemExit(7)


@job("t.echo", timeout="2m", max_attempts=5, queue="slow")
def echo(payload: Payload) -> Payload:
    """Gives back what it got.

    Not in the description.
    """
    return payload


@job("t.echo_async")
async def echo_async(payload: Payload) -> Payload:
    await asyncio.sleep(0)
    return payload


loops: set[int] = set()


@job("t.loop")
async def see_loop(payload: Payload) -> Payload:
    """Leaves tasks and a thread behind, and says on how many loops it has ever run."""
    loops.add(id(asyncio.get_running_loop()))
    background = asyncio.create_task(asyncio.sleep(600))
    await asyncio.to_thread(time.sleep, 0)
    others = asyncio.all_tasks() - {asyncio.current_task(), background}
    if payload.get("exit"):
        sys.exit(1)
    return {"loops": len(loops), "pid": os.getpid(), "others": len(others)}


@job("t.heedless_task")
async def leave_heedless_task(payload: Payload) -> None:
    async def run_on() -> None:
        while True:
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                continue

    task = asyncio.create_task(run_on())
    await asyncio.sleep(0)
    kept_tasks.append(task)


kept_tasks: list[asyncio.Task[None]] = []


@job("t.sleep_async")
async def sleep_async(payload: Payload, ctx: JobContext) -> None:
    try:
        ctx.output("waiting")
        await asyncio.sleep(600)
    finally:
        await asyncio.sleep(0)
        await asyncio.to_thread(Path(payload["seen"]).touch)


@job("t.process")
def process(payload: Payload) -> Payload:
    return {
        "pid": os.getpid(),
        "group": os.getpgid(0),
        "session": os.getsid(0),
        "environment": sorted(os.environ),
        "modules": sorted(sys.modules),
    }


@job("t.print")
def print_much(payload: Payload) -> str:
    os.write(1, b"\0\0\0\5garbage" * 1000)
    sys.stdout.write("garbage\n")
    return "fine"


@job("t.tell")
def tell(payload: Payload, ctx: JobContext) -> None:
    ctx.log("first", "warning")
    ctx.output("text")
    ctx.output(b"\xff data")
    for step in range(1000):
        ctx.progress(step + 1, 1000, "going")


@job("t.tell_and_wait")
def tell_and_wait(payload: Payload, ctx: JobContext) -> None:
    for step in range(100):
        ctx.progress(step + 1)
    wait_for(payload["release"])


@job("t.wait")
def wait(payload: Payload, ctx: JobContext) -> str:
    """Runs until the file exists, whatever is asked of it."""
    Path(payload["started"]).touch()
    wait_for(payload["release"])
    return "released"


@job("t.wait_for_cancel")
def wait_for_cancel(payload: Payload, ctx: JobContext) -> str:
    ctx.output("waiting")
    while not ctx.cancelled:
        time.sleep(0.005)
    Path(payload["seen"]).touch()
    if payload.get("raise"):
        raise RuntimeError("cancelled in the middle")
    return "stopped by itself"


@job("t.hold_gil")
def hold_gil(payload: Payload) -> int:
    return sum(range(10**12))


@job("t.exit")
def leave(payload: Payload) -> None:
    os._exit(3)


@job("t.segfault")
def segfault(payload: Payload) -> None:
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # keep the tests' output readable
    ctypes.string_at(0)


@job("t.fork_and_exit")
def fork_and_exit(payload: Payload) -> None:
    """Leaves ten children behind that hold every descriptor, the pool's sockets too."""
    pids = []
    for _ in range(10):
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
            os._exit(0)
        pids.append(pid)
    Path(payload["pids"]).write_text(" ".join(map(str, pids)))
    os._exit(1)


@job("t.fork")
def fork(payload: Payload, ctx: JobContext) -> Payload:
    """Forks, and waits for the fork, which does what would end the job, or speak for it."""
    does = payload["does"]
    pid = os.fork()
    if pid == 0:
        if does == "exit":
            sys.exit(0)
        if does == "raise":
            raise RuntimeError("in the fork")
        if does == "tell":
            ctx.output("from the fork")
        return {"by": "the fork"}
    _, status = os.waitpid(pid, 0)
    return {"by": "the handler", "code": os.waitstatus_to_exitcode(status)}


@job("t.multiprocessing")
def use_multiprocessing(payload: Payload) -> list[int]:
    context = multiprocessing.get_context("fork")
    sleeper = context.Process(target=time.sleep, args=(600,))
    sleeper.start()
    with context.Pool(2) as pool:
        answer = pool.map(abs, [-1, -2])
    sleeper.terminate()
    sleeper.join()
    return answer


@job("t.preexec")
def use_preexec(payload: Payload) -> str:
    command = [sys.executable, "-c", "print('fine')"]
    return subprocess.check_output(command, text=True, preexec_fn=os.setsid)


@job("t.start_daemon")
def start_daemon(payload: Payload) -> None:
    """Starts what leaves its parent, session and environment behind."""
    program = (
        "import os, pathlib, sys, time\n"
        "if os.fork(): sys.exit()\n"
        "os.setsid()\n"
        "pathlib.Path(sys.argv[1] + '.new').write_text(str(os.getpid()))\n"
        "os.rename(sys.argv[1] + '.new', sys.argv[1])\n"
        "time.sleep(600)\n"
    )
    subprocess.run([sys.executable, "-c", program, payload["pid"]], env={}, check=True)
    wait_for(payload["pid"])
    if payload.get("stay"):
        time.sleep(600)


kept: list[bytearray] = []


def set_time_zone() -> None:
    os.environ["TZ"] = "Asia/Tokyo"
    time.tzset()


LEAVE: dict[str, Callable[[], object]] = {
    "alarm": lambda: signal.setitimer(signal.ITIMER_REAL, 0.05),
    "handler": lambda: signal.signal(signal.SIGUSR2, lambda *_: None),
    "mask": lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2]),
    "umask": lambda: os.umask(0o777),
    "directory": lambda: os.chdir("/"),
    "limit": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY)),
    "locale": lambda: locale.setlocale(locale.LC_ALL, "C"),
    "environment": set_time_zone,
    "affinity": lambda: os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1]),
    "stdout": lambda: setattr(sys, "stdout", io.StringIO()),
    "socket timeout": lambda: socket.setdefaulttimeout(0.001),
    "context": lambda: setattr(decimal.getcontext(), "prec", 1),
    "zombie": lambda: subprocess.Popen(["true"]),
    "process": lambda: subprocess.Popen(["sleep", "600"], start_new_session=True),
    "thread": lambda: threading.Thread(target=time.sleep, args=(600,), daemon=True).start(),
    "memory": lambda: kept.append(bytearray(200_000_000)),
}


@job("t.leave")
def leave_behind(payload: Payload) -> None:
    """Leaves one thing behind that the next job would feel."""
    LEAVE[payload["what"]]()


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


@job("t.state")
def state(payload: Payload) -> Payload:
    """What a job can feel of those before it."""
    time.sleep(0.1)
    return {
        "handlers": [str(signal.getsignal(number)).split(" at ")[0] for number in range(1, 32)],
        "mask": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
        "umask": current_umask(),
        "directory": os.getcwd(),  # noqa: PTH109
        "limits": [list(map(float, resource.getrlimit(number))) for number in range(16)],
        "locale": locale.setlocale(locale.LC_ALL),
        "environment": dict(os.environ),
        "hour": time.localtime(0).tm_hour,
        "affinity": sorted(os.sched_getaffinity(0)),
        "stdout": isinstance(sys.stdout, io.StringIO),
        "socket timeout": socket.getdefaulttimeout(),
        "precision": decimal.getcontext().prec,
        "threads": threading.active_count(),
        "kept": len(kept),
        "processes": [
            int(pid)
            for task in Path("/proc/self/task").iterdir()
            for pid in (task / "children").read_text().split()
        ],
    }


@job("t.take_memory")
def take_memory(payload: Payload) -> int:
    taken = bytearray(payload["bytes"])
    return len(taken)


@job("t.stop_guard")
def stop_guard(payload: Payload) -> None:
    os.kill(os.getppid(), signal.SIGSTOP)
    time.sleep(600)


@job("t.close_everything")
def close_everything(payload: Payload) -> None:
    os.closerange(3, 256)
    time.sleep(600)


@job("t.write_garbage")
def write_garbage(payload: Payload) -> None:
    for fd in [int(each.name) for each in Path("/proc/self/fd").iterdir()]:
        if fd < 3:
            continue
        try:
            os.write(fd, b"\xff" * 64)
        except OSError:
            continue
    time.sleep(600)


@job("t.raise")
def raise_it(payload: Payload) -> None:
    errors: dict[str, BaseException] = {
        "SystemExit": SystemExit(1),
        "KeyboardInterrupt": KeyboardInterrupt(),
        "GeneratorExit": GeneratorExit(),
        "CancelledError": asyncio.CancelledError(),
        "MemoryError": MemoryError(),
        "UnprintableError": UnprintableError(),
        "ValueError": ValueError("x" * 10_000_000 + "\0"),
        "Retry": Retry(after="1m"),
        "Snooze": Snooze(30),
    }
    raise errors[payload["error"]]


def wait_for(path: str) -> None:
    while not Path(path).exists():
        time.sleep(0.005)
