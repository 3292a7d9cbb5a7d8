"""Payloads: their limits, and the JSON Schema that a worker announced."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import jsonschema_rs
from google.protobuf.struct_pb2 import ListValue, Struct, Value

from generated.jobsvc.v1 import job_pb2, job_service_pb2
from jobsvc.core.attempts import JobTypeInfo
from jobsvc.core.schemas import tellable
from jobsvc.errors import Violation
from jobsvc.rpc.validate import fields
from jobsvc.rpc.validate.fields import VIOLATIONS_MAX, Violations
from jobsvc.rpc.validate.formats import FORMATS
from jobsvc.telemetry import get_logger

log = get_logger(__name__)

MIB = 1024 * 1024
PAYLOAD_BYTES_MAX = MIB
PAYLOAD_VALUES_MAX = 100_000
PAYLOAD_DEPTH_MAX = 32
# Of a larger one the first violation of its schema alone is told: to find all, which cannot be
# stopped half-way, took 7 s for 100,000 values, and nobody else was served.
WHOLLY_CHECKED_VALUES_MAX = 1_000
PATH_CHARACTERS_MAX = 300
INTEGER_MAX = 2.0**53

_plain_member = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}").fullmatch


def job_input(request: job_service_pb2.SubmitJobRequest, info: JobTypeInfo | None) -> Violations:
    schema = _validator(info.payload_schema) if info and info.payload_schema else None
    if request.WhichOneof("input") == "payload_blob":
        found = _blob(request.payload_blob, "payload_blob")
        if schema:
            found.append(Violation("payload_blob", "this job type takes a JSON payload"))
        return found
    # An unset payload is the empty object, which a schema can refuse too.
    reader = _Reader()
    value = _read(request.payload, reader)
    if value is None:
        return _violations(request.payload, "payload")
    if not schema or schema.is_valid(value):
        return []
    wholly = reader.count <= WHOLLY_CHECKED_VALUES_MAX
    errors = schema.iter_errors(value) if wholly else _first_error(value, schema)
    return list(islice(_schema_violations(errors, "payload"), VIOLATIONS_MAX))


def _blob(blob: job_pb2.Blob, path: str) -> Violations:
    found = fields.text(blob.content_type, f"{path}.content_type", fields.KEY_CHARACTERS_MAX)
    if len(blob.data) > PAYLOAD_BYTES_MAX:
        found.append(Violation(f"{path}.data", "must be at most 1 MiB"))
    return found


def _read(payload: Struct, reader: _Reader) -> dict[str, Any] | None:
    """The JSON value, made while the limits are checked; None if one is broken."""
    if payload.ByteSize() > PAYLOAD_BYTES_MAX:
        return None
    try:
        return reader.read_object(payload, 1)
    except _Flawed:
        return None


class _Flawed(Exception):
    """Which limit is broken, and where, `_violations` finds out."""


class _Reader:
    """Of one payload. Recursion is safe: it ends where the depth is checked."""

    def __init__(self) -> None:
        self.count = 0  # of values

    def read_object(self, message: Struct, depth: int) -> dict[str, Any]:
        fields = message.fields
        self._enter(len(fields), depth)
        value = {}
        for key in fields:
            if "\0" in key:
                raise _Flawed
            value[key] = self._read(fields[key], depth)
        return value

    def _read_list(self, message: ListValue, depth: int) -> list[Any]:
        self._enter(len(message.values), depth)
        return [self._read(each, depth) for each in message.values]

    def _enter(self, count: int, depth: int) -> None:
        self.count += count
        if self.count > PAYLOAD_VALUES_MAX or depth > PAYLOAD_DEPTH_MAX:
            raise _Flawed

    def _read(self, value: Value, depth: int) -> Any:
        kind = value.WhichOneof("kind")
        if kind == "string_value":
            text = value.string_value
            if "\0" in text:
                raise _Flawed
            return text
        if kind == "number_value":
            return _number(value.number_value)
        if kind == "bool_value":
            return value.bool_value
        if kind == "struct_value":
            return self.read_object(value.struct_value, depth + 1)
        if kind == "list_value":
            return self._read_list(value.list_value, depth + 1)
        if kind is None:
            raise _Flawed
        return None


def _number(number: float) -> int | float:
    """Whole numbers become int."""
    if number.is_integer():
        return int(number) if abs(number) <= INTEGER_MAX else number
    if not math.isfinite(number):
        raise _Flawed
    return number


def _violations(payload: Struct, path: str) -> Violations:
    """What is wrong with a payload that could not be read.

    Iterative: protobuf's own limit on depth does not hold everywhere, and Python's is ours."""
    if payload.ByteSize() > PAYLOAD_BYTES_MAX:
        return [Violation(path, "must be at most 1 MiB as an encoded Struct")]
    found: Violations = []
    count = 0
    containers: list[tuple[Struct | ListValue, str, int]] = [(payload, path, 1)]
    while containers and len(found) < VIOLATIONS_MAX:
        container, place, depth = containers.pop()
        if depth > PAYLOAD_DEPTH_MAX:
            found.append(Violation(place, f"must be at most {PAYLOAD_DEPTH_MAX} levels deep"))
            continue
        for key, value in _members(container):
            count += 1
            if count > PAYLOAD_VALUES_MAX:
                return [Violation(path, f"must hold at most {PAYLOAD_VALUES_MAX:,} values")]
            match value.WhichOneof("kind"):
                case "struct_value":
                    containers.append((value.struct_value, _member(place, key), depth + 1))
                case "list_value":
                    containers.append((value.list_value, _member(place, key), depth + 1))
                case kind:
                    if flaw := _flaw(kind, value):
                        found.append(Violation(_member(place, key), flaw))
            if isinstance(key, str) and "\0" in key:
                found.append(Violation(place, "must not have NUL in a key"))
            if len(found) >= VIOLATIONS_MAX:
                break
    return found


def _members(container: Struct | ListValue) -> Any:
    """Pairs of a key or an index, and a Value."""
    if isinstance(container, Struct):
        return container.fields.items()
    return enumerate(container.values)


def _flaw(kind: str | None, value: Value) -> str:
    """What is wrong with a Value that holds no others; empty if nothing is."""
    if kind == "string_value":
        return "must not have NUL" if "\0" in value.string_value else ""
    if kind == "number_value":
        return "" if math.isfinite(value.number_value) else "must be a finite number"
    return "" if kind else "must have a kind"


def _member(path: str, key: str | int) -> str:
    if len(path) > PATH_CHARACTERS_MAX:
        return path
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if _plain_member(key) else f"{path}[{fields.quoted(key)}]"


@functools.lru_cache(maxsize=1_024)
def _validator(schema: str) -> jsonschema_rs.Validator | None:
    """Compiled once for each text. What a worker announced and is no schema checks nothing here:
    the worker checks each payload again."""
    try:
        return jsonschema_rs.validator_for(
            tellable(json.loads(schema)),
            mask="value",
            offline=True,
            validate_formats=True,
            formats=FORMATS,
        )
    except ValueError as error:
        log.warning("payload schema unusable", error=str(error)[:500])
        return None


def _first_error(
    value: dict[str, Any], schema: jsonschema_rs.Validator
) -> Iterator[jsonschema_rs.ValidationError]:
    try:
        schema.validate(value)
    except jsonschema_rs.ValidationError as error:
        yield error


def _schema_violations(
    errors: Iterable[jsonschema_rs.ValidationError], path: str
) -> Iterator[Violation]:
    """Names the member that is missing or too much, rather than the object around it."""
    for error in errors:
        place = functools.reduce(_member, error.instance_path, path)
        kind: Any = error.kind
        match kind.name:
            case "required":
                yield Violation(_member(place, kind.property), "is required")
            case "additionalProperties":
                yield from (Violation(_member(place, x), "is not known") for x in kind.unexpected)
            case _:
                yield Violation(place, error.message)
