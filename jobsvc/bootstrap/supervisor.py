"""The parent of `jobsvc server --processes N`: N servers on one address, told as one.

It holds the port, starts the children, replaces those that end unasked, answers the probes for all
of them, and ends them. It serves no calls itself: the kernel shares connections out among the
children that listen.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Metric

from jobsvc import metrics, telemetry, vital
from jobsvc.bootstrap import merging, ports, probes
from jobsvc.bootstrap.child import FAILED, METRICS, READY
from jobsvc.bootstrap.merging import Snapshot
from jobsvc.bootstrap.ready import announce
from jobsvc.bootstrap.signals import on_stop
from jobsvc.errors import CannotStart
from jobsvc.settings import Settings
from jobsvc.telemetry import Probes, Vitals

# -P: a file of the working directory takes no module's place.
COMMAND = (sys.executable, "-P", "-m", "jobsvc.bootstrap.child")
# Whoever asks a child waits no longer: one that says nothing for so long answers no calls either.
ANSWER_SECONDS_MAX = 2.0
LINE_BYTES_MAX = 64 * 1024 * 1024  # a whole page of metrics
# Between a child's end and the next one's start; none after a child that lived for longer.
PAUSE_SECONDS = 1.0
PAUSE_SECONDS_MAX = 30.0

log = telemetry.get_logger("jobsvc")


def run(settings: Settings) -> int:
    """Serves until SIGTERM or SIGINT; answers the exit code. Raises CannotStart."""
    telemetry.configure(settings)
    with ports.held(settings.listen) as address:
        return asyncio.run(_serve(settings, address))


async def _serve(settings: Settings, address: str) -> int:
    """The exit code: 1 where a child did not end as it should have when it was stopped."""
    theirs = settings.model_copy(update={"listen": address, "metrics_listen": ""})
    supervisor = Supervisor(settings.processes, theirs.model_dump_json().encode())
    loop = asyncio.get_running_loop()
    on_stop(lambda: loop.call_soon_threadsafe(supervisor.stop))
    served = _serve_probes(settings, supervisor, loop)
    try:
        await supervisor.run(on_ready=lambda: announce(settings, address))
    finally:
        if served is not None:
            await asyncio.to_thread(served.close)
    return 0 if supervisor.drained else 1


class Child:
    """A server process, and its parent's end of the channel. To be made by `start`."""

    @classmethod
    async def start(cls, command: Sequence[str], settings: bytes) -> Child:
        """Raises OSError where the system has no room for another process."""
        ours, theirs = socket.socketpair()
        with theirs, ExitStack() as undo:
            undo.callback(ours.close)
            process = subprocess.Popen(  # noqa: ASYNC220 - returns as soon as it is started
                [*command, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                # A terminal's Ctrl-C is for the parent alone, which passes it on.
                start_new_session=True,
            )
            undo.callback(process.kill)
            reader, writer = await asyncio.open_connection(sock=ours, limit=LINE_BYTES_MAX)
            undo.pop_all()
        writer.write(settings + b"\n")
        return cls(process, reader, writer)

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._started: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        # Why it does not serve, if it said so.
        self.failure = ""
        # What it told last of its metrics.
        self.told: Snapshot = []
        self._answer: asyncio.Future[bool] | None = None
        self.began = time.monotonic()
        self._life = asyncio.create_task(self._hear_out())

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def serves(self) -> bool:
        return self._started.done() and self._started.result() and not self._life.done()

    async def started(self) -> bool:
        """Waits until it serves, or has ended: False then."""
        return await asyncio.shield(self._started)

    async def ended(self) -> int:
        """Waits for its end, and answers the exit code."""
        return await asyncio.shield(self._life)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    async def ask(self) -> bool:
        """Brings `told` up to date; False where no answer comes in time. Who asks while another
        waits gets the same answer."""
        if self._answer is None:
            self._answer = asyncio.get_running_loop().create_future()
            self._writer.write(b"\n")
        done, _ = await asyncio.wait([self._answer], timeout=ANSWER_SECONDS_MAX)
        return any(answer.result() for answer in done)

    async def _hear_out(self) -> int:
        try:
            async for line in self._reader:
                self._hear(*json.loads(line))
        except ConnectionError:
            pass  # it was killed with a question unread
        self._writer.close()
        code = await asyncio.to_thread(self._process.wait)
        for waited_for in (self._started, self._answer):
            if waited_for is not None and not waited_for.done():
                waited_for.set_result(False)
        return code

    def _hear(self, kind: str, value: Any) -> None:
        if kind == METRICS:
            self.told = value
            answer, self._answer = self._answer, None
            if answer is not None:
                answer.set_result(True)
        elif kind == READY:
            self._started.set_result(True)
            log.info("process serves", pid=self.pid)
        elif kind == FAILED:
            self.failure = value


@dataclass(frozen=True, slots=True)
class Survey:
    """Of all children, at one moment."""

    live: bool
    ready: bool
    told: list[Snapshot]


class Supervisor:
    """Keeps `count` children running. To be used in one running event loop."""

    def __init__(self, count: int, settings: bytes, command: Sequence[str] = COMMAND) -> None:
        self._count = count
        self._settings = settings
        self._command = command
        self._children: list[Child] = []
        self._started = 0
        self._stopping = asyncio.Event()
        # What those that have ended had counted.
        self._past: Snapshot = []
        # Whether each child that was stopped ended well.
        self.drained = True

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Until `stop`, and the end of all children. `on_ready` is called once, when all serve.
        Raises CannotStart where one of the first does not come to serve; there is none left then,
        either."""
        places = [asyncio.create_task(self._fill(on_ready)) for _ in range(self._count)]
        try:
            await asyncio.gather(*places)
        finally:
            for place in places:
                place.cancel()
            for child in self._children:
                child.signal(signal.SIGKILL)
            await asyncio.gather(*(child.ended() for child in self._children))

    def stop(self) -> None:
        """Drains all children."""
        log.info("stopping")
        self._stopping.set()
        for child in self._children:
            child.signal(signal.SIGTERM)

    async def survey(self) -> Survey:
        """Ready is who answers calls: all children that listen serve. One that is being replaced
        gets no connections, so the others do its work; one that listens and does not serve fails
        its share of them. Live is who answers at all, by the same reasoning."""
        asked = [child for child in self._children if child.serves]
        answered = await asyncio.gather(*(child.ask() for child in asked))
        # Some may have ended meanwhile.
        serving = [child for child in asked if child.serves]
        live = all(well for child, well in zip(asked, answered, strict=True) if child.serves)
        well = all(merging.value(child.told, "jobsvc_ready") for child in serving)
        ready = bool(serving) and live and well and not self._stopping.is_set()
        return Survey(live, ready, [self._past, *(child.told for child in self._children)])

    async def _fill(self, on_ready: Callable[[], None]) -> None:
        """Keeps one place taken by a child."""
        child: Child | None = await self._start_first(on_ready)
        pause = 0.0
        while child is not None:
            self._bury(child, await child.ended())
            pause = _next_pause(pause, time.monotonic() - child.began)
            child = await self._replace(pause)

    async def _start_first(self, on_ready: Callable[[], None]) -> Child:
        try:
            child = await self._start()
        except OSError as error:
            raise CannotStart(f"cannot start a process: {error.strerror}") from error
        if await child.started():
            self._started += 1
            if self._started == self._count and not self._stopping.is_set():
                on_ready()
        elif not self._stopping.is_set():
            died_of = vital.died_of(await child.ended())
            raise CannotStart(child.failure or f"a server process ended at its start: {died_of}")
        return child

    async def _replace(self, pause: float) -> Child | None:
        """None once it is stopped."""
        while not await self._stops_within(pause):
            try:
                return await self._start()
            except OSError as error:
                log.error("cannot start a process", reason=error.strerror)
                pause = _next_pause(pause, lived=0.0)
        return None

    async def _start(self) -> Child:
        child = await Child.start(self._command, self._settings)
        self._children.append(child)
        if self._stopping.is_set():
            child.signal(signal.SIGTERM)
        return child

    def _bury(self, child: Child, code: int) -> None:
        self._children.remove(child)
        self._past = merging.merge([self._past, merging.counted(child.told)])
        if self._stopping.is_set() and code in (0, -signal.SIGTERM):
            return
        if self._stopping.is_set():
            self.drained = False
        metrics.PROCESSES_LOST.inc()
        log.error("process ended", pid=child.pid, reason=child.failure or vital.died_of(code))

    async def _stops_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return await self._stopping.wait()
        except TimeoutError:
            return False


def _next_pause(last: float, lived: float) -> float:
    """Seconds: none after a child that lived long, and ever longer while they do not."""
    if lived > PAUSE_SECONDS_MAX:
        return 0.0
    return min(max(2 * last, PAUSE_SECONDS), PAUSE_SECONDS_MAX)


class _Page:
    """The metrics of all children and of this process, for a registry."""

    def __init__(self, survey: Callable[[], Survey]) -> None:
        self._survey = survey

    def collect(self) -> Iterable[Metric]:
        survey = self._survey()
        metrics.READY.set(survey.ready)
        own = merging.snapshot(
            metrics.READY,
            metrics.PROCESSES_LOST,
            prometheus_client.PROCESS_COLLECTOR,
            prometheus_client.PLATFORM_COLLECTOR,
            prometheus_client.GC_COLLECTOR,
        )
        return merging.families(merging.merge([own, *survey.told]))


def _serve_probes(
    settings: Settings, supervisor: Supervisor, loop: asyncio.AbstractEventLoop
) -> Probes | None:
    def survey() -> Survey:
        return asyncio.run_coroutine_threadsafe(supervisor.survey(), loop).result()

    registry = CollectorRegistry()
    registry.register(_Page(survey))
    vitals = Vitals(lambda: survey().ready, lambda: survey().live, registry)
    return probes.serve(settings, vitals)
