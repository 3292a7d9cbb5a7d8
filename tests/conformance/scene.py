"""What a scenario is given: a client, names of its own, and words to check answers with."""

from __future__ import annotations

import json
import queue
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from google.protobuf import descriptor_pool

from tests.conformance.callers import Caller, Json, Reply, Stream
from tests.harness import until

T = TypeVar("T")

SERVICES = ("jobsvc.v1.JobService", "jobsvc.v1.ScheduleService", "jobsvc.v1.AdminService")
# By the RPC's name: its full name, and whether it streams.
METHODS: Mapping[str, tuple[str, bool]] = {
    method.name: (f"{service}/{method.name}", method.server_streaming)
    for service in SERVICES
    for method in descriptor_pool.Default().FindServiceByName(service).methods
}

ENDED = ("SUCCEEDED", "FAILED", "CANCELLED")
# For what the service does by itself, on a machine that others use as well.
PATIENCE_SECONDS = 30.0
NO_BACKOFF = {"initial_backoff": "0s", "jitter": 0.0}
LONG_BACKOFF = {"initial_backoff": "3600s"}
# A queue that no worker serves.
UNSERVED = "conformance-unserved"
_UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


class Refused(AssertionError):
    """A call was to be answered, and was not."""


class Scene:
    """One scenario's view of the service. Jobs that are submitted through it are cancelled when it
    is over; all names that it makes are its own, so that scenarios can share a service."""

    def __init__(
        self,
        caller: Caller,
        tokens: Mapping[str, str],
        queues: queue.SimpleQueue[str],
    ) -> None:
        """`tokens`: by scope; calls carry that of `admin`, where there is one. `queues`: those
        that workers serve and nobody else uses."""
        self.caller = caller
        self.tokens = tokens
        self.tag = f"c{secrets.token_hex(5)}"
        # A worker never announced it: a job of this type waits for ever.
        self.idle = f"conformance.{self.tag}"
        self.job_ids: set[str] = set()
        self.schedule_ids: set[str] = set()
        self._queues = queues

    # Calls.

    def call(self, rpc: str, /, **request: Any) -> Reply:
        """However it ends."""
        return self.call_with(self.tokens.get("admin"), rpc, **request)

    def call_with(self, token: str | None, rpc: str, /, **request: Any) -> Reply:
        """As `call`, with another token or none. Of a stream only the end is told."""
        method, streams = METHODS[rpc]
        if streams:
            with self.caller.stream(method, request, token) as stream:
                self._note(list(stream))
                return stream.reply
        reply = self.caller.call(method, request, token)
        self._note(reply.body)
        return reply

    def ok(self, rpc: str, /, **request: Any) -> Json:
        """The answer; raises Refused where there is none."""
        reply = self.call(rpc, **request)
        if reply.code != "OK":
            raise Refused(f"{rpc} {_short(request)}: {_said(reply)}")
        return reply.body

    def refused(self, code: str, reason: str, rpc: str, /, **request: Any) -> Reply:
        """The error, which is checked for what every error of the service has."""
        reply = self.call(rpc, **request)
        check_error(reply, code, reason, f"{rpc} {_short(request)}")
        return reply

    def invalid(self, fields: str | set[str], rpc: str, /, **request: Any) -> None:
        """The call is refused for these fields and no others."""
        reply = self.refused("INVALID_ARGUMENT", "INVALID_FIELD", rpc, **request)
        expected = {fields} if isinstance(fields, str) else fields
        assert set(reply.fields) == expected, f"{reply.fields} and not {expected}: {reply.message}"

    @contextmanager
    def stream(self, rpc: str, /, **request: Any) -> Iterator[Stream]:
        with self.caller.stream(METHODS[rpc][0], request, self.tokens.get("admin")) as stream:
            yield stream

    def _note(self, answer: Any) -> None:
        """Remembers the jobs of an answer, to be cancelled."""
        for job in _jobs(answer):
            self.job_ids.add(job)

    # Jobs.

    def submit(self, job_type: str = "", /, **request: Any) -> Json:
        """The job. Without a type it is one that waits for ever."""
        answer = self.ok("SubmitJob", job_type=job_type or self.idle, **request)
        assert "already_existed" not in answer, answer
        job: Json = answer["job"]
        return job

    def get(self, job_id: str) -> Json:
        job: Json = self.ok("GetJob", job_id=job_id)["job"]
        return job

    def cancel(self, job_id: str, /, **request: Any) -> Json:
        job: Json = self.ok("CancelJob", job_id=job_id, **request)["job"]
        return job

    def ended(self, job_id: str) -> Json:
        """How the job ended, once it has."""
        answer = self.ok("GetResult", job_id=job_id, wait=f"{PATIENCE_SECONDS:g}s")
        assert state(answer) in ENDED, f"not ended after {PATIENCE_SECONDS:g} s: {answer}"
        return answer

    def succeeded(self, job_id: str) -> Any:
        """Its result, once it has succeeded."""
        answer = self.ended(job_id)
        assert state(answer) == "SUCCEEDED", answer
        return answer["result"]

    def run(self, job_type: str = "demo.echo", /, **request: Any) -> str:
        """Submits a job and waits for its end; its id."""
        job_id: str = self.submit(job_type, **request)["job_id"]
        self.ended(job_id)
        return job_id

    def started(self, job_id: str) -> None:
        """Waits until the job runs."""
        self.happened(job_id, "STARTED")

    def happened(self, job_id: str, kind: str) -> Json:
        """Waits for the first event of that type."""
        with self.stream("WatchJob", job_id=job_id) as stream:
            for message in stream:
                if "event" in message and event_type(message["event"]) == kind:
                    event: Json = message["event"]
                    return event
            raise AssertionError(f"{kind} did not happen: {stream.reply}")

    def history(self, job_id: str) -> list[Json]:
        """All events so far, numbered without a gap."""
        events = self.ok("ListJobEvents", job_id=job_id, page_size=1000)["events"]
        assert [int(event["sequence"]) for event in events] == list(range(1, len(events) + 1))
        return list(events)

    def until(self, what: str, condition: Callable[[], T]) -> T:
        """Asks until the answer is true, and returns it."""
        return until(condition, PATIENCE_SECONDS, what)

    def pages(self, rpc: str, member: str, /, **request: Any) -> list[Json]:
        """A list to its end, page by page."""
        found: list[Json] = []
        token = ""
        while True:
            page = self.ok(rpc, **request, page_token=token)
            found += page.get(member, ())
            token = page.get("next_page_token", "")
            if not token:
                return found

    @contextmanager
    def queue(self) -> Iterator[str]:
        """A queue that workers serve, for this scenario alone; as it was, afterwards."""
        name = self._queues.get()
        try:
            yield name
        finally:
            for job_id in self.job_ids:  # what is left would be the next one's trouble
                self.call("CancelJob", job_id=job_id)
            for job_id in self.job_ids:
                self.ended(job_id)
            self.call("UpdateQueue", queue=name, update_mask="maxRunning,rateLimit")
            self.call("ResumeQueue", queue=name)
            self._queues.put(name)


# Words.


def check_error(reply: Reply, code: str, reason: str, what: str) -> None:
    """What every error of the service is: one ErrorInfo of ours, a message to read."""
    assert (reply.code, reply.reason) == (code, reason), f"{what}: {_said(reply)}"
    assert reply.detail("ErrorInfo")["domain"] == "jobsvc", reply
    assert reply.message, reply
    retry = reply.detail("RetryInfo")
    assert bool(retry) == (code in {"UNAVAILABLE", "RESOURCE_EXHAUSTED"}), reply


def state(message: Json) -> str:
    """Of a job, an event or a result: `QUEUED` and so on."""
    return str(message.get("state", "")).removeprefix("JOB_STATE_")


def event_type(event: Json) -> str:
    return str(event["type"]).removeprefix("JOB_EVENT_TYPE_")


def steps(events: list[Json]) -> list[tuple[str, str]]:
    """Type and state of each event."""
    return [(event_type(event), state(event)) for event in events]


def types(events: list[Json]) -> list[str]:
    return [event_type(event) for event in events]


def events_of(stream: Stream) -> list[Json]:
    """The events of a stream that is read to its end."""
    return [message["event"] for message in stream if "event" in message]


def moment(text: str) -> datetime:
    """Of a Timestamp, cut to microseconds."""
    whole, _, fraction = text.removesuffix("Z").partition(".")
    micros = int(fraction[:6].ljust(6, "0"))
    return datetime.fromisoformat(whole).replace(microsecond=micros, tzinfo=UTC)


def timestamp(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def now() -> datetime:
    return datetime.now(UTC)


def span(text: str) -> timedelta:
    """Of a Duration."""
    return timedelta(seconds=float(text.removesuffix("s")))


def is_job_id(text: str) -> bool:
    return _UUID7.fullmatch(text) is not None


def nobody(at: datetime | None = None) -> str:
    """The id of a job that there never was, made at that time."""
    milliseconds = int((at or now()).timestamp() * 1000)
    text = f"{milliseconds:012x}7{secrets.token_hex(2)[:3]}8{secrets.token_hex(8)[:15]}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def forgeries(token: str) -> list[str]:
    """Tokens that the service did not make."""
    return ["x", token[:-4], ("B" if token[0] == "A" else "A") + token[1:]]


def _jobs(answer: Any) -> Iterator[str]:
    """The ids of the jobs in an answer to a submit or a trigger, or in a stream."""
    if isinstance(answer, list):
        for each in answer:
            yield from _jobs(each)
    elif isinstance(answer, dict):
        if job_id := answer.get("job_id"):
            yield job_id
        for name in ("job", "responses", "event"):
            yield from _jobs(answer.get(name))


def _said(reply: Reply) -> str:
    return f"{reply.code} {reply.reason}: {reply.message}"


def _short(request: Json) -> str:
    text = json.dumps(request)
    return text if len(text) <= 300 else f"{text[:300]}…"
