"""What the formats of a JSON Schema take: as much as the models that are announced with them.

That is more than the standards of these names: a time without a zone, a UUID without hyphens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)
from typing import Any, Final
from uuid import UUID

from pydantic import (
    UUID1,
    UUID3,
    UUID4,
    UUID5,
    UUID6,
    UUID7,
    UUID8,
    AnyUrl,
    IPvAnyAddress,
    IPvAnyInterface,
    IPvAnyNetwork,
    TypeAdapter,
)

_TYPES: Final[Mapping[str, Any]] = {
    "date": date,
    "date-time": datetime,
    "time": time,
    "duration": timedelta,
    "uuid": UUID,
    "uuid1": UUID1,
    "uuid3": UUID3,
    "uuid4": UUID4,
    "uuid5": UUID5,
    "uuid6": UUID6,
    "uuid7": UUID7,
    "uuid8": UUID8,
    "ipv4": IPv4Address,
    "ipv4interface": IPv4Interface,
    "ipv4network": IPv4Network,
    "ipv6": IPv6Address,
    "ipv6interface": IPv6Interface,
    "ipv6network": IPv6Network,
    "ipvanyaddress": IPvAnyAddress,
    "ipvanyinterface": IPvAnyInterface,
    "ipvanynetwork": IPvAnyNetwork,
    "uri": AnyUrl,
}
# The validator has rules of its own for these, which are not those of any model.
_UNCHECKED: Final = (
    *("email", "hostname", "idn-email", "idn-hostname", "iri", "iri-reference", "json-pointer"),
    *("regex", "relative-json-pointer", "uri-reference", "uri-template"),
)


def _taken_as(annotation: Any) -> Callable[[str], bool]:
    # Of the adapter's own, as it answers without an exception.
    return TypeAdapter(annotation).validator.isinstance_python


FORMATS: Final[dict[str, Callable[[str], bool]]] = {
    **{name: _taken_as(annotation) for name, annotation in _TYPES.items()},
    **dict.fromkeys(_UNCHECKED, lambda _: True),
}
