"""Watchers that record what they are told and resume where they stood, on whatever server."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
import grpc.aio

from generated.jobsvc.v1.job_service_pb2 import WatchJobRequest, WatchJobsRequest
from generated.jobsvc.v1.job_service_pb2_grpc import JobServiceStub
from jobsvc.client import event_name, state_name
from jobsvc.client.errors import call_failed
from jobsvc.core.states import JobState
from jobsvc.store.tables import job_events
from tests.harness.service import Service
from tests.harness.wait import until

PAUSE_SECONDS = 0.1
WATCH_SECONDS_MAX = 120.0
Seen = tuple[int, str, str]  # sequence, type, state


@dataclass(slots=True)
class Recording:
    """One watcher's."""

    job_id: str
    seen: list[Seen] = field(default_factory=list)
    interruptions: list[str] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)  # of live events, seconds until heard
    ended: bool = False


@dataclass(slots=True)
class FleetRecording:
    """Of one that watches all jobs."""

    seen: list[tuple[str, int]] = field(default_factory=list)  # job id, sequence
    token: str = ""
    interruptions: list[str] = field(default_factory=list)


class Watchers:
    """Run in a thread with an event loop of their own. Close them, or use them in a `with`."""

    def __init__(self, service: Service, channels: int = 1) -> None:
        """`channels`: connections to each server, shared by all watchers."""
        self._service = service
        self.recordings: list[Recording] = []
        self.fleet: list[FleetRecording] = []
        self.broken: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="watchers", daemon=True)
        self._thread.start()
        self._stubs = self._run(self._connect(service.addresses, channels)).result(10)
        self._numbers = itertools.count()
        self._tasks: list[asyncio.Task[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def watch(self, job_ids: Sequence[str]) -> None:
        """Begins to watch each from its first event on."""
        new = [Recording(job_id) for job_id in job_ids]
        self.recordings += new
        self._run(self._begin(new)).result(10)

    def watch_all(self) -> FleetRecording:
        """Begins to watch all jobs, from now on."""
        recording = FleetRecording()
        self.fleet.append(recording)
        self._run(self._begin_all(recording)).result(10)
        until(lambda: bool(recording.token or self.broken), 20, "a fleet watch has begun")
        return recording

    def check_all(self, seconds: float) -> None:
        """Those that watch all jobs, from before the first, saw every event once, and each job's
        in order."""
        stored = {(event.job_id, event.sequence) for event in self._service.events()}

        def seen() -> bool:
            assert not self.broken, self.broken[:5]
            return all(len(recording.seen) >= len(stored) for recording in self.fleet)

        until(seen, seconds, f"each fleet watcher has seen {len(stored)} events")
        for recording in self.fleet:
            assert len(recording.seen) == len(stored)
            assert set(recording.seen) == stored
            last: Counter[str] = Counter()
            for job_id, sequence in recording.seen:
                assert sequence == last[job_id] + 1, job_id
                last[job_id] = sequence

    def join(self, seconds: float) -> None:
        """Until every stream has ended with OK."""

        def ended() -> bool:
            assert not self.broken, self.broken[:5]
            return all(recording.ended for recording in self.recordings)

        try:
            until(ended, seconds, "all watchers have ended")
        except AssertionError as error:
            open_ones = [r for r in self.recordings if not r.ended]
            raise AssertionError(f"{error}: {len(open_ones)} have not: {open_ones[:3]}") from None

    def check(self, recordings_min: int) -> None:
        """Each saw every event of its job once and in order, as it is stored."""
        assert len(self.recordings) >= recordings_min
        ids = {recording.job_id for recording in self.recordings}
        stored: dict[str, list[Seen]] = {job_id: [] for job_id in ids}
        for event in self._service.events(job_events.c.job_id.in_(ids)):
            stored[event.job_id].append((event.sequence, event.type, event.state))
        for recording in self.recordings:
            assert recording.ended
            assert recording.seen == sorted(stored[recording.job_id]), recording
            assert JobState(recording.seen[-1][2]).terminal

    @property
    def interruptions(self) -> Counter[str]:
        """By reason, or by code where the service gave none."""
        return Counter(why for recording in self.recordings for why in recording.interruptions)

    @property
    def stalest_seconds(self) -> float:
        """The longest that an event took from its commit to a watcher that was there already."""
        delays = list(itertools.chain.from_iterable(r.delays for r in self.recordings))
        assert delays, "no watcher heard anything live"
        return max(delays)

    def close(self) -> None:
        self._run(self._end()).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, body: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(body, self._loop)

    async def _connect(self, addresses: Sequence[str], count: int) -> list[list[Any]]:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
        self._channels = [
            [grpc.aio.insecure_channel(address, options=options) for _ in range(count)]
            for address in addresses
        ]
        return [[JobServiceStub(c) for c in channels] for channels in self._channels]

    async def _begin(self, recordings: Sequence[Recording]) -> None:
        self._tasks += [
            asyncio.create_task(self._record(r, next(self._numbers))) for r in recordings
        ]

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in itertools.chain.from_iterable(self._channels):
            await channel.close()

    async def _record(self, recording: Recording, number: int) -> None:
        for attempt in itertools.count(number):
            stubs = self._stubs[attempt % len(self._stubs)]
            try:
                await self._follow(recording, stubs[number % len(stubs)])
                recording.ended = True
                return
            except grpc.aio.AioRpcError as error:
                if not self._goes_on(error, recording, recording.job_id):
                    return
            await asyncio.sleep(PAUSE_SECONDS)

    async def _begin_all(self, recording: FleetRecording) -> None:
        self._tasks.append(asyncio.create_task(self._record_all(recording)))

    async def _record_all(self, recording: FleetRecording) -> None:
        for attempt in itertools.count():
            stub = self._stubs[attempt % len(self._stubs)][0]
            try:
                request = WatchJobsRequest(resume_token=recording.token)
                async for message in stub.WatchJobs(request):
                    recording.token = message.resume_token
                    if message.WhichOneof("message") == "event":
                        recording.seen.append((message.event.job_id, message.event.sequence))
            except grpc.aio.AioRpcError as error:
                if not self._goes_on(error, recording, "all jobs"):
                    return
            await asyncio.sleep(PAUSE_SECONDS)

    def _goes_on(
        self, error: grpc.aio.AioRpcError, recording: Recording | FleetRecording, what: str
    ) -> bool:
        """Whether a stream that ended like this is to be resumed."""
        why = call_failed(error)
        # Without a reason CANCELLED comes from grpc, of what reaches a server as it stops.
        if why.code != "UNAVAILABLE" and (why.code != "CANCELLED" or why.reason):
            self.broken.append(f"{what}: {why}")
            return False
        recording.interruptions.append(why.reason or why.code)
        return True

    async def _follow(self, recording: Recording, stub: Any) -> None:
        after = recording.seen[-1][0] if recording.seen else 0
        request = WatchJobRequest(job_id=recording.job_id, after_sequence=after)
        began = time.time()
        call = stub.WatchJob(request, timeout=WATCH_SECONDS_MAX)
        async for message in call:
            if message.WhichOneof("message") != "event":
                continue
            event = message.event
            happened = event.event_time.ToNanoseconds() / 1e9
            if happened > began:
                recording.delays.append(time.time() - happened)
            recording.seen.append((event.sequence, event_name(event.type), state_name(event.state)))
