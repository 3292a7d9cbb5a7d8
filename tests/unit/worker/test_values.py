"""Payloads and results on the wire, and the limits of results."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.struct_pb2 import Struct, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, field_serializer
from pydantic.alias_generators import to_camel

from jobsvc.core.attempts import Input
from worker import Blob
from worker.child.values import (
    DEPTH_MAX,
    SIZE_BYTES_MAX,
    VALUES_MAX,
    PayloadInvalid,
    ResultInvalid,
    ResultTooLarge,
    decode_payload,
    encode_result,
)

_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
_numbers = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**53), 2**53))
_json = st.recursive(
    st.none() | st.booleans() | _numbers | _text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_text, inner, max_size=4),
    max_leaves=20,
)


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def decoded(result: object) -> Any:
    encoded = encode_result(result)
    assert encoded.content_type is None
    return MessageToDict(Value.FromString(encoded.data))


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(_text, _json, max_size=4))
def test_what_comes_in_goes_out_the_same(value: dict[str, Any]) -> None:
    encoded = encode_result(value)
    assert encoded.content_type is None
    struct = Value.FromString(encoded.data).struct_value
    assert decode_payload(struct.SerializeToString()) == value


@pytest.mark.parametrize(
    ("number", "expected"),
    [(3.0, int), (2.0**53, int), (2.0**53 + 2, float), (0.5, float), (0.0, int), (-0.0, float)],
)
def test_whole_numbers_of_a_payload_are_int(number: float, expected: type) -> None:
    payload = decode_payload(ParseDict({"n": number}, Struct()).SerializeToString())
    assert type(payload["n"]) is expected
    assert payload["n"] == number
    assert math.copysign(1, float(str(payload["n"]))) == math.copysign(1, number)


def test_an_empty_payload_is_an_empty_object() -> None:
    assert decode_payload(b"") == {}


def test_bytes_that_are_no_struct_are_refused() -> None:
    with pytest.raises(PayloadInvalid):
        decode_payload(b"\x0a\xff\xff")


class Inner(BaseModel):
    when: int = 3


class Model(BaseModel):
    inner: Inner = Inner()


class Aliased(BaseModel):
    model_config = ConfigDict(
        alias_generator=to_camel, validate_by_name=True, serialize_by_alias=True
    )

    wire_name: int


@dataclass
class Point:
    x: int
    models: list[Model]


class Colour(Enum):
    RED = "red"


class Level(IntEnum):
    HIGH = 3


MODELS_DEEP = {"a": [{"inner": {"when": 3}}], "b": {"x": 1, "models": [{"inner": {"when": 3}}]}}
KEYS = {"red": 3, "1": [2], str(UUID(int=1)): None}
PLACES = {"path": "/a", "ip": "0.0.0.1"}


class Undumpable(BaseModel):
    field: int = 1

    @field_serializer("field")
    def fail(self, _: int) -> int:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (None, None),
        (True, True),
        ("text", "text"),
        ((1, 2), [1, 2]),
        ([], []),
        ({}, {}),
        ({"a": {}, "b": []}, {"a": {}, "b": []}),
        (Model(), {"inner": {"when": 3}}),
        (2**60, 2**60),
        (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "2026-01-02T03:04:05Z"),
        (
            [date(2026, 1, 2), time(3, 4), timedelta(hours=1), Decimal("1.10"), UUID(int=1)],
            ["2026-01-02", "03:04:00", "PT1H", "1.10", str(UUID(int=1))],
        ),
        ({"a": [Model()], "b": Point(1, [Model()])}, MODELS_DEEP),
        (Colour.RED, "red"),
        ({Colour.RED: Level.HIGH, 1: {2}, UUID(int=1): None}, KEYS),
        ({"path": Path("/a"), "ip": IPv4Address(1)}, PLACES),
        ([frozenset("a"), deque([1])], [["a"], [1]]),
        ([Aliased(wire_name=1)], [{"wireName": 1}]),
        (Aliased(wire_name=1), {"wireName": 1}),
    ],
)
def test_results(result: object, expected: object) -> None:
    assert decoded(result) == expected


def test_every_value_has_a_kind() -> None:
    value = Value.FromString(encode_result([None, {}, [], ""]).data)
    kinds = [item.WhichOneof("kind") for item in value.list_value.values]
    assert kinds == ["null_value", "struct_value", "list_value", "string_value"]


def test_bytes_are_a_blob() -> None:
    assert encode_result(b"\0\xff") == Input(b"\0\xff", "application/octet-stream")
    assert encode_result(memoryview(b"ab")) == Input(b"ab", "application/octet-stream")
    assert encode_result(Blob(b"a,b", "text/csv")) == Input(b"a,b", "text/csv")


def cyclic() -> object:
    value: dict[str, object] = {}
    value["self"] = value
    return value


def doubling() -> object:
    value: object = 1
    for _ in range(30):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "make",
    [
        object,
        lambda: [{1: object()}],
        lambda: {object(): 1},
        lambda: {1: "a", "1": "b"},
        lambda: {b"a": 1},
        lambda: [b"text"],
        lambda: [bytearray(b"text")],
        lambda: [Blob(b"text")],
        lambda: [datetime.now],
        lambda: Decimal(1).sqrt,
        lambda: Point(float("nan"), []),  # type: ignore[arg-type]
        lambda: Point("nul \0", []),  # type: ignore[arg-type]
        lambda: map(str, [1]),
        lambda: {"deep": [Undumpable()]},
        lambda: float("nan"),
        lambda: [float("inf")],
        lambda: "nul \0",
        lambda: {"nul \0": 1},
        lambda: "\ud800",
        lambda: {"\udfff": 1},
        lambda: 2**53 + 1,
        lambda: 10**400,
        cyclic,
        lambda: nested(100_000),
        lambda: (n for n in range(3)),
        Undumpable,
    ],
)
def test_results_without_a_form_on_the_wire(make: Callable[[], object]) -> None:
    with pytest.raises(ResultInvalid):
        encode_result(make())


@pytest.mark.parametrize("make", [lambda: "x" * 50_000_000, lambda: b"x" * 1_048_577, doubling])
def test_results_that_are_too_large(make: Callable[[], object]) -> None:
    with pytest.raises(ResultTooLarge):
        encode_result(make())


def test_the_message_says_where() -> None:
    with pytest.raises(ResultInvalid, match=r"result\['items'\]\[1\] is of type object"):
        encode_result({"items": [1, object()]})


def test_depth_at_its_limit() -> None:
    assert decoded(nested(DEPTH_MAX)) == nested(DEPTH_MAX)
    with pytest.raises(ResultInvalid):
        encode_result(nested(DEPTH_MAX + 1))


def test_number_of_values_at_its_limit() -> None:
    encode_result([None] * VALUES_MAX)
    with pytest.raises(ResultTooLarge):
        encode_result([None] * (VALUES_MAX + 1))


def test_whatever_fits_as_a_payload_fits_as_a_result() -> None:
    struct = Struct()
    struct["text"] = ""
    struct["text"] = "x" * (SIZE_BYTES_MAX - struct.ByteSize() - 6)
    assert struct.ByteSize() == SIZE_BYTES_MAX
    payload = decode_payload(struct.SerializeToString())
    assert decoded(payload) == payload
    payload["text"] = f"{payload['text']}x"
    with pytest.raises(ResultTooLarge):
        encode_result(payload)
