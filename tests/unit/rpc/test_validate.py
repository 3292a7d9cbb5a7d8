"""Every rule of the requests: what is just allowed, and what just is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf import text_format
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.struct_pb2 import Struct, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from generated.jobsvc.v1 import job_service_pb2 as pb
from jobsvc.core.attempts import JobTypeInfo
from jobsvc.errors import InvalidRequest, Violation
from jobsvc.rpc import validate
from jobsvc.rpc.validate import payload as payload_rules

NOW = 1_800_000_000_250_000_000
DAYS_366 = 366 * 86_400
AHEAD = 1_800_000_000 + DAYS_366
JOB_ID = "01a20fd4-d592-729d-9646-b420d5e14aab"
MIB = 1024 * 1024


def fields(violations: list[Violation]) -> list[str]:
    return [violation.field for violation in violations]


def submit(request: pb.SubmitJobRequest, **types: JobTypeInfo) -> list[str]:
    return fields(validate.submit_job(request, types, NOW))


def request(text: str = "") -> pb.SubmitJobRequest:
    """In protobuf's text form, of the type `demo` unless it says otherwise."""
    made = pb.SubmitJobRequest(job_type="demo")
    return text_format.Merge(text, made, allow_unknown_extension=False)


ALLOWED = [
    "",
    "job_type: 'a'",
    f"job_type: 'a{'_.-9z' * 19}abcd'",
    "queue: 'q.w-e_1'",
    f"queue: 'q{'x' * 49}'",
    "priority: 9",
    "max_attempts: 0",
    "max_attempts: 100",
    "schedule_time { seconds: -62135596800 }",
    f"schedule_time {{ seconds: {AHEAD} nanos: 250000000 }}",
    f"expire_time {{ seconds: {AHEAD} }}",
    "expire_time { seconds: 0 }",
    "delay {}",
    f"delay {{ seconds: {DAYS_366} }}",
    "ttl { nanos: 1 }",
    f"ttl {{ seconds: {DAYS_366} }}",
    "timeout { seconds: 1 }",
    "timeout { seconds: 86400 }",
    "retention { seconds: 3600 }",
    f"retention {{ seconds: {DAYS_366} }}",
    "idempotency_key: ''",
    f"idempotency_key: '{'ü' * 255}'",
    "idempotency_key: '\\u00a0\\u3000 a'",  # spaces are no control characters
    f"labels {{ key: 'a{'b' * 62}' value: '{'v' * 255}' }}",
    "labels { key: 'a' value: '' }",
    " ".join(f"labels {{ key: 'k{n}' value: 'v' }}" for n in range(32)),
    "retry_policy {}",
    "retry_policy { initial_backoff {} max_backoff {} backoff_multiplier: 1 jitter: 0 }",
    "retry_policy { initial_backoff { seconds: 86400 } backoff_multiplier: 10 jitter: 1 }",
    "retry_policy { max_backoff { seconds: 10 } }",
    "retry_policy { initial_backoff { seconds: 7200 } max_backoff { seconds: 86400 } }",
    "payload {}",
    "payload_blob {}",
    "payload_blob { content_type: 'image/png' data: '\\000\\377' }",
    "validate_only: true",
    f"unique {{ key: '{'k' * 255}' }}",
    "unique { key: 'k' scope: UNIQUE_SCOPE_WAITING on_conflict: UNIQUE_CONFLICT_REPLACE }",
    f"concurrency {{ key: '{'k' * 255}' max_running: 1 }}",
    "concurrency { key: 'k' max_running: 10000 }",
]


@pytest.mark.parametrize("text", ALLOWED)
def test_what_is_allowed(text: str) -> None:
    assert submit(request(text)) == []


REFUSED = [
    ("unique {}", "unique.key"),
    (f"unique {{ key: '{'k' * 256}' }}", "unique.key"),
    ("unique { key: 'a\\n' }", "unique.key"),
    ("unique { key: 'k' scope: 9 }", "unique.scope"),
    ("unique { key: 'k' on_conflict: 9 }", "unique.on_conflict"),
    ("concurrency { max_running: 1 }", "concurrency.key"),
    ("concurrency { key: 'k' }", "concurrency.max_running"),
    ("concurrency { key: 'k' max_running: 10001 }", "concurrency.max_running"),
    ("job_type: ''", "job_type"),
    ("job_type: 'A'", "job_type"),
    ("job_type: '1a'", "job_type"),
    ("job_type: 'a b'", "job_type"),
    ("job_type: 'a\\n'", "job_type"),
    (f"job_type: 'a{'b' * 100}'", "job_type"),
    ("queue: 'Q'", "queue"),
    (f"queue: 'q{'x' * 50}'", "queue"),
    ("priority: -1", "priority"),
    ("priority: 10", "priority"),
    ("max_attempts: -1", "max_attempts"),
    ("max_attempts: 101", "max_attempts"),
    (f"schedule_time {{ seconds: {AHEAD} nanos: 250000001 }}", "schedule_time"),
    ("schedule_time { nanos: -1 }", "schedule_time"),
    ("schedule_time { nanos: 1000000000 }", "schedule_time"),
    ("schedule_time { seconds: -62135596801 }", "schedule_time"),
    ("schedule_time { seconds: 253402300800 }", "schedule_time"),
    (f"expire_time {{ seconds: {AHEAD + 1} }}", "expire_time"),
    ("expire_time { seconds: 9223372036854775807 }", "expire_time"),
    ("delay { nanos: -1 }", "delay"),
    (f"delay {{ seconds: {DAYS_366} nanos: 1 }}", "delay"),
    ("delay { seconds: 1 nanos: -1 }", "delay"),
    ("delay { nanos: 1000000000 }", "delay"),
    ("delay { seconds: 9223372036854775807 }", "delay"),
    ("ttl {}", "ttl"),
    ("ttl { seconds: -1 }", "ttl"),
    (f"ttl {{ seconds: {DAYS_366} nanos: 1 }}", "ttl"),
    ("timeout {}", "timeout"),
    ("timeout { nanos: 999999999 }", "timeout"),
    ("timeout { seconds: 86400 nanos: 1 }", "timeout"),
    ("timeout { seconds: 2 nanos: -1 }", "timeout"),
    ("retention {}", "retention"),
    ("retention { seconds: 3599 nanos: 999999999 }", "retention"),
    (f"retention {{ seconds: {DAYS_366} nanos: 1 }}", "retention"),
    (f"idempotency_key: '{'k' * 256}'", "idempotency_key"),
    ("idempotency_key: 'a\\000'", "idempotency_key"),
    ("idempotency_key: 'a\\n'", "idempotency_key"),
    ("idempotency_key: '\\u0085'", "idempotency_key"),
    ("idempotency_key: '\\x7f'", "idempotency_key"),
    ("labels { key: 'x' value: 'a\\tb' }", 'labels["x"]'),
    ("labels { key: 'X' value: '' }", 'labels["X"]'),
    ("labels { key: '' value: '' }", 'labels[""]'),
    (f"labels {{ key: 'x' value: '{'v' * 256}' }}", 'labels["x"]'),
    ("labels { key: '\"\\n' value: '' }", 'labels["\\"\\n"]'),
    (f"labels {{ key: 'a{'b' * 63}' value: '' }}", f'labels["a{"b" * 63}"]'),
    (" ".join(f"labels {{ key: 'k{n}' value: 'v' }}" for n in range(33)), "labels"),
    ("retry_policy { initial_backoff { seconds: -1 } }", "retry_policy.initial_backoff"),
    ("retry_policy { initial_backoff { seconds: 86401 } }", "retry_policy.initial_backoff"),
    ("retry_policy { backoff_multiplier: 0.99 }", "retry_policy.backoff_multiplier"),
    ("retry_policy { backoff_multiplier: 10.01 }", "retry_policy.backoff_multiplier"),
    ("retry_policy { backoff_multiplier: nan }", "retry_policy.backoff_multiplier"),
    ("retry_policy { jitter: -0.01 }", "retry_policy.jitter"),
    ("retry_policy { jitter: 1.01 }", "retry_policy.jitter"),
    ("retry_policy { jitter: nan }", "retry_policy.jitter"),
    ("retry_policy { max_backoff { seconds: 86401 } }", "retry_policy.max_backoff"),
    ("retry_policy { max_backoff { seconds: 9 } }", "retry_policy.max_backoff"),
    (
        "retry_policy { initial_backoff { seconds: 60 } max_backoff { seconds: 59 } }",
        "retry_policy.max_backoff",
    ),
    ("payload_blob { content_type: 'a\\nb' }", "payload_blob.content_type"),
    (f"payload_blob {{ content_type: '{'x' * 256}' }}", "payload_blob.content_type"),
    ("payload { fields { key: 'a' value {} } }", "payload.a"),
    ("payload { fields { key: 'a' value { number_value: nan } } }", "payload.a"),
    ("payload { fields { key: 'a' value { number_value: -inf } } }", "payload.a"),
    ("payload { fields { key: 'a' value { string_value: 'x\\000' } } }", "payload.a"),
    ("payload { fields { key: 'a\\000' value { bool_value: true } } }", "payload"),
    ("payload { fields { key: 'a b' value {} } }", 'payload["a b"]'),
    (
        (
            "payload { fields { key: 'a' value { list_value { values { bool_value: true }"
            " values { struct_value { fields { key: 'b' value {} } } } } } } }"
        ),
        "payload.a[1].b",
    ),
]


@pytest.mark.parametrize(("text", "field"), REFUSED)
def test_what_is_refused_and_where(text: str, field: str) -> None:
    assert submit(request(text)) == [field]


def test_every_violation_is_told_at_once() -> None:
    bad = request(
        "job_type: '' queue: 'Q' priority: 10 max_attempts: 101 idempotency_key: '\\n'"
        " labels { key: 'X' value: '' } delay { seconds: -1 } ttl {} timeout {} retention {}"
        " retry_policy { jitter: 2 } payload { fields { key: 'a' value {} } }"
    )
    assert set(submit(bad)) == {
        *("job_type", "queue", "priority", "max_attempts", "idempotency_key", 'labels["X"]'),
        *("delay", "ttl", "timeout", "retention", "retry_policy.jitter", "payload.a"),
    }


# Payloads.


def nested(depth: int, kind: str) -> pb.SubmitJobRequest:
    """The payload is level 1 of `depth`; objects, lists, or both in turn."""
    made = request()
    value = made.payload.fields["a"]
    for level in range(depth - 1):
        if kind == "object" or (kind == "both" and level % 2):
            value = value.struct_value.fields["a"]
        else:
            value = value.list_value.values.add()
    value.bool_value = True
    return made


@pytest.mark.parametrize("kind", ["object", "list", "both"])
def test_payloads_have_32_levels(kind: str) -> None:
    assert submit(nested(32, kind)) == []
    (field,) = submit(nested(33, kind))
    assert field.startswith("payload.a")
    (field,) = submit(nested(90, kind))
    assert field.startswith("payload.a")


def test_a_payload_holds_100_000_values() -> None:
    made = request()
    values = made.payload.fields["a"].list_value.values
    values.extend([Value(bool_value=True)] * 99_999)
    assert submit(made) == []
    values.add().bool_value = True
    assert submit(made) == ["payload"]


@pytest.mark.parametrize("size", [MIB, MIB + 1])
def test_a_payload_has_a_mebibyte(size: int) -> None:
    made = request("payload { fields { key: 'a' value { string_value: '' } } }")
    made.payload.fields["a"].string_value = "x" * (size - 20)
    made.payload.fields["a"].string_value += "x" * (size - made.payload.ByteSize())
    assert made.payload.ByteSize() == size
    assert submit(made) == (["payload"] if size > MIB else [])
    made.payload_blob.data = b"x" * size
    assert submit(made) == (["payload_blob.data"] if size > MIB else [])


def test_violations_are_bounded() -> None:
    made = request()
    made.payload.fields["a"].list_value.values.extend([Value()] * 1_000)
    assert len(submit(made)) == 100
    made.payload.Clear()
    for number in range(1_000):
        made.payload.fields[f"{number}\0"].null_value = 0  # type: ignore[assignment]
    assert len(submit(made)) == 100
    many = pb.SubmitJobsRequest(requests=[request("priority: 10 max_attempts: 101")] * 1_000)
    with pytest.raises(InvalidRequest) as caught:
        validate.check(validate.submit_jobs(many, {}, NOW))
    assert len(caught.value.violations) == 100


def test_paths_are_bounded() -> None:
    made = request()
    value = made.payload.fields["k" * 60]
    for _ in range(20):
        value = value.struct_value.fields["k" * 60]
    (path,) = submit(made)
    assert path.startswith(f"payload.{'k' * 60}.{'k' * 60}")
    assert len(path) < payload_rules.PATH_CHARACTERS_MAX + 100


# Schemas.


def demo(schema: Any) -> JobTypeInfo:
    return JobTypeInfo("demo", payload_schema=json.dumps(schema))


MAIL = demo(
    {
        "type": "object",
        "properties": {
            "to": {"type": "string"},
            "count": {"type": "integer", "maximum": 3},
            "tags": {"type": "array", "items": {"type": "string"}},
            "from": {"type": "object", "required": ["name"]},
        },
        "required": ["to"],
        "additionalProperties": False,
    }
)


def payload(**values: Any) -> pb.SubmitJobRequest:
    made = request()
    made.payload.update(values)
    return made


def test_a_payload_that_meets_its_schema() -> None:
    assert submit(payload(to="x", count=3, tags=["a"]), demo=MAIL) == []
    # Known to no worker, or of another type: there is nothing to check.
    assert submit(payload(count="x")) == []
    assert submit(payload(count="x"), other=MAIL) == []
    assert submit(payload(count="x"), demo=JobTypeInfo("demo")) == []


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({}, "payload.to"),
        ({"to": 1}, "payload.to"),
        ({"to": "x", "count": 1.5}, "payload.count"),
        ({"to": "x", "count": 4}, "payload.count"),
        ({"to": "x", "tags": ["a", None]}, "payload.tags[1]"),
        ({"to": "x", "from": {}}, "payload.from.name"),
        ({"to": "x", "cc": "y"}, "payload.cc"),
        ({"to": "x", "c c": "y"}, 'payload["c c"]'),
    ],
)
def test_a_payload_that_breaks_its_schema(values: dict[str, Any], field: str) -> None:
    assert submit(payload(**values), demo=MAIL) == [field]


def test_an_absent_payload_is_the_empty_object() -> None:
    assert submit(request(), demo=MAIL) == ["payload.to"]


def test_a_schema_is_checked_together_with_all_other_rules() -> None:
    bad = payload(to=1)
    bad.priority = 10
    assert submit(bad, demo=MAIL) == ["priority", "payload.to"]


def test_a_type_with_a_schema_takes_no_blob() -> None:
    assert submit(request("payload_blob {}"), demo=MAIL) == ["payload_blob"]


def test_descriptions_do_not_repeat_what_was_sent() -> None:
    bad = payload(to=["hunter2"], count="hunter2", tags="hunter2")
    violations = validate.submit_job(bad, {"demo": MAIL}, NOW)
    assert len(violations) == 3
    assert "hunter2" not in str(violations)


@pytest.mark.parametrize(
    "schema", [{"type": "nonsense"}, {"$ref": "http://127.0.0.1:1/x"}, {"pattern": "("}, 3]
)
def test_a_schema_that_is_none_checks_nothing(schema: Any) -> None:
    assert submit(payload(a=1), demo=demo(schema)) == []


@pytest.mark.parametrize(("values", "count"), [(500, 100), (900, 100), (2_000, 1)])
def test_violations_of_a_schema_are_bounded(values: int, count: int) -> None:
    """Of a payload of many values the first alone is told, as to find all takes seconds."""
    strings = demo({"additionalProperties": {"type": "string"}})
    assert len(submit(payload(**dict.fromkeys(map(str, range(values)), 1)), demo=strings)) == count


@pytest.mark.parametrize(("values", "count"), [(500, 100), (2_000, 1)])
def test_unknown_members_that_are_told_are_bounded(values: int, count: int) -> None:
    none = demo({"properties": {"a": {}}, "additionalProperties": False})
    assert len(submit(payload(**dict.fromkeys(map(str, range(values)), 1)), demo=none)) == count


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(), json_values))
def test_a_schema_sees_the_json_that_was_sent(value: dict[str, Any]) -> None:
    struct = Struct()
    struct.update(value)
    read = payload_rules._read(struct, payload_rules._Reader())
    violations = payload_rules._violations(struct, "payload")
    assert (read is None) == bool(violations)
    if not violations:
        assert read == value


# The other requests.


def test_paths_in_a_list_of_requests() -> None:
    good, bad = request(), request("queue: 'Q' labels { key: 'x' value: '\\n' }")
    many = pb.SubmitJobsRequest(requests=[good, bad, good, bad])
    assert fields(validate.submit_jobs(many, {}, NOW)) == [
        *("requests[1].queue", 'requests[1].labels["x"]'),
        *("requests[3].queue", 'requests[3].labels["x"]'),
    ]


@pytest.mark.parametrize(("count", "found"), [(0, 1), (1, 0), (1_000, 0), (1_001, 1)])
def test_a_list_has_1_to_1000_requests(count: int, found: int) -> None:
    many = pb.SubmitJobsRequest(requests=[request()] * count)
    assert fields(validate.submit_jobs(many, {}, NOW)) == ["requests"] * found


def test_a_list_has_4_mebibytes() -> None:
    blob = request()
    blob.payload_blob.data = b"x" * MIB
    many = pb.SubmitJobsRequest(requests=[blob] * 4)
    assert fields(validate.submit_jobs(many, {}, NOW)) == ["requests"]


def test_run_job() -> None:
    def run(text: str) -> list[str]:
        return fields(validate.run_job(text_format.Parse(text, pb.RunJobRequest()), {}, NOW))

    assert run("request { job_type: 'a' }") == []
    assert run("") == ["request.job_type"]
    assert run("request { job_type: 'a' validate_only: true }") == ["request.validate_only"]
    assert run("request { job_type: 'a' queue: 'Q' } heartbeat_interval {}") == [
        *("request.queue", "heartbeat_interval")
    ]


JOB_ID_REQUESTS: list[Callable[[str], list[Violation]]] = [
    lambda job_id: validate.get_job(pb.GetJobRequest(job_id=job_id)),
    lambda job_id: validate.get_result(pb.GetResultRequest(job_id=job_id)),
    lambda job_id: validate.watch_job(pb.WatchJobRequest(job_id=job_id)),
    lambda job_id: validate.list_job_events(pb.ListJobEventsRequest(job_id=job_id)),
    lambda job_id: validate.cancel_job(pb.CancelJobRequest(job_id=job_id)),
    lambda job_id: validate.retry_job(pb.RetryJobRequest(job_id=job_id)),
    lambda job_id: validate.delete_job(pb.DeleteJobRequest(job_id=job_id)),
    lambda job_id: validate.update_job(
        pb.UpdateJobRequest(job_id=job_id, update_mask=FieldMask(paths=["priority"])), NOW
    ),
]


@pytest.mark.parametrize("check", JOB_ID_REQUESTS)
def test_job_ids_are_canonical(check: Callable[[str], list[Violation]]) -> None:
    assert check(JOB_ID) == []
    other_forms = (
        *("", "x", JOB_ID.upper(), JOB_ID.replace("-", ""), f"{{{JOB_ID}}}", f"{JOB_ID}\n"),
        *(f" {JOB_ID}", f"urn:uuid:{JOB_ID}", JOB_ID[:-1]),
        JOB_ID.replace("0", "\N{ARABIC-INDIC DIGIT ZERO}"),
    )
    for other in other_forms:
        assert fields(check(other)) == ["job_id"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ("wait {}", []),
        ("wait { seconds: 50 }", []),
        ("wait { seconds: 50 nanos: 1 }", ["wait"]),
        ("wait { nanos: -1 }", ["wait"]),
    ],
)
def test_get_result(text: str, found: list[str]) -> None:
    made = text_format.Merge(text, pb.GetResultRequest(job_id=JOB_ID))
    assert fields(validate.get_result(made)) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("after_sequence: 9223372036854775807", []),
        ("after_sequence: -1", ["after_sequence"]),
        ("heartbeat_interval { seconds: 1 }", []),
        ("heartbeat_interval { seconds: 50 }", []),
        ("heartbeat_interval {}", ["heartbeat_interval"]),
        ("heartbeat_interval { nanos: 999999999 }", ["heartbeat_interval"]),
        ("heartbeat_interval { seconds: 50 nanos: 1 }", ["heartbeat_interval"]),
        (
            "after_sequence: -1 heartbeat_interval {} job_id: 'x'",
            ["job_id", "after_sequence", "heartbeat_interval"],
        ),
    ],
)
def test_watch_job(text: str, found: list[str]) -> None:
    made = text_format.Merge(text, pb.WatchJobRequest(job_id="" if "job_id" in text else JOB_ID))
    assert fields(validate.watch_job(made)) == found


def test_list_job_events() -> None:
    made = pb.ListJobEventsRequest(job_id=JOB_ID, page_size=2**31 - 1)
    assert validate.list_job_events(made) == []
    made.page_size = made.after_sequence = -1
    assert fields(validate.list_job_events(made)) == ["after_sequence", "page_size"]


@pytest.mark.parametrize(
    ("reason", "found"),
    [("", []), ("ü" * 1_000, []), ("x" * 1_001, ["reason"]), ("a\nb", ["reason"])],
)
def test_cancel_job(reason: str, found: list[str]) -> None:
    made = pb.CancelJobRequest(job_id=JOB_ID, reason=reason)
    assert fields(validate.cancel_job(made)) == found


@pytest.mark.parametrize(
    ("paths", "text", "found"),
    [
        ("priority", "priority: 9", []),
        ("priority", "", []),
        ("priority", "priority: 10", ["priority"]),
        ("priority", "priority: -1", ["priority"]),
        ("labels", "labels { key: 'a' value: 'b' }", []),
        ("labels", "", []),
        ("labels", "labels { key: 'A' value: 'b' }", ['labels["A"]']),
        ("schedule_time", "schedule_time {}", []),
        ("schedule_time", "", ["schedule_time"]),
        ("schedule_time", "schedule_time { nanos: -1 }", ["schedule_time"]),
        ("schedule_time", f"schedule_time {{ seconds: {NOW // 10**9 + 31_622_400} }}", []),
        (
            "schedule_time",
            f"schedule_time {{ seconds: {NOW // 10**9 + 31_622_401} }}",
            ["schedule_time"],
        ),
        ("", "priority: 1", ["update_mask"]),
        ("state", "", ["update_mask"]),
        ("priority,labels.a", "", ["update_mask"]),
        ("*", "", ["update_mask"]),
        ("priority,labels,priority", "schedule_time { nanos: -1 }", []),
        ("priority,queue", "priority: 10", ["update_mask", "priority"]),
    ],
)
def test_update_job(paths: str, text: str, found: list[str]) -> None:
    made = text_format.Merge(text, pb.UpdateJobRequest(job_id=JOB_ID))
    made.update_mask.paths.extend(path for path in paths.split(",") if path)
    assert fields(validate.update_job(made, NOW)) == found


def test_check_raises_what_was_found() -> None:
    validate.check([])
    found = [Violation("a", "is bad"), Violation("b", "is worse")]
    with pytest.raises(InvalidRequest, match="a: is bad; b: is worse") as caught:
        validate.check(found)
    assert caught.value.violations == found
