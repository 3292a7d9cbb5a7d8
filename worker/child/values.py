"""Payloads and results between Python values and their form on the wire.

The limits are those of the service's contract. They are checked by a loop, not by recursion, and
before anything is built, so that a result that is endless, cyclic or huge costs little.
"""

from __future__ import annotations

import math
import sys
from typing import Final

from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import NULL_VALUE, Struct, Value

from jobsvc.core.attempts import BLOB_CONTENT_TYPE, Input
from worker.api import Blob

SIZE_BYTES_MAX: Final = 1024 * 1024
VALUES_MAX: Final = 100_000
DEPTH_MAX: Final = 32
EXACT_INTEGER_MAX: Final = 2**53

Json = dict[str, "Json"] | list["Json"] | str | float | bool | None

_NULL_RESULT: Final = Input(Value(null_value=NULL_VALUE).SerializeToString())

# A place inside the result, for messages: the container's place and the key or index in it.
_Place = tuple["_Place | None", object]


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

    Takes what JSON knows, Pydantic models, `bytes` and Blob. Raises ResultInvalid or
    ResultTooLarge.
    """
    if result is None:
        return _NULL_RESULT
    if isinstance(result, (bytes, bytearray, memoryview)):
        result = Blob(bytes(result), BLOB_CONTENT_TYPE)
    if isinstance(result, Blob):
        _check_size(len(result.data))
        return Input(result.data, result.content_type)
    result = _dump_model(result)
    _check(result)
    value = Value()
    _fill(value, result)
    # An object is measured as payloads are, so that whatever was accepted as a payload can be a
    # result; as a Value it is a few bytes longer.
    _check_size(value.struct_value.ByteSize() if isinstance(result, dict) else value.ByteSize())
    return Input(value.SerializeToString(deterministic=True))


def _dump_model(result: object) -> object:
    pydantic = sys.modules.get("pydantic")  # not imported: no result can be a model of it
    if pydantic is None or not isinstance(result, pydantic.BaseModel):
        return result
    try:
        return result.model_dump(mode="json")
    except Exception as error:  # serializers are the handler's own code
        message = f"{type(result).__name__} cannot be dumped as JSON: {error}"
        raise ResultInvalid(message) from error


def _check_size(size_bytes: int) -> None:
    if size_bytes > SIZE_BYTES_MAX:
        message = f"the result has {size_bytes} bytes, more than {SIZE_BYTES_MAX}"
        raise ResultTooLarge(message)


def _check(root: object) -> None:
    """Refuse what cannot be a `Value` within the limits; visits at most VALUES_MAX values."""
    pending: list[tuple[object, int, _Place | None]] = [(root, 1, None)]
    count = characters = 0
    while pending:
        item, level, place = pending.pop()
        if isinstance(item, (dict, list, tuple)):
            if level > DEPTH_MAX:
                message = f"nested deeper than {DEPTH_MAX} levels, or inside itself"
                raise ResultInvalid(message)
            count += len(item)
            if count > VALUES_MAX:
                raise ResultTooLarge(f"the result has more than {VALUES_MAX} values")
        if isinstance(item, dict):
            for key, value in item.items():
                if not isinstance(key, str):
                    raise _invalid(place, f"has a key of type {type(key).__name__}, not str")
                characters += _check_text(key, place)
                pending.append((value, level + 1, (place, key)))
        elif isinstance(item, (list, tuple)):
            pending.extend((value, level + 1, (place, n)) for n, value in enumerate(item))
        elif isinstance(item, str):
            characters += _check_text(item, place)
        else:
            _check_scalar(item, place)
        if characters > SIZE_BYTES_MAX:
            raise ResultTooLarge(f"the result has more than {SIZE_BYTES_MAX} bytes")


def _check_text(text: str, place: _Place | None) -> int:
    if "\0" in text:
        raise _invalid(place, "has a NUL character")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _invalid(place, "has a lone surrogate") from error
    return len(text)


def _check_scalar(item: object, place: _Place | None) -> None:
    if item is None or isinstance(item, bool):
        return
    if isinstance(item, float):
        if not math.isfinite(item):
            raise _invalid(place, "is not a finite number")
    elif isinstance(item, int):
        if abs(item) > EXACT_INTEGER_MAX and not _is_exact(item):
            raise _invalid(place, "is an integer beyond 2^53 that a double cannot hold exactly")
    else:
        raise _invalid(place, f"is of type {type(item).__name__}, which JSON does not know")


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


def _fill(value: Value, item: object) -> None:
    # Checked before: at most DEPTH_MAX levels.
    if item is None:
        value.null_value = NULL_VALUE
    elif isinstance(item, bool):
        value.bool_value = item
    elif isinstance(item, (int, float)):
        value.number_value = float(item)
    elif isinstance(item, str):
        value.string_value = item
    elif isinstance(item, dict):
        value.struct_value.SetInParent()
        fields = value.struct_value.fields
        for key, child in item.items():
            _fill(fields[key], child)
    elif isinstance(item, (list, tuple)):
        value.list_value.SetInParent()
        values = value.list_value.values
        for child in item:
            _fill(values.add(), child)
