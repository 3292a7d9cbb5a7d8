"""SubmitJob, SubmitJobs, RunJob: every field, every default, every bound."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct

from generated.jobsvc.v1.job_service_pb2 import SubmitJobsRequest
from tests.conformance.callers import Json
from tests.conformance.scenarios import scenario
from tests.conformance.scene import (
    NO_BACKOFF,
    UNSERVED,
    Scene,
    events_of,
    is_job_id,
    moment,
    now,
    span,
    state,
    steps,
    timestamp,
    types,
)

MIB = 1024 * 1024
DAY = timedelta(days=1)
# What a job that has just been submitted, and is due, cannot have.
NOT_YET = (
    *("start_time", "finish_time", "next_attempt_time", "purge_time", "progress", "error"),
    *("worker_id", "cancel_requested", "attempt"),
)
CHUNK = 12  # so that the paths of all that is wrong fit into one error


@scenario()
def defaults_are_filled_in(scene: Scene) -> None:
    job = scene.submit()
    assert is_job_id(job["job_id"]), job
    assert job["job_type"] == scene.idle
    assert job["queue"] == "default"
    assert state(job) == "QUEUED"
    assert job["max_attempts"] == 10
    assert span(job["timeout"]) == timedelta(minutes=30)
    policy = job["retry_policy"]
    assert span(policy["initial_backoff"]) == timedelta(seconds=10)
    assert span(policy["max_backoff"]) == timedelta(hours=1)
    assert (policy["backoff_multiplier"], policy["jitter"]) == (2.0, 0.2)
    assert abs(now() - moment(job["create_time"])) < timedelta(minutes=1)
    assert moment(job["schedule_time"]) == moment(job["create_time"])
    assert job["last_sequence"] == "1"
    absent = ("priority", "labels", "idempotency_key", "unique", "concurrency", "expire_time")
    assert not job.keys() & {*NOT_YET, *absent, "payload", "payload_blob"}, job
    stored = scene.get(job["job_id"])
    assert stored.get("payload", {}) == {}
    assert "payload_blob" not in stored


@scenario()
def the_backoff_bounds_follow_each_other(scene: Scene) -> None:
    """`max_backoff` is the greater of 1 h and `initial_backoff` by default."""
    job = scene.submit(retry_policy={"initial_backoff": "7200s"})
    assert span(job["retry_policy"]["max_backoff"]) == timedelta(hours=2)
    assert job["retry_policy"]["jitter"] == 0.2


@scenario()
def every_field_is_kept(scene: Scene) -> None:
    due, end = now() + DAY, now() + 2 * DAY
    given: Json = {
        "payload": {"a": [1, {"b": None}]},
        "queue": UNSERVED,
        "priority": 7,
        "max_attempts": 3,
        "retry_policy": {
            "initial_backoff": "1.500s",
            "backoff_multiplier": 1.5,
            "max_backoff": "60s",
            "jitter": 0.0,
        },
        "idempotency_key": f"{scene.tag} ключ",
        "labels": {"customer": "ACME Ünlimited", "empty": ""},
    }
    request = {
        **given,
        "schedule_time": timestamp(due),
        "expire_time": timestamp(end),
        "timeout": "90s",
        "retention": "7200s",
    }
    submitted = scene.submit(**request)
    assert "payload" not in submitted
    stored = scene.get(submitted["job_id"])
    for job in (submitted, stored):
        kept = {**given, **({} if job is stored else {"payload": None})}
        for name, value in kept.items():
            if name == "retry_policy":
                _same_policy(job[name], value)
            elif value is not None:
                assert job[name] == value, name
        assert state(job) == "SCHEDULED"
        assert moment(job["schedule_time"]) == due
        assert moment(job["expire_time"]) == end
        assert span(job["timeout"]) == timedelta(seconds=90)
    ended = scene.cancel(submitted["job_id"])
    assert moment(ended["purge_time"]) - moment(ended["finish_time"]) == timedelta(hours=2)


def _same_policy(policy: Json, expected: Json) -> None:
    for name, value in expected.items():
        if name.endswith("backoff"):
            assert span(policy[name]) == span(value), name
        else:
            assert policy[name] == value, name


@scenario()
def retention_is_by_the_end(scene: Scene) -> None:
    """7 days for SUCCEEDED and CANCELLED, 30 for FAILED."""
    echoed = scene.get(scene.run())
    cancelled = scene.cancel(scene.submit()["job_id"])
    failed = scene.get(scene.run("demo.fail", payload={"retryable": False}))
    for job, days in ((echoed, 7), (cancelled, 7), (failed, 30)):
        kept = moment(job["purge_time"]) - moment(job["finish_time"])
        assert kept == timedelta(days=days), (state(job), kept)


@scenario()
def a_result_is_what_the_handler_returned(scene: Scene) -> None:
    """All that JSON has, and whole numbers up to 2^53."""
    payload = {
        "": "an empty key",
        "null": None,
        "yes": True,
        "no": False,
        "zero": 0,
        "numbers": [2**53, -(2**53), 0.1, -1.5e300, 5e-324],
        "text": 'quotes " \\ \n\t \u007f \u2028 Ünïcode 🚀',
        "nested": {"list": [[], {}, [{"a": [None]}]], "no list": {}},
    }
    job = scene.submit("demo.echo", payload=payload)
    assert scene.succeeded(job["job_id"]) == payload
    assert scene.get(job["job_id"])["payload"] == payload


@scenario()
def a_blob_comes_back_untouched(scene: Scene) -> None:
    blob = {
        "content_type": "application/x-things; v=1",
        "data": base64.b64encode(bytes(range(256))).decode(),
    }
    job = scene.submit("demo.echo", payload_blob=blob)
    assert "payload_blob" not in job
    assert scene.ended(job["job_id"])["result_blob"] == blob
    stored = scene.get(job["job_id"])
    assert stored["payload_blob"] == blob
    assert "payload" not in stored


# When.


@scenario()
def a_delay_schedules(scene: Scene) -> None:
    job = scene.submit(delay="3600.250s", ttl="7200s")
    assert state(job) == "SCHEDULED"
    created = moment(job["create_time"])
    due = moment(job["schedule_time"]) - created
    assert abs(due - timedelta(seconds=3600.25)) < timedelta(seconds=5), due
    expiry = moment(job["expire_time"]) - created
    assert abs(expiry - timedelta(hours=2)) < timedelta(seconds=5), expiry
    assert steps(scene.history(job["job_id"])) == [("SUBMITTED", "SCHEDULED")]


@scenario()
def a_time_in_the_past_is_now(scene: Scene) -> None:
    job = scene.submit(schedule_time="2001-02-03T04:05:06Z")
    assert state(job) == "QUEUED"
    assert state(scene.submit(delay="0s")) == "QUEUED"


# Idempotency.


@scenario()
def a_key_makes_one_job(scene: Scene) -> None:
    request: Json = {"job_type": scene.idle, "idempotency_key": scene.tag, "payload": {"a": 1}}
    first = scene.ok("SubmitJob", **request)
    assert "already_existed" not in first
    assert first["job"]["idempotency_key"] == scene.tag
    again = scene.ok("SubmitJob", **request)
    assert again["already_existed"] is True
    assert again["job"]["job_id"] == first["job"]["job_id"]
    assert "payload" not in again["job"]
    for change in ({"payload": {"a": 2}}, {"priority": 1}, {"labels": {"x": "y"}}):
        refused = scene.refused(
            "ALREADY_EXISTS", "IDEMPOTENCY_KEY_REUSED", "SubmitJob", **{**request, **change}
        )
        assert refused.metadata["job_id"] == first["job"]["job_id"]


@scenario()
def a_key_outlives_the_end_of_its_job(scene: Scene) -> None:
    request: Json = {"job_type": "demo.echo", "idempotency_key": scene.tag}
    job_id = scene.run(idempotency_key=scene.tag)
    again = scene.ok("SubmitJob", **request)
    assert again["already_existed"] is True
    assert again["job"]["job_id"] == job_id
    assert state(again["job"]) == "SUCCEEDED"


@scenario()
def a_key_outlives_its_job(scene: Scene) -> None:
    """After DeleteJob: the id alone."""
    request: Json = {"job_type": scene.idle, "idempotency_key": scene.tag}
    job_id = scene.submit(idempotency_key=scene.tag)["job_id"]
    scene.cancel(job_id)
    scene.ok("DeleteJob", job_id=job_id)
    again = scene.ok("SubmitJob", **request)
    assert again == {"job": {"job_id": job_id}, "already_existed": True}
    refused = scene.refused(
        "ALREADY_EXISTS", "IDEMPOTENCY_KEY_REUSED", "SubmitJob", **request, priority=3
    )
    assert refused.metadata["job_id"] == job_id


@scenario()
def a_crowd_with_one_key_makes_one_job(scene: Scene) -> None:
    request: Json = {"job_type": scene.idle, "idempotency_key": scene.tag, "payload": {"n": 1}}
    crowd = scene.caller.crowd
    with ThreadPoolExecutor(crowd) as pool:
        answers = list(pool.map(lambda _: scene.ok("SubmitJob", **request), range(crowd)))
    assert len({answer["job"]["job_id"] for answer in answers}) == 1
    assert sum("already_existed" not in answer for answer in answers) == 1


# Validation.


@scenario()
def every_bad_field_is_named(scene: Scene) -> None:
    """All at once, each by its path."""
    scene.invalid(
        {"job_type", "queue", "priority", "max_attempts", "timeout", 'labels["Bad Key"]', "ttl"},
        "SubmitJob",
        job_type="Not/A/Type",
        queue="Q",
        priority=10,
        max_attempts=101,
        timeout="0s",
        labels={"Bad Key": "x", "good": "y"},
        ttl="0s",
    )
    scene.invalid("job_type", "SubmitJob")


def _bad(scene: Scene) -> list[tuple[str, Json]]:
    """What is just out of its range, with the path that is at fault."""
    far = timestamp(now() + 367 * DAY)
    long = "x" * 256
    return [
        ("job_type", {"job_type": ""}),
        *(("job_type", {"job_type": text}) for text in ("A", "1a", ".a", "a b", "ä", "a" * 101)),
        *(("queue", {"queue": text}) for text in ("A", "_a", "a:b", "a\n", "a" * 51)),
        *(("priority", {"priority": number}) for number in (-1, 10)),
        *(("delay", {"delay": text}) for text in ("-0.000000001s", "31622400.000000001s")),
        ("schedule_time", {"schedule_time": far}),
        ("expire_time", {"expire_time": far}),
        *(("ttl", {"ttl": text}) for text in ("0s", "-1s", "31622400.000000001s")),
        *(("max_attempts", {"max_attempts": number}) for number in (-1, 101)),
        *_bad_policies(),
        *(
            ("timeout", {"timeout": text})
            for text in ("0s", "0.999999999s", "86400.000000001s", "-5s")
        ),
        *(("idempotency_key", {"idempotency_key": text}) for text in (long, "a\nb", "\u0085")),
        *(
            ("retention", {"retention": text})
            for text in ("0s", "3599.999999999s", "31622400.000000001s")
        ),
        *((f'labels["{key}"]', {"labels": {key: "x"}}) for key in ("", "A", "1", "a" * 64)),
        *(('labels["x"]', {"labels": {"x": text}}) for text in (long, "a\tb")),
        ("labels", {"labels": {f"k{number}": "" for number in range(33)}}),
        ("payload_blob.content_type", {"payload_blob": {"content_type": "a\r\nb"}}),
    ]


def _bad_policies() -> list[tuple[str, Json]]:
    bad: list[tuple[str, Any]] = [
        ("initial_backoff", "-0.000000001s"),
        ("initial_backoff", "86400.000000001s"),
        ("backoff_multiplier", 0.99),
        ("backoff_multiplier", 10.01),
        ("max_backoff", "9.999999999s"),  # below the default of initial_backoff
        ("max_backoff", "86400.000000001s"),
        ("jitter", -0.01),
        ("jitter", 1.01),
    ]
    found = [(f"retry_policy.{name}", {"retry_policy": {name: value}}) for name, value in bad]
    below = {"initial_backoff": "20s", "max_backoff": "19.999999999s"}
    return [*found, ("retry_policy.max_backoff", {"retry_policy": below})]


@scenario()
def what_is_out_of_its_range_is_refused(scene: Scene) -> None:
    """Never clamped; in a SubmitJobs each path begins with its request."""
    bad = _bad(scene)
    for start in range(0, len(bad), CHUNK):
        chunk = bad[start : start + CHUNK]
        requests = [{"job_type": scene.idle, **fragment} for _, fragment in chunk]
        paths = {f"requests[{index}].{path}" for index, (path, _) in enumerate(chunk)}
        scene.invalid(paths, "SubmitJobs", requests=requests)


@scenario()
def the_bounds_themselves_are_accepted(scene: Scene) -> None:
    good: list[Json] = [
        {"job_type": "a" * 100},
        {"job_type": "a"},
        {"job_type": "a0_.-"},
        {"queue": "q" * 50},
        {"priority": 9},
        {"delay": "0s"},
        {"delay": "31622400s"},
        {"schedule_time": timestamp(now() + 366 * DAY - timedelta(minutes=5))},
        {"schedule_time": "0001-01-01T00:00:00Z"},
        {"expire_time": timestamp(now() + 366 * DAY - timedelta(minutes=5))},
        {"expire_time": "1999-12-31T23:59:59Z"},
        {"ttl": "0.000000001s"},
        {"ttl": "31622400s"},
        *({"max_attempts": number} for number in (0, 1, 100)),
        {"retry_policy": {"initial_backoff": "0s", "max_backoff": "0s"}},
        {"retry_policy": {"initial_backoff": "86400s", "max_backoff": "86400s"}},
        {"retry_policy": {"max_backoff": "10s"}},
        *({"retry_policy": {"backoff_multiplier": number}} for number in (1.0, 10.0)),
        *({"retry_policy": {"jitter": number}} for number in (0.0, 1.0)),
        {"timeout": "1s"},
        {"timeout": "86400s"},
        {"idempotency_key": scene.tag.ljust(255, "ü")},
        {"retention": "3600s"},
        {"retention": "31622400s"},
        {"labels": {f"a{number}".ljust(63, "x"): "ü" * 255 for number in range(32)}},
        {"payload_blob": {"content_type": "", "data": ""}},
    ]
    requests = [{"job_type": scene.idle, **each, "validate_only": True} for each in good]
    answers = scene.ok("SubmitJobs", requests=requests)["responses"]
    assert len(answers) == len(good)
    assert not any(answer.get("job", {}).get("job_id") for answer in answers)


@scenario()
def a_payload_has_its_limits(scene: Scene) -> None:
    """1 MiB encoded, 100,000 values, 32 levels; no NUL."""
    padded = _struct_of(MIB)
    deep: Json = {}
    for _ in range(31):
        deep = {"d": deep}
    good = (padded, deep, {"list": [True] * 99_990})
    for payload in good:
        scene.ok("SubmitJob", job_type=scene.idle, payload=payload, validate_only=True)
    longer = {"pad": f"{padded['pad']}x"}
    scene.invalid("payload", "SubmitJob", job_type=scene.idle, payload=longer)
    bad = ({"d": deep}, {"list": [True] * 100_001}, {"a": {"b": "x\0y"}}, {"a\0b": 1})
    for payload in bad:
        reply = scene.refused(
            "INVALID_ARGUMENT", "INVALID_FIELD", "SubmitJob", job_type=scene.idle, payload=payload
        )
        assert all(path.startswith("payload") for path in reply.fields), reply.fields
        assert len(reply.fields) == 1, reply.fields


def _struct_of(size: int) -> Json:
    """A payload of exactly so many bytes as an encoded Struct."""
    overhead = size - len("pad")
    payload = {"pad": "x" * overhead}
    while (excess := ParseDict(payload, Struct()).ByteSize() - size) != 0:
        overhead -= excess
        payload = {"pad": "x" * overhead}
    return payload


@scenario()
def a_blob_has_its_limit(scene: Scene) -> None:
    data = base64.b64encode(bytes(MIB)).decode()
    request: Json = {"job_type": scene.idle, "validate_only": True}
    scene.ok("SubmitJob", **request, payload_blob={"data": data})
    longer = base64.b64encode(bytes(MIB + 1)).decode()
    scene.invalid("payload_blob.data", "SubmitJob", **request, payload_blob={"data": longer})


@scenario()
def a_payload_is_checked_against_its_schema(scene: Scene) -> None:
    """As the workers announced it; each violation by its path."""
    scene.invalid(
        {"payload.seconds", "payload.steps"},
        "SubmitJob",
        job_type="demo.sleep",
        payload={"seconds": "one", "steps": 0},
    )
    scene.invalid("payload.sekonds", "SubmitJob", job_type="demo.sleep", payload={"sekonds": 1})
    scene.invalid(
        {"payload.recipient_email", "payload.subject", "payload.body"},
        "SubmitJob",
        job_type="send_email",
    )


# Many at once.


@scenario()
def many_are_answered_in_order(scene: Scene) -> None:
    requests = [{"job_type": scene.idle, "labels": {"n": str(number)}} for number in range(20)]
    answers = scene.ok("SubmitJobs", requests=requests)["responses"]
    assert [answer["job"]["labels"]["n"] for answer in answers] == [str(n) for n in range(20)]
    assert len({answer["job"]["job_id"] for answer in answers}) == 20


@scenario()
def many_are_all_or_none(scene: Scene) -> None:
    good: Json = {"job_type": scene.idle, "idempotency_key": scene.tag}
    bad: Json = {"job_type": scene.idle, "queue": "Q"}
    scene.invalid("requests[1].queue", "SubmitJobs", requests=[good, bad])
    other = {**good, "priority": 1}
    refused = scene.refused(
        "ALREADY_EXISTS", "IDEMPOTENCY_KEY_REUSED", "SubmitJobs", requests=[good, good, other]
    )
    assert refused.metadata["index"] == "2"
    stored = scene.ok("SubmitJob", **good)
    assert "already_existed" not in stored


@scenario()
def a_key_twice_in_one_call_is_one_job(scene: Scene) -> None:
    request: Json = {"job_type": scene.idle, "idempotency_key": scene.tag}
    first, second = scene.ok("SubmitJobs", requests=[request, request])["responses"]
    assert first["job"]["job_id"] == second["job"]["job_id"]
    assert "already_existed" not in first
    assert second["already_existed"] is True


@scenario()
def a_call_takes_a_thousand(scene: Scene) -> None:
    labels = {"run": scene.tag}
    request: Json = {"job_type": scene.idle, "labels": labels, "delay": "3600s"}
    answers = scene.ok("SubmitJobs", requests=[request] * 1000)["responses"]
    assert len({answer["job"]["job_id"] for answer in answers}) == 1000
    cancelled = scene.ok("CancelJobs", filter={"labels": labels})
    assert cancelled == {"matched_count": 1000, "changed_count": 1000}
    scene.job_ids.clear()
    scene.invalid("requests", "SubmitJobs", requests=[request] * 1001)
    scene.invalid("requests", "SubmitJobs")


@scenario()
def a_call_takes_four_mib(scene: Scene) -> None:
    """A message just over it is told so, and not merely cut off."""
    full: Json = {"job_type": scene.idle, "payload": _struct_of(MIB), "validate_only": True}

    def requests(size: int) -> list[Json]:
        made = [full, full, full, {**full, "payload": {"pad": ""}}]
        room = size - ParseDict({"requests": made}, SubmitJobsRequest()).ByteSize()
        while True:
            made[-1] = {**full, "payload": {"pad": "x" * room}}
            excess = ParseDict({"requests": made}, SubmitJobsRequest()).ByteSize() - size
            if not excess:
                return made
            room -= excess

    scene.ok("SubmitJobs", requests=requests(4 * MIB))
    scene.invalid("requests", "SubmitJobs", requests=requests(4 * MIB + 1))


# Only validated.


@scenario()
def validate_only_stores_nothing(scene: Scene) -> None:
    request: Json = {"job_type": scene.idle, "idempotency_key": scene.tag, "priority": 3}
    preview = scene.ok("SubmitJob", **request, validate_only=True)
    assert not preview["job"].get("job_id"), preview
    assert preview["job"]["priority"] == 3
    assert preview["job"]["queue"] == "default"
    assert "already_existed" not in preview
    stored = scene.ok("SubmitJob", **request)
    assert "already_existed" not in stored
    again = scene.ok("SubmitJob", **request, validate_only=True)
    assert again["job"]["job_id"] == stored["job"]["job_id"]
    assert again["already_existed"] is True
    scene.refused(
        "ALREADY_EXISTS",
        "IDEMPOTENCY_KEY_REUSED",
        "SubmitJob",
        **{**request, "priority": 4},
        validate_only=True,
    )
    scene.invalid("queue", "SubmitJob", **request, queue="Q", validate_only=True)


# RunJob.


@scenario()
def run_ends_with_the_result(scene: Scene) -> None:
    request = {"job_type": "demo.echo", "payload": {"a": 1}}
    with scene.stream("RunJob", request=request) as stream:
        messages = list(stream)
        assert stream.reply.code == "OK", stream.reply
    events = [message["event"] for message in messages if "event" in message]
    assert steps(events) == [
        ("SUBMITTED", "QUEUED"),
        ("STARTED", "RUNNING"),
        ("SUCCEEDED", "SUCCEEDED"),
    ]
    result = messages[-1]["result"]
    assert result["job_id"] == events[0]["job_id"]
    assert (state(result), result["result"]) == ("SUCCEEDED", {"a": 1})


@scenario()
def run_of_a_job_that_fails_is_ok_too(scene: Scene) -> None:
    request = {"job_type": "demo.fail", "payload": {"retryable": False}}
    with scene.stream("RunJob", request=request) as stream:
        messages = list(stream)
        assert stream.reply.code == "OK", stream.reply
    assert state(messages[-1]["result"]) == "FAILED"
    assert messages[-1]["result"]["error"]["message"] == "attempt 1 of 1 that fail"


@scenario()
def run_goes_on_when_its_caller_hangs_up(scene: Scene) -> None:
    request = {"job_type": "demo.sleep", "payload": {"seconds": 0.5}}
    with scene.stream("RunJob", request=request) as stream:
        job_id = next(message["event"]["job_id"] for message in stream if "event" in message)
    assert scene.succeeded(job_id) == {"seconds": 0.5, "steps": 1}


@scenario()
def run_replays_the_job_that_its_key_has(scene: Scene) -> None:
    request = {"job_type": "demo.echo", "idempotency_key": scene.tag}
    job_id = scene.run(idempotency_key=scene.tag)
    with scene.stream("RunJob", request=request) as stream:
        messages = list(stream)
    assert messages[-1]["result"]["job_id"] == job_id
    events = [message["event"] for message in messages if "event" in message]
    assert types(events) == ["SUBMITTED", "STARTED", "SUCCEEDED"]


@scenario()
def run_names_its_bad_fields(scene: Scene) -> None:
    scene.invalid({"request.job_type", "request.queue"}, "RunJob", request={"queue": "Q"})
    scene.invalid("request.job_type", "RunJob")
    idle: Json = {"job_type": scene.idle}
    scene.invalid("request.validate_only", "RunJob", request={**idle, "validate_only": True})
    scene.invalid("request.payload.steps", "RunJob", request=_sleep_of_no_steps())
    for text in ("0s", "0.999s", "50.001s"):
        scene.invalid("heartbeat_interval", "RunJob", request=idle, heartbeat_interval=text)


def _sleep_of_no_steps() -> Json:
    return {"job_type": "demo.sleep", "payload": {"steps": 0}}


# Attempts.


@scenario()
def a_failed_attempt_is_tried_again(scene: Scene) -> None:
    job_id = scene.submit("demo.fail", payload={"times": 2}, retry_policy=NO_BACKOFF)["job_id"]
    assert scene.succeeded(job_id) == {"attempt": 3}
    events = scene.history(job_id)
    again = [("ATTEMPT_FAILED", "RETRYING"), ("QUEUED", "QUEUED"), ("STARTED", "RUNNING")]
    assert steps(events) == [
        ("SUBMITTED", "QUEUED"),
        ("STARTED", "RUNNING"),
        *again,
        *again,
        ("SUCCEEDED", "SUCCEEDED"),
    ]
    assert [event.get("attempt", 0) for event in events] == [0, 1, 1, 1, 2, 2, 2, 3, 3]
    failed = events[2]
    assert failed["error"]["type"] == "DemoError"
    assert failed["error"]["message"] == "attempt 1 of 2 that fail"
    assert failed["error"]["retryable"] is True
    assert "DemoError" in failed["error"]["traceback"]
    assert moment(failed["next_attempt_time"]) >= moment(failed["event_time"])


@scenario()
def a_budget_that_is_used_up_ends_the_job(scene: Scene) -> None:
    job_id = scene.run("demo.fail", payload={"times": 9}, max_attempts=2, retry_policy=NO_BACKOFF)
    events = scene.history(job_id)
    assert steps(events)[-2:] == [("ATTEMPT_FAILED", "RUNNING"), ("FAILED", "FAILED")]
    assert types(events).count("ATTEMPT_FAILED") == 2
    assert "next_attempt_time" not in events[-2]
    job = scene.get(job_id)
    assert job["attempt"] == 2
    for error in (events[-1]["error"], job["error"], scene.ended(job_id)["error"]):
        assert (error["type"], error["retryable"]) == ("DemoError", True)


@scenario()
def the_backoff_is_as_the_policy_says(scene: Scene) -> None:
    """min(max, initial * multiplier^(n-1)), within the jitter."""
    policy = {
        "initial_backoff": "100s",
        "backoff_multiplier": 3.0,
        "max_backoff": "500s",
        "jitter": 0.1,
    }
    job_id = scene.submit("demo.fail", payload={"times": 9}, retry_policy=policy)["job_id"]
    failed = scene.happened(job_id, "ATTEMPT_FAILED")
    wait = (moment(failed["next_attempt_time"]) - moment(failed["event_time"])).total_seconds()
    assert 89 <= wait <= 111, wait
    job = scene.get(job_id)
    assert state(job) == "RETRYING"
    assert moment(job["next_attempt_time"]) == moment(failed["next_attempt_time"])
    assert job["error"]["type"] == "DemoError"


@scenario()
def an_attempt_that_must_not_be_repeated_ends_the_job(scene: Scene) -> None:
    job_id = scene.run("demo.fail", payload={"retryable": False}, max_attempts=9)
    assert types(scene.history(job_id)) == ["SUBMITTED", "STARTED", "ATTEMPT_FAILED", "FAILED"]
    assert "retryable" not in scene.ended(job_id)["error"]


@scenario()
def an_attempt_has_its_time(scene: Scene) -> None:
    payload = {"seconds": 60}
    job_id = scene.run("demo.sleep", payload=payload, timeout="1s", max_attempts=1)
    assert scene.ended(job_id)["error"]["type"] == "TIMEOUT"


@scenario()
def the_third_lost_worker_ends_the_job(scene: Scene) -> None:
    job_id = scene.run("demo.crash", max_attempts=50, retry_policy=NO_BACKOFF)
    events = scene.history(job_id)
    failures = [event for event in events if "error" in event]
    assert types(failures) == ["ATTEMPT_FAILED"] * 3 + ["FAILED"]
    assert {event["error"]["type"] for event in failures} == {"WORKER_LOST"}


@scenario()
def progress_is_told(scene: Scene) -> None:
    job_id = scene.submit("demo.sleep", payload={"seconds": 0.6, "steps": 2})["job_id"]
    with scene.stream("WatchJob", job_id=job_id) as stream:
        told = [event["progress"] for event in events_of(stream) if "progress" in event]
    assert told[-1] == {"current": 2.0, "total": 2.0, "message": "step 2 of 2"}
    assert scene.get(job_id)["progress"] == told[-1]
