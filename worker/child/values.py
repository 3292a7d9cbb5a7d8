"""Payloads and results between Python values and their form on the wire.

The limits are those of the service's contract. They are checked by a loop, not by recursion, while
the result's form on the wire is built, so that one that is endless, cyclic or huge costs little.
"""

from __future__ import annotations

import functools
import math
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import NULL_VALUE, Struct, Value

from jobsvc.core.attempts import BLOB_CONTENT_TYPE, Input
from worker.api import Blob

if TYPE_CHECKING:
    from pydantic_core import SchemaSerializer

SIZE_BYTES_MAX: Final = 1024 * 1024
VALUES_MAX: Final = 100_000
DEPTH_MAX: Final = 32
EXACT_INTEGER_MAX: Final = 2**53

Json = dict[str, "Json"] | list["Json"] | str | float | bool | None

_NULL_RESULT: Final = Input(Value(null_value=NULL_VALUE).SerializeToString())

# A place inside the result, for messages: the container's place and the key or index in it.
_Place = tuple["_Place | None", object]

_JSON: Final = (str, int, float, dict, list, tuple, type(None))


class PayloadInvalid(ValueError):
    """The payload's bytes are not what they were said to be."""


class ResultInvalid(ValueError):
    """The result has no exact form on the wire."""


class ResultTooLarge(ValueError):
    """The result exceeds the size or the number of values allowed."""


def decode_payload(data: bytes) -> dict[str, Json]:
    """The object in a `Struct`'s wire form; whole numbers up to 2^53 become `int`.

    Raises PayloadInvalid.
    """
    if not data:
        return {}
    try:
        struct = Struct.FromString(data)
    except DecodeError as error:
        raise PayloadInvalid(f"not a google.protobuf.Struct: {error}") from error
    return _object(struct)


def _object(struct: Struct) -> dict[str, Json]:
    return {key: _json(value) for key, value in struct.fields.items()}


def _json(value: Value) -> Json:
    # The decoder itself refuses more than 33 levels, so recursion is bounded.
    match value.WhichOneof("kind"):
        case "string_value":
            return value.string_value
        case "number_value":
            return _number(value.number_value)
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return _object(value.struct_value)
        case "list_value":
            return [_json(item) for item in value.list_value.values]
        case _:
            return None


def _number(number: float) -> float:
    whole = number.is_integer() and abs(number) <= EXACT_INTEGER_MAX
    # No int has the sign of -0.0.
    if whole and (number or math.copysign(1.0, number) > 0):
        return int(number)
    return number


def encode_result(result: object) -> Input:
    """A handler's return value in its form on the wire.

    Takes what JSON knows, whatever Pydantic has a JSON form for (models, dataclasses, times, UUIDs,
    enums, sets …), `bytes` and Blob. Raises ResultInvalid or ResultTooLarge.
    """
    if result is None:
        return _NULL_RESULT
    if isinstance(result, (bytes, bytearray, memoryview)):
        result = Blob(bytes(result), BLOB_CONTENT_TYPE)
    if isinstance(result, Blob):
        _check_size(len(result.data))
        return Input(result.data, result.content_type)
    value = Value()
    _Filler().fill(value, result)
    # An object is measured as payloads are, so that whatever was accepted as a payload can be a
    # result; as a Value it is a few bytes longer.
    is_object = value.WhichOneof("kind") == "struct_value"
    _check_size(value.struct_value.ByteSize() if is_object else value.ByteSize())
    return Input(value.SerializeToString(deterministic=True))


def _check_size(size_bytes: int) -> None:
    if size_bytes > SIZE_BYTES_MAX:
        message = f"the result has {size_bytes} bytes, more than {SIZE_BYTES_MAX}"
        raise ResultTooLarge(message)


class _Filler:
    """Makes a Value of a result. Refuses what cannot be one within the limits; visits at most
    VALUES_MAX values."""

    def __init__(self) -> None:
        self._pending: list[tuple[Value, Any, int, _Place | None]] = []
        self._count = self._characters = 0

    def fill(self, value: Value, root: object) -> None:
        self._pending.append((value, root, 1, None))
        while self._pending:
            self._fill(*self._pending.pop())

    def _fill(self, value: Value, item: Any, level: int, place: _Place | None) -> None:
        if not isinstance(item, _JSON):
            item = _dump(item, place)
        if isinstance(item, str):
            self._count_text(item, place)
            value.string_value = item
        elif item is None:
            value.null_value = NULL_VALUE
        elif isinstance(item, bool):
            value.bool_value = item
        elif isinstance(item, (int, float)):
            _check_number(item, place)
            value.number_value = float(item)
        else:
            self._enter(len(item), level)
            if isinstance(item, dict):
                self._fill_object(value.struct_value, item, level + 1, place)
            else:
                value.list_value.SetInParent()
                add = value.list_value.values.add
                self._pending += [
                    (add(), child, level + 1, (place, n)) for n, child in enumerate(item)
                ]

    def _fill_object(
        self, struct: Struct, item: dict[Any, object], level: int, place: _Place | None
    ) -> None:
        struct.SetInParent()
        fields = struct.fields
        for key, child in _with_text_keys(item, place).items():
            self._count_text(key, place)
            self._pending.append((fields[key], child, level, (place, key)))

    def _enter(self, count: int, level: int) -> None:
        if level > DEPTH_MAX:
            raise ResultInvalid(f"nested deeper than {DEPTH_MAX} levels, or inside itself")
        self._count += count
        if self._count > VALUES_MAX:
            raise ResultTooLarge(f"the result has more than {VALUES_MAX} values")

    def _count_text(self, text: str, place: _Place | None) -> None:
        if "\0" in text:
            raise _invalid(place, "has a NUL character")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise _invalid(place, "has a lone surrogate") from error
        self._characters += len(text)
        if self._characters > SIZE_BYTES_MAX:
            raise ResultTooLarge(f"the result has more than {SIZE_BYTES_MAX} bytes")


def _dump(item: object, place: _Place | None) -> Any:
    """What Pydantic's JSON mode makes of something that is not JSON."""
    name = type(item).__name__
    if isinstance(item, (Iterator, AsyncIterator)):
        raise _invalid(place, f"is of type {name}, which is not run: give a list")
    if isinstance(item, (bytes, bytearray, memoryview, Blob)):  # text by chance at most
        raise _invalid(place, f"is of type {name}, which JSON does not know")
    try:
        dumped = _any_serializer().to_python(item, mode="json")
    except Exception as error:  # serializers are the handler's own code
        raise _invalid(place, f"is of type {name}, which cannot be made JSON: {error}") from error
    if not isinstance(dumped, _JSON):
        raise _invalid(place, f"is of type {name}, whose serializer gives no JSON")
    return dumped


@functools.cache
def _any_serializer() -> SchemaSerializer:
    # Not imported at the top: most results need none of it, and each child would pay for it.
    from pydantic_core import SchemaSerializer, core_schema

    return SchemaSerializer(core_schema.any_schema(), {"ser_json_inf_nan": "constants"})


def _with_text_keys(item: dict[Any, object], place: _Place | None) -> dict[str, object]:
    """The object itself, unless some keys are numbers, times and the like."""
    for key in item:
        if not isinstance(key, str):
            break
    else:
        return item
    named = {_key(key, place): child for key, child in item.items()}
    if len(named) < len(item):
        raise _invalid(place, "has two keys that are the same in JSON")
    return named


def _key(key: object, place: _Place | None) -> str:
    if isinstance(key, str):
        return key
    name = type(key).__name__
    if isinstance(key, (bytes, Blob)):
        raise _invalid(place, f"has a key of type {name}, which JSON does not know")
    try:
        (text,) = _any_serializer().to_python({key: None}, mode="json")
    except Exception as error:  # the key's own code
        problem = f"has a key of type {name}, which cannot be made JSON: {error}"
        raise _invalid(place, problem) from error
    return str(text)


def _check_number(item: float, place: _Place | None) -> None:
    if isinstance(item, int):
        if abs(item) > EXACT_INTEGER_MAX and not _is_exact(item):
            raise _invalid(place, "is an integer beyond 2^53 that a double cannot hold exactly")
    elif not math.isfinite(item):
        raise _invalid(place, "is not a finite number")


def _is_exact(number: int) -> bool:
    try:
        return float(number) == number
    except OverflowError:
        return False


def _invalid(place: _Place | None, problem: str) -> ResultInvalid:
    steps: list[str] = []
    while place is not None:
        place, key = place
        # A bad key is shown escaped, and a long one cut, so that the message stays readable.
        steps.append(f"[{ascii(key)[:60]}]")
    return ResultInvalid(f"result{''.join(reversed(steps))} {problem}")
