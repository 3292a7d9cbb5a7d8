from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from google.protobuf.struct_pb2 import Value
from hypothesis import given, settings
from hypothesis import strategies as st

from generated.jobsvc.v1 import job_pb2
from generated.jobsvc.v1.job_pb2 import JobEvent
from jobsvc.client import event_name, from_value, new_job, state_name, to_json
from jobsvc.client.convert import to_struct

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=8,
)


@settings(max_examples=50)
@given(st.dictionaries(TEXT, JSON))
def test_a_payload_comes_back_as_it_was(payload: dict[str, object]) -> None:
    assert from_value(Value(struct_value=to_struct(payload))) == payload


def test_whole_numbers_are_int() -> None:
    found = from_value(Value(struct_value=to_struct({"a": 1.0, "b": 2**53, "c": 0.5, "d": 1e300})))
    assert isinstance(found, dict)
    assert [type(value) for value in found.values()].count(int) == 2
    assert isinstance(found["d"], float)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (2**53 + 1, r"2\^53.*as a string"),
        (-(2**53) - 1, r"2\^53"),
        (10**400, r"2\^53"),
        (float("nan"), "nan is no JSON number"),
        (float("inf"), "inf is no JSON number"),
        ({1: 2}, "1 is no key"),
        (b"bytes", "bytes is no JSON value"),
        ({1, 2}, "set is no JSON value"),
        ("\ud800", "surrogates not allowed"),
    ],
    ids=range(9),
)
def test_what_json_cannot_hold_exactly_is_refused(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_struct({"a": value})


def test_depth_is_limited() -> None:
    def nested(levels: int) -> dict[str, object]:
        return {"a": nested(levels - 1)} if levels > 1 else {}

    assert from_value(Value(struct_value=to_struct(nested(32)))) == nested(32)
    with pytest.raises(ValueError, match="32 levels"):
        to_struct(nested(33))
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="32 levels"):
        to_struct({"a": loop})


def test_a_job_with_everything() -> None:
    request = new_job(
        "t",
        b"x",
        content_type="text/plain",
        queue="q",
        priority=3,
        delay=0.25,
        expire_time=datetime(2030, 1, 1, tzinfo=UTC),
        max_attempts=4,
        retry_policy=job_pb2.RetryPolicy(jitter=0),
        timeout=5,
        idempotency_key="k",
        retention=3600,
        labels={"a": "b"},
        validate_only=True,
    )
    assert json.loads(to_json(request)) == {
        "job_type": "t",
        "payload_blob": {"content_type": "text/plain", "data": "eA=="},
        "queue": "q",
        "priority": 3,
        "delay": "0.250s",
        "expire_time": "2030-01-01T00:00:00Z",
        "max_attempts": 4,
        "retry_policy": {"jitter": 0},
        "timeout": "5s",
        "idempotency_key": "k",
        "retention": "3600s",
        "labels": {"a": "b"},
        "validate_only": True,
    }


def test_what_is_left_out_is_not_sent() -> None:
    assert to_json(new_job("t")) == '{"job_type": "t"}'
    assert to_json(new_job("t", {})) == '{"job_type": "t", "payload": {}}'


def test_a_time_needs_a_zone() -> None:
    with pytest.raises(ValueError, match="no time zone"):
        new_job("t", schedule_time=datetime(2030, 1, 1))  # noqa: DTZ001 (the point)


def test_one_message_is_one_line_of_json() -> None:
    event = JobEvent(sequence=1, type=job_pb2.JOB_EVENT_TYPE_LOG)
    event.log.message = "a\nb"
    assert "\n" not in to_json(event)
    assert json.loads(to_json(event))["log"] == {"message": "a\nb"}


def test_whole_numbers_are_printed_as_such() -> None:
    request = new_job("t", {"a": [1, 0.5, 2**53, 1e300], "b": {"c": -3}})
    payload = json.loads(to_json(request))["payload"]
    assert repr(payload["a"]) == "[1, 0.5, 9007199254740992, 1e+300]"
    assert repr(payload["b"]) == "{'c': -3}"


def test_names() -> None:
    assert state_name(job_pb2.JOB_STATE_SUCCEEDED) == "SUCCEEDED"
    assert event_name(job_pb2.JOB_EVENT_TYPE_ATTEMPT_FAILED) == "ATTEMPT_FAILED"
    assert event_name(99) == "99"


def test_a_content_type_without_bytes_is_not_dropped() -> None:
    assert new_job("x", b"%PDF", content_type="application/pdf").payload_blob.data
    with pytest.raises(ValueError, match="content_type goes with a payload of bytes"):
        new_job("x", {}, content_type="application/pdf")
