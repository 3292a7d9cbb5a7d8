"""What is announced of models, against the models themselves: the server takes what they take."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from ipaddress import IPv4Address, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from google.protobuf.json_format import ParseDict
from pydantic import (
    UUID4,
    AliasChoices,
    AliasPath,
    AnyUrl,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Discriminator,
    Field,
    HttpUrl,
    PlainValidator,
    RedisDsn,
    SecretStr,
    StringConstraints,
    Tag,
    ValidationError,
    WrapValidator,
    create_model,
    model_validator,
)
from pydantic.alias_generators import to_camel

from generated.jobsvc.v1 import job_service_pb2
from jobsvc.core.attempts import JobTypeInfo
from jobsvc.core.operations import JobType
from jobsvc.rpc.convert.operations import job_types
from jobsvc.rpc.validate import payload
from worker import patterns
from worker.handlers.standard import EmailPayload
from worker.schemas import payload_schema


def refused(schema: dict[str, Any], value: dict[str, Any]) -> list[str]:
    """What a submit is told; nothing where it is taken."""
    request = ParseDict({"payload": value}, job_service_pb2.SubmitJobRequest())
    info = JobTypeInfo("x", payload_schema=json.dumps(schema))
    return [violation.description for violation in payload.job_input(request, info)]


def taken(model: type[BaseModel], value: dict[str, Any]) -> bool:
    try:
        model.model_validate_json(json.dumps(value))
    except ValidationError:
        return False
    return True


class Missing(Enum):
    RED = "red"

    @classmethod
    def _missing_(cls, value: object) -> Missing | None:
        return cls.RED if str(value).lower() == "red" else None


class Cat(BaseModel):
    name: str


class Dog(BaseModel):
    name: str


@dataclass
class Point:
    x: int
    when: datetime | None = None


BY_CODE = Annotated[
    Annotated[Cat, Tag("cat")] | Annotated[Dog, Tag("dog")], Discriminator(lambda value: "cat")
]
TEXTS = [
    "",
    "a",
    "größe",
    "abc ",
    " abcd ",
    "ab-c.d",
    "A1_٣",
    "abcdef",
    "a\n",
    "a b",
    "a\rb",
    "٣٤",
    "12",
]
TIMES = [
    *("2026-01-02", "2026-01-02T03:04:05Z", "2026-01-02T03:04:05", "2026-01-02 03:04", "yesterday"),
    *("1767225600", "03:04", "03:04:05.678", "P1D", "PT1M", "1 day", "00:01:00", "zz", "", "24:61"),
]
IDS = [
    *("zz", "00000000-0000-4000-8000-000000000000", "00000000000040008000000000000000"),
    *("urn:uuid:00000000-0000-4000-8000-000000000000", "00000000-0000-1000-8000-000000000000", ""),
]
PLACES = ["127.0.0.1", "::1", "2001:db8::/32", "10.0.0.0/8", "300.1.1.1", "a"]
URLS = ["http://example.com/ä", "https://u:p@h:1/p?q#f", "mailto:a@b", "redis:///0", "/path", "no"]
LISTS: list[Any] = [[], [1], [1, 1], [1, 1, 2], ["a"], "a,b", "abc"]


@pytest.mark.parametrize(
    ("annotation", "values"),
    [
        (Annotated[str, Field(pattern=r"^\w+$")], TEXTS),
        (Annotated[str, Field(pattern=r"^[\w.-]+$")], TEXTS),
        (Annotated[str, Field(pattern=r"^\W|\D{3}$")], TEXTS),
        (Annotated[str, Field(pattern=r"^\d+$")], TEXTS),
        (Annotated[str, Field(pattern=r"^\S*$")], TEXTS),
        (Annotated[str, Field(pattern=r"\bb")], TEXTS),
        (Annotated[str, Field(pattern=r"^a.b$")], TEXTS),
        (Annotated[str, Field(pattern=r"(?i)^A")], TEXTS),
        (Annotated[str, Field(pattern=r"^(?P<x>a)")], TEXTS),
        (Annotated[str, Field(pattern=r"^[[:alpha:]&&[^b]]+$")], TEXTS),
        (Annotated[str, Field(pattern=r"^\pL\z")], TEXTS),
        (Annotated[str, Field(pattern=re.compile(r"^A", re.IGNORECASE))], TEXTS),
        (Annotated[str, Field(pattern=re.compile(r"b|^[.\w-]+$"))], TEXTS),
        (Annotated[str, Field(pattern=re.compile(r"^a$"))], TEXTS),
        (Annotated[str, StringConstraints(strip_whitespace=True, max_length=4)], TEXTS),
        (Annotated[str, StringConstraints(strip_whitespace=True, pattern="^ab.$")], TEXTS),
        (Annotated[str, StringConstraints(to_lower=True, pattern="^[A-Z]")], TEXTS),
        (Annotated[bytes, Field(min_length=6, max_length=7)], TEXTS),
        (dict[Annotated[str, Field(pattern=r"^\w+$")], int], [{"ö": 1}, {"a b": 1}, {}]),
        (UUID, IDS),
        (UUID4, IDS),
        (datetime, TIMES),
        (date, TIMES),
        (time, TIMES),
        (timedelta, TIMES),
        (datetime | None, [*TIMES, None]),
        (Point, [{"x": 1}, {"x": 1, "when": "yesterday"}, {"x": 1, "when": "2026-01-02"}]),
        (Decimal, ["1", "1e5", "-.5", " 1.5 ", 1.5, "abc", "1_000"]),
        (IPv4Address, PLACES),
        (IPv6Network, PLACES),
        (AnyUrl, URLS),
        (HttpUrl, URLS),
        (RedisDsn, URLS),
        (set[int], LISTS),
        (Annotated[set[int], Field(max_length=2, min_length=1)], LISTS),
        (Annotated[frozenset[int], Field(max_length=1)], LISTS),
        (Sequence[int], LISTS),
        (deque[int], LISTS),
        (Annotated[list[str], BeforeValidator(lambda v: v.split(","))], LISTS),
        (
            Annotated[int, WrapValidator(lambda v, handler: 1 if v == "one" else handler(v))],
            ["one", 1],
        ),
        (Annotated[int, PlainValidator(lambda v: len(v))], ["one", [1]]),
        (Missing, ["red", "RED", "blue"]),
        (Literal["a", 1], ["a", 1, 1.0, "b"]),
        (BY_CODE, [{"name": "Tom"}, {}]),
        (Annotated[float, Field(multiple_of=0.1)], [0.3, 0.7, 0.35]),
        (ByteSize, [1, "1KB", "one"]),
        (SecretStr, TEXTS),
        (Path, TEXTS),
    ],
)
def test_what_the_model_takes_is_taken(annotation: Any, values: list[Any]) -> None:
    model = create_model("Model", field=annotation)
    schema = payload_schema(model)
    told = {json.dumps(value): refused(schema, {"field": value}) for value in values}
    wrong = {
        value: errors
        for value, errors in told.items()
        if errors and taken(model, {"field": json.loads(value)})
    }
    assert not wrong, schema


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (Annotated[str, Field(pattern=r"^\w+$")], "a b"),
        (Annotated[str, Field(pattern=r"^[^\d\s]+$")], "٣"),
        (Annotated[str, Field(pattern=r"^\d{5}$")], "1234"),
        (Annotated[str, Field(pattern=re.compile(r"[a-f]{2}"))], "xya"),
        (UUID, "zz"),
        (datetime, "yesterday"),
        (date, "2026-02-30"),
        (time, "25:00"),
        (timedelta, "soon"),
        (UUID4, "00000000-0000-1000-8000-000000000000"),
        (list[datetime | None], ["yesterday"]),
        (IPv4Address, "300.1.1.1"),
        (AnyUrl, "no"),
        (Annotated[set[int], Field(min_length=2)], [1]),
        (Literal["a"], "b"),
        (Annotated[float, Field(le=1)], 2),
    ],
)
def test_what_the_model_cannot_take_is_refused(annotation: Any, value: Any) -> None:
    model = create_model("Model", field=annotation)
    assert not taken(model, {"field": value})
    assert refused(payload_schema(model), {"field": value})


class Named(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid")

    order_id: int
    given_name: Annotated[str, Field(max_length=3)] = ""


class Chosen(BaseModel):
    model_config = ConfigDict(extra="forbid")

    a: int = Field(validation_alias=AliasChoices("x", "y", AliasPath("z", 0)))
    b: int = Field(default=1, validation_alias=AliasPath("z", 1))


class Rewritten(BaseModel):
    order_id: int

    @model_validator(mode="before")
    @classmethod
    def rename(cls, data: Any) -> Any:
        return {"order_id": data.get("id", data.get("order_id"))}


@pytest.mark.parametrize(
    ("model", "value", "takes"),
    [
        (Named, {"orderId": 1}, True),
        (Named, {"order_id": 1, "givenName": "a"}, True),
        (Named, {"order_id": 1, "given_name": "abcd"}, False),
        (Named, {"order_id": "one"}, False),
        (Named, {"order_id": 1, "other": 1}, False),
        (Chosen, {"x": 1}, True),
        (Chosen, {"y": 1}, True),
        (Chosen, {"z": [1, 2]}, True),
        (Chosen, {"y": "one"}, False),
        (Rewritten, {"id": 1}, True),
        (Rewritten, {"order_id": 1}, True),
    ],
)
def test_names_that_a_model_takes(
    model: type[BaseModel], value: dict[str, Any], takes: bool
) -> None:
    assert taken(model, value) == takes
    assert (not refused(payload_schema(model), value)) == takes


def test_what_is_required_stays_so_where_there_is_one_name() -> None:
    assert refused(payload_schema(create_model("M", a=int)), {}) == ["is required"]
    aliased = create_model("M", a=(int, Field(alias="b")))
    assert refused(payload_schema(aliased), {"a": 1}) == ["is required"]


class Endless(BaseModel):
    limit: float = float("inf")
    limits: list[float] = Field(default=[1.0, float("-inf")], examples=[[float("nan")]])
    most: Annotated[float, Field(le=float("inf"), ge=0)] = 1.0
    much: Annotated[int, Field(le=10**400)] = 1
    text: str = "\ud800"


def test_an_infinite_default_is_left_out() -> None:
    schema = payload_schema(Endless)
    json.dumps(schema, allow_nan=False)
    properties = schema["properties"]
    assert properties["limit"] == {"title": "Limit", "type": "number"}
    assert properties["limits"] == {
        "title": "Limits",
        "type": "array",
        "items": {"type": "number"},
    }
    assert properties["most"]["minimum"] == 0
    assert not refused(schema, {"limit": 1, "much": 2})


@pytest.mark.parametrize(
    "announced",
    [
        '{"default": Infinity, "title": "a"}',
        '{"default": [NaN], "title": "a"}',
        '{"maximum": 1e999, "title": "a"}',
        '{"maximum": 1' + "0" * 400 + ', "title": "a"}',
    ],
)
def test_one_bad_schema_does_not_hide_the_others(announced: str) -> None:
    """Whatever worker announced it."""
    infos = [JobTypeInfo("a", payload_schema=announced), JobTypeInfo("b")]
    listed = list(job_types(JobType(info, 1) for info in infos))
    assert [job_type.name for job_type in listed] == ["a", "b"]
    assert dict(listed[0].payload_schema) == {"title": "a"}


@pytest.mark.parametrize(
    ("pattern", "engine", "expected"),
    [
        (r"^[A-Za-z0-9._%+-]+@[a-z]+\.[a-z]{2,}$", "rust-regex", None),
        (r"^\w+$", "rust-regex", r"^[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]+$"),
        (r"^\w+$", "python-re", r"^[\p{L}\p{N}_]+(?=\n?$)"),
        (r"\-\@", "rust-regex", "-@"),
        (r"a(?:b|c)*?(d)", "rust-regex", None),
        (r"[]a]", "python-re", ""),
        (r"a*+", "python-re", ""),
        (r"[\W]", "rust-regex", ""),
        (r"\1", "python-re", ""),
        (r"(?x) a", "python-re", ""),
        (r"[a--b]", "rust-regex", ""),
    ],
)
def test_patterns(pattern: str, engine: patterns.Engine, expected: str | None) -> None:
    """None: as it is. Empty: left out."""
    wanted = pattern if expected is None else expected or None
    assert patterns.to_ecma(pattern, engine) == wanted


@pytest.mark.parametrize(
    ("change", "takes"),
    [
        ({}, True),
        ({"subject": "Grüße 😀"}, True),
        ({"subject": "a\u2028b"}, False),
        ({"subject": "a\u0085b"}, False),
        ({"recipient_email": "ü+x=y@müller.example"}, True),
        ({"recipient_email": "=?utf-8?q?x?=@example.com"}, False),
        ({"recipient_email": "a b@example.com"}, False),
    ],
)
def test_a_mail_is_judged_at_submit(change: dict[str, str], takes: bool) -> None:
    value = {"recipient_email": "a@example.com", "subject": "Hello", "body": "b", **change}
    assert taken(EmailPayload, value) == takes
    assert (not refused(payload_schema(EmailPayload), value)) == takes
