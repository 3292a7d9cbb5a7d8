"""What a call can end with other than an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from jobsvc.errors import Violation

_PUSHBACK = "grpc-retry-pushback-ms"


class CallFailed(Exception):
    """The server said no, or could not be reached.

    `code` is the name of the gRPC status code. `reason`, `violations` and `metadata` are what the
    service says of it; they are empty for an error that gRPC itself made. `retry_after` is when
    the server asks to be tried again, in seconds: None where it does not say, negative where it
    asks not to be.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        reason: str = "",
        violations: tuple[Violation, ...] = (),
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{code} {reason}: {message}" if reason else f"{code}: {message}")
        self.code = code
        self.message = message
        self.reason = reason
        self.violations = violations
        self.metadata = metadata or {}
        self.retry_after = retry_after

    @property
    def transient(self) -> bool:
        """Whether the same call may be answered if it is made again."""
        if self.retry_after is not None:
            return self.retry_after >= 0
        if self.code == "UNAVAILABLE":
            return True
        # Without a reason these come from the connection and not from the service.
        return not self.reason and self.code in {"CANCELLED", "INTERNAL", "UNKNOWN"}


def call_failed(error: grpc.RpcError) -> CallFailed:
    """The client's error for one that grpc raised from a call."""
    call = cast(grpc.Call, error)  # as every error that a call raises is
    code = call.code()
    reason = ""
    metadata: Mapping[str, str] = {}
    violations: tuple[Violation, ...] = ()
    retry_after = _pushback(call)
    status = _status(call)
    for detail in () if status is None else status.details:
        info = error_details_pb2.ErrorInfo()
        bad = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad):
            violations = tuple(Violation(v.field, v.description) for v in bad.field_violations)
        elif detail.Unpack(retry) and retry_after is None:
            retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    return CallFailed(
        code.name,
        call.details() or "",
        reason=reason,
        violations=violations,
        metadata=metadata,
        retry_after=retry_after,
    )


def _status(call: grpc.Call) -> status_pb2.Status | None:
    try:
        return rpc_status.from_call(call)
    except (ValueError, DecodeError):  # not of our service's making
        return None


def _pushback(call: grpc.Call) -> float | None:
    for key, value in call.trailing_metadata() or ():
        if key == _PUSHBACK:
            try:
                return int(value) / 1000
            except ValueError:
                return -1.0  # by gRPC's rule: what is no number means not to retry
    return None
