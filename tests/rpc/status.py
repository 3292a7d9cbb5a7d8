"""Reading what a refused call tells."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.json_format import MessageToDict
from google.rpc import error_details_pb2, status_pb2


@dataclass(frozen=True)
class Refusal:
    code: grpc.StatusCode
    message: str
    reason: str
    metadata: dict[str, str]
    details: dict[str, Any] = field(default_factory=dict)  # by the name of the message
    trailers: dict[str, Any] = field(default_factory=dict)

    @property
    def fields(self) -> list[str]:
        violations = self.details["BadRequest"].get("fieldViolations", [])
        return [violation["field"] for violation in violations]


def read_status(data: bytes) -> tuple[Any, dict[str, Any]]:
    """The Status, and its details as dicts by the names of their messages."""
    status = status_pb2.Status.FromString(data)
    details: dict[str, Any] = {}
    for packed in status.details:
        name = packed.TypeName().removeprefix("google.rpc.")
        assert name not in details
        message = getattr(error_details_pb2, name)()
        assert packed.Unpack(message)
        details[name] = MessageToDict(message)
    return status, details


def refusal(error: Any) -> Refusal:
    """Asserts what holds of every status that the service decides."""
    trailers = dict(error.trailing_metadata() or ())
    data = trailers["grpc-status-details-bin"]
    assert isinstance(data, bytes)
    status, details = read_status(data)
    assert (status.code, status.message) == (error.code().value[0], error.details())
    info = details.pop("ErrorInfo")
    assert info["domain"] == "jobsvc"
    return Refusal(
        error.code(), status.message, info["reason"], info.get("metadata", {}), details, trailers
    )


async def refused(call: Awaitable[Any]) -> Refusal:
    """The call must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return refusal(caught.value)


async def stream_refused(call: Any, expected_messages: int = 0) -> Refusal:
    """The stream must fail, after so many messages."""
    messages: list[Any] = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_into(messages, call)
    assert len(messages) == expected_messages
    return refusal(caught.value)


async def read_into(messages: list[Any], call: Any) -> None:
    """As far as it goes, also where it ends with an error."""
    async for message in call:
        messages += [message]
