"""The rules of requests that hold before they are decoded.

Decoding holds up everybody, and 4 MiB of elements of two bytes each take it a quarter of a second
and hundreds of MiB. So how long a request may be depends on what it may carry, and what may be
repeated a thousand times is counted first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from google.protobuf.descriptor import Descriptor

from generated.jobsvc.v1 import admin_service_pb2, job_service_pb2, schedule_service_pb2
from jobsvc.errors import Violation
from jobsvc.rpc.validate.fields import Violations
from jobsvc.rpc.validate.jobs import MESSAGE_BYTES_MAX, REQUESTS_MAX
from jobsvc.rpc.validate.payload import PAYLOAD_BYTES_MAX

KIB = 1024
# More than a request can need that keeps every other rule, its text in characters of four bytes.
PLAIN_BYTES_MAX = 192 * KIB
PAYLOAD_REQUEST_BYTES_MAX = PAYLOAD_BYTES_MAX + PLAIN_BYTES_MAX
BATCH = "JobService/SubmitJobs"
BYTES_MAX: Mapping[str, int] = {
    BATCH: MESSAGE_BYTES_MAX,
    "JobService/SubmitJob": PAYLOAD_REQUEST_BYTES_MAX,
    "JobService/RunJob": PAYLOAD_REQUEST_BYTES_MAX,
    "ScheduleService/CreateSchedule": PAYLOAD_REQUEST_BYTES_MAX,
    "ScheduleService/UpdateSchedule": PAYLOAD_REQUEST_BYTES_MAX,
}
# Enough to see what most of a long request is.
LOOKED_AT_MAX = 1_000

_INPUTS: Mapping[str, Descriptor] = {
    f"{service.name}/{method.name}": method.input_type
    for file in (job_service_pb2, schedule_service_pb2, admin_service_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
_REQUESTS = _INPUTS[BATCH].fields_by_name["requests"].number


def undecoded(method: str, data: bytes) -> Violations:
    """Of a request of `method` (`JobService/GetJob`; others than ours too) as it came. What is no
    message at all has no violations: the decoder says so."""
    if method == BATCH:
        return _batch(data)
    return _length(data, _INPUTS.get(method), BYTES_MAX.get(method, PLAIN_BYTES_MAX), "")


def _length(data: bytes, kind: Descriptor | None, bytes_max: int, path: str) -> Violations:
    if len(data) <= bytes_max:
        return []
    place = _longest(memoryview(data), kind, path) if kind is not None else path
    what = f"makes the request longer than {bytes_max // KIB:,} KiB"
    return [Violation(place or "request", what)]


def _batch(data: bytes) -> Violations:
    found: Violations = []
    index = 0
    for count, (number, start, end) in enumerate(_fields(memoryview(data))):
        if count >= REQUESTS_MAX:
            return [Violation("requests", f"must hold 1 to {REQUESTS_MAX:,} requests")]
        if number != _REQUESTS:
            continue
        if end - start > PAYLOAD_REQUEST_BYTES_MAX:
            kind = _INPUTS["JobService/SubmitJob"]
            place = f"requests[{index}]"
            found += _length(data[start:end], kind, PAYLOAD_REQUEST_BYTES_MAX, place)
        index += 1
    return found


def _longest(data: memoryview, kind: Descriptor, path: str) -> str:
    """The path of the field that most of the message's bytes are in, as far as one is; by its
    beginning, where it is one of very many."""
    lengths: Counter[int] = Counter()
    last: dict[int, memoryview] = {}
    for count, (number, start, end) in enumerate(_fields(data)):
        if count >= LOOKED_AT_MAX:
            break
        lengths[number] += end - start + 1  # an empty element is not nothing
        last[number] = data[start:end]
    if not lengths:
        return path
    number, _ = lengths.most_common(1)[0]
    field = kind.fields_by_number.get(number)
    if field is None:
        return path
    place = f"{path}.{field.name}" if path else field.name
    if field.message_type is None or field.is_repeated or len(last[number]) * 2 < len(data):
        return place
    if field.message_type.file.package == "google.protobuf":
        return place  # a payload: its own rules tell more
    return _longest(last[number], field.message_type, place)


def _fields(data: memoryview) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each field, as far as `data` is a message."""
    at, size = 0, len(data)
    try:
        while at < size:
            tag, start = _varint(data, at)
            match tag & 7:
                case 0:
                    _, end = _varint(data, start)
                case 1:
                    end = start + 8
                case 2:
                    length, start = _varint(data, start)
                    end = start + length
                case 3 | 4:  # a group's beginning and its end; what is between them counts, too
                    end = start
                case 5:
                    end = start + 4
                case _:
                    return
            if end > size:
                return
            yield tag >> 3, start, end
            at = end
    except IndexError:
        return


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """The number at a place, and the place behind it. Raises IndexError where it does not end."""
    number = data[at] & 127
    shift = 0
    while data[at] > 127:
        at += 1
        shift += 7
        if shift > 63:
            raise IndexError
        number |= (data[at] & 127) << shift
    return number, at + 1
