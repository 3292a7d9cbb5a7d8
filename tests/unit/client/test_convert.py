from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import pytest
from google.protobuf.struct_pb2 import NULL_VALUE, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from generated.jobsvc.v1 import job_pb2
from generated.jobsvc.v1.job_pb2 import JobEvent
from generated.jobsvc.v1.job_service_pb2 import GetResultResponse
from jobsvc.client import event_name, from_value, new_filter, new_job, state_name, to_json
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
        (iter([1, 2]), "list_iterator is no JSON value"),
        (object(), "object is no JSON value"),
        ("\ud800", "surrogates not allowed"),
    ],
    ids=range(10),
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
    with pytest.raises(ValueError, match="leads out of the years"):
        new_filter(create_time_after=datetime.fromisoformat("0001-01-01T00:00:00+23:00"))


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


class Colour(Enum):
    RED = "red"


@dataclass
class Parcel:
    weight: Decimal


class Order(BaseModel):
    order_id: UUID = Field(alias="orderId")
    placed: datetime
    parcels: list[Parcel] = []


ORDER_ID = UUID("0197f3a0-0000-7000-8000-000000000001")
PLACED = datetime(2030, 1, 1, tzinfo=UTC)


def test_a_payload_may_be_a_model_or_hold_what_results_hold() -> None:
    order = Order(orderId=ORDER_ID, placed=PLACED, parcels=[Parcel(Decimal("1.50"))])
    as_json = {
        "orderId": str(ORDER_ID),
        "placed": "2030-01-01T00:00:00Z",
        "parcels": [{"weight": "1.50"}],
    }
    assert json.loads(to_json(new_job("t", order)))["payload"] == as_json
    assert Order.model_validate(as_json) == order
    assert json.loads(to_json(new_job("t", Parcel(Decimal(2)))))["payload"] == {"weight": "2"}
    mixed = {"order": order, "all": [Colour.RED, {Colour.RED}, PLACED, timedelta(minutes=5)]}
    assert json.loads(to_json(new_job("t", mixed)))["payload"] == {
        "order": as_json,
        "all": ["red", ["red"], "2030-01-01T00:00:00Z", "PT5M"],
    }
    assert new_job("t", bytearray(b"x")).payload_blob.data == b"x"


@pytest.mark.parametrize("payload", [[1, 2], "text", 1, PLACED], ids=repr)
def test_what_is_no_object_is_not_sent_as_an_empty_one(payload: Any) -> None:
    with pytest.raises(ValueError, match="a payload is a JSON object or bytes, and not"):
        new_job("t", payload)


@pytest.mark.parametrize("span", [300, 300.0, timedelta(minutes=5), "5m", " 300s "], ids=repr)
def test_a_span_is_said_as_handlers_say_it(span: float | timedelta | str) -> None:
    request = new_job("t", delay=span, ttl=span, timeout=span, retention=span)
    for name in ("delay", "ttl", "timeout", "retention"):
        assert getattr(request, name).ToSeconds() == 300


@pytest.mark.parametrize("span", ["soon", "5", "9" * 400 + "h", float("nan"), float("inf"), 1e300])
def test_what_is_no_span_is_refused(span: Any) -> None:
    with pytest.raises(ValueError, match=r"is not a span such as|is no span of up to"):
        new_job("t", delay=span)


def test_no_result_is_not_a_result_of_none() -> None:
    assert from_value(Value(null_value=NULL_VALUE)) is None
    with pytest.raises(ValueError, match="there is no value: see the answer's `state`"):
        from_value(GetResultResponse(state=job_pb2.JOB_STATE_RUNNING).result)
