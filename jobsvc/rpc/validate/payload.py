"""Payloads: their limits, and the JSON Schema that a worker announced."""

from __future__ import annotations

import functools
import json
import math
import re
from typing import Any

import jsonschema_rs
from google.protobuf.struct_pb2 import ListValue, Struct, Value

from generated.jobsvc.v1 import job_pb2, job_service_pb2
from jobsvc.core.attempts import JobTypeInfo
from jobsvc.errors import Violation
from jobsvc.rpc.validate import fields
from jobsvc.rpc.validate.fields import Violations
from jobsvc.telemetry import get_logger

log = get_logger(__name__)

MIB = 1024 * 1024
PAYLOAD_BYTES_MAX = MIB
PAYLOAD_VALUES_MAX = 100_000
PAYLOAD_DEPTH_MAX = 32
# More are of use to nobody: an answer has room for some kilobytes. Without these limits a request
# could be made to cost hundreds of times its own size.
PAYLOAD_VIOLATIONS_MAX = 100
PATH_CHARACTERS_MAX = 300
INTEGER_MAX = 2.0**53

_plain_member = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}").fullmatch


def job_input(
    request: job_service_pb2.SubmitJobRequest, info: JobTypeInfo | None, prefix: str
) -> Violations:
    schema = _validator(info.payload_schema) if info and info.payload_schema else None
    if request.WhichOneof("input") == "payload_blob":
        found = _blob(request.payload_blob, f"{prefix}payload_blob")
        if schema:
            found.append(Violation(f"{prefix}payload_blob", "this job type takes a JSON payload"))
        return found
    # An unset payload is the empty object, which a schema can refuse too.
    found = _payload(request.payload, f"{prefix}payload")
    if found or not schema:
        return found
    return _schema(request.payload, schema, f"{prefix}payload")


def _blob(blob: job_pb2.Blob, path: str) -> Violations:
    found = fields.text(blob.content_type, f"{path}.content_type", fields.KEY_CHARACTERS_MAX)
    if len(blob.data) > PAYLOAD_BYTES_MAX:
        found.append(Violation(f"{path}.data", "must be at most 1 MiB"))
    return found


def _payload(payload: Struct, path: str) -> Violations:
    """Iterative: protobuf's own limit on depth does not hold everywhere, and Python's is ours."""
    if payload.ByteSize() > PAYLOAD_BYTES_MAX:
        return [Violation(path, "must be at most 1 MiB as an encoded Struct")]
    found: Violations = []
    count = 0
    containers: list[tuple[Struct | ListValue, str, int]] = [(payload, path, 1)]
    while containers and len(found) < PAYLOAD_VIOLATIONS_MAX:
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
                    if (flaw := _flaw(kind, value)) and len(found) < PAYLOAD_VIOLATIONS_MAX:
                        found.append(Violation(_member(place, key), flaw))
            if isinstance(key, str) and "\0" in key:
                found.append(Violation(place, "must not have NUL in a key"))
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
        return jsonschema_rs.validator_for(json.loads(schema), mask="value", offline=True)
    except ValueError as error:
        log.warning("payload schema unusable", error=str(error)[:500])
        return None


def _schema(payload: Struct, schema: jsonschema_rs.Validator, path: str) -> Violations:
    value = {key: _python(each) for key, each in payload.fields.items()}
    if schema.is_valid(value):
        return []
    found: Violations = []
    for error in schema.iter_errors(value):
        found += _schema_violations(error, functools.reduce(_member, error.instance_path, path))
        if len(found) >= PAYLOAD_VIOLATIONS_MAX:
            break
    return found


def _schema_violations(error: jsonschema_rs.ValidationError, place: str) -> Violations:
    """Names the member that is missing or too much, rather than the object around it."""
    kind: Any = error.kind
    match kind.name:
        case "required":
            return [Violation(_member(place, kind.property), "is required")]
        case "additionalProperties":
            return [Violation(_member(place, each), "is not known") for each in kind.unexpected]
    return [Violation(place, error.message)]


def _python(value: Value) -> Any:
    """The JSON value; recursion is safe, the depth was checked. Whole numbers become int."""
    match value.WhichOneof("kind"):
        case "string_value":
            return value.string_value
        case "number_value":
            number = value.number_value
            whole = number.is_integer() and abs(number) <= INTEGER_MAX
            return int(number) if whole else number
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return {key: _python(each) for key, each in value.struct_value.fields.items()}
        case "list_value":
            return [_python(each) for each in value.list_value.values]
    return None
