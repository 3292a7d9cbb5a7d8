"""What every call of our services goes through: the door, decoding, the error boundary, one log
record.

grpc.aio by itself tells a caller the text of an exception, answers bytes that it cannot decode
with UNKNOWN, and lets a SystemExit in a handler end the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn, Self, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from jobsvc import metrics
from jobsvc.errors import (
    Draining,
    InvalidRequest,
    JobsvcError,
    Undecodable,
    WatcherTooSlow,
)
from jobsvc.rpc import status
from jobsvc.rpc.access import Access, admitted
from jobsvc.telemetry import get_logger
from jobsvc.tracing import begin_call, call_trace

log = get_logger(__name__)

# Generic to the type checker alone.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

OURS = "/jobsvc.v1."
WRITE_SECONDS_MAX = 20.0
ABORT_SECONDS_MAX = 1.0


# Of the call that the running task serves; each look at its context makes them anew.
_metadata: ContextVar[Iterable[tuple[str, Any]]] = ContextVar("metadata")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls (the name of a token, or `anonymous`), and under which trace."""

    actor: str
    trace_id: str
    span_id: str


def caller() -> Caller:
    """Of the call that the current task serves."""
    traced = call_trace.get()
    return Caller(admitted.get().name, traced.trace_id, traced.span_id)


class _UnderWay:
    """Counts the calls that have begun. grpc's own stop() does not wait for a handler that is
    ending its call with an error."""

    def __init__(self) -> None:
        self.count = 0
        self.none = asyncio.Event()
        self.none.set()

    def __enter__(self) -> None:
        self.count += 1
        self.none.clear()

    def __exit__(self, *_: object) -> None:
        self.count -= 1
        if not self.count:
            self.none.set()


class _ClientGone(Exception):
    """A write failed: nobody is left to tell."""


class CallBoundary(grpc.aio.ServerInterceptor):
    """Nothing leaves a call of ours but an answer, a status of jobsvc.rpc.status, or the end of a
    call that the client has left.

    A call that `access` does not admit is refused before anything else is looked at; a stream ends
    when it is no longer allowed. The methods of others (health, reflection) pass through untouched.
    """

    def __init__(
        self,
        access: Access,
        *,
        write_seconds_max: float = WRITE_SECONDS_MAX,
        abort_seconds_max: float = ABORT_SECONDS_MAX,
    ) -> None:
        self.access = access
        self._write_seconds_max = write_seconds_max
        self._abort_seconds_max = abort_seconds_max
        self._handlers: dict[str, Handler] = {}
        self._draining = False
        self._under_way = _UnderWay()

    def refuse_calls(self) -> None:
        """From now on each new call is answered with Draining."""
        self._draining = True

    async def wait_idle(self, seconds_max: float) -> None:
        """Returns once no call of ours is under way, or the time is over."""
        try:
            async with asyncio.timeout(seconds_max):
                await self._under_way.none.wait()
        except TimeoutError:
            log.warning("calls cut off", calls=self._under_way.count)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        path = handler_call_details.method
        name = path.removeprefix(OURS)
        known = self._handlers.get(name)
        if known is None:
            handler = await continuation(handler_call_details)
            if handler is None or not path.startswith(OURS):
                return handler
            known = self._handlers[name] = self._wrap(name, handler)
        metadata = handler_call_details.invocation_metadata or ()
        _metadata.set(metadata)
        try:
            admitted.set(self.access.admit(name, metadata))
        except JobsvcError as error:
            return self._refusing(name, error)
        return known

    def _refusing(self, name: str, error: JobsvcError) -> Handler:
        """Reads nothing of the request, whose bytes are never waited for or received."""

        async def call(_requests: object, context: Context) -> None:
            with self._under_way:
                call_trace.set(begin_call(name, _metadata.get()))
                await self._end(name, time.monotonic(), error, context)

        return grpc.stream_stream_rpc_method_handler(call)

    def _wrap(self, name: str, handler: Handler) -> Handler:
        """Bytes in, bytes out: all of the (de)serializing is done inside the boundary."""
        decode = handler.request_deserializer
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(name, handler.unary_stream, decode)
            )
        return grpc.unary_unary_rpc_method_handler(self._unary(name, handler.unary_unary, decode))

    def _unary(self, name: str, method: Any, decode: Any) -> Any:
        async def call(data: bytes, context: Context) -> bytes:
            with self._under_way:
                start = time.monotonic()
                call_trace.set(begin_call(name, _metadata.get()))
                try:
                    self._begin(name)
                    response: Message = await method(_decoded(decode, data, name), context)
                    answer = response.SerializeToString()
                    _log_answered(name, start)
                    return answer
                except BaseException as error:  # noqa: BLE001 - the boundary is for all of them
                    await self._end(name, start, error, context)

        return call

    def _stream(self, name: str, method: Any, decode: Any) -> Any:
        async def call(data: bytes, context: Context) -> None:
            with self._under_way:
                start = time.monotonic()
                call_trace.set(begin_call(name, _metadata.get()))
                try:
                    self._begin(name)
                    request = _decoded(decode, data, name)
                    messages: AsyncGenerator[Message | bytes] = method(request, context)
                    async with self.access.held(name), aclosing(messages):
                        with _Patience(self._write_seconds_max) as patience:
                            async for message in messages:
                                await patience.write(_encoded(message), context)
                    _log_answered(name, start)
                except BaseException as error:  # noqa: BLE001 - the boundary is for all of them
                    await self._end(name, start, error, context)

        return call

    def _begin(self, name: str) -> None:
        self.access.check(name)
        if self._draining:
            raise Draining

    async def _end(
        self, name: str, start: float, error: BaseException, context: Context
    ) -> NoReturn:
        """Ends the call with the status of `error`. Raises what makes grpc leave the call alone:
        to return after a cancel would leak memory in it."""
        if isinstance(error, _ClientGone) or _cancelled(error):
            _account(name, "CANCELLED", start)
            log.debug("call left by its client", method=name, ms=_ms_since(start))
            raise asyncio.CancelledError from None
        answer = status.answer(error)
        _account(name, answer.code.name, start)
        _log_failure(name, start, error, answer)
        try:
            # Blocks while the client does not read. The status stays with grpc, to be read later.
            async with asyncio.timeout(self._abort_seconds_max):
                await context.abort(answer.code, answer.message, answer.trailers)
        except (TimeoutError, grpc.aio.InternalError):
            raise asyncio.CancelledError from None


class _Patience:
    """With a stream's client: a write that is blocked for too long ends the stream.

    Most writes are over at once, so that they have one timer between them, which looks how long
    the one that is under way has been. It belongs to the task that makes it.
    """

    __slots__ = (
        *("_cancelling", "_is_over", "_loop", "_seconds_max", "_task", "_timer"),
        "_writing_since",
    )

    def __init__(self, seconds_max: float) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._seconds_max = seconds_max
        self._task = task
        self._cancelling = task.cancelling()
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._writing_since: float | None = None
        self._is_over = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    async def write(self, data: bytes, context: Context) -> None:
        """Raises WatcherTooSlow, and _ClientGone."""
        self._writing_since = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._seconds_max, self._look)
        try:
            await context.write(data)
        except asyncio.CancelledError:
            # Unless the client has left at the same moment, which is told by another cancel.
            if self._is_over and self._task.uncancel() <= self._cancelling:
                raise WatcherTooSlow from None
            raise
        except grpc.aio.BaseError as error:
            raise _ClientGone from error
        finally:
            self._writing_since = None

    def _look(self) -> None:
        self._timer = None
        if self._writing_since is None:
            return  # the next write begins anew
        left = self._writing_since + self._seconds_max - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
        else:
            self._is_over = True
            self._task.cancel()


def _encoded(message: Message | bytes) -> bytes:
    """What goes to many is encoded by its servicer, once."""
    return message if isinstance(message, bytes) else message.SerializeToString()


def _decoded(decode: Callable[[bytes], Any], data: bytes, name: str) -> Any:
    try:
        return decode(data)
    except DecodeError:
        raise Undecodable(f"{name.rpartition('/')[2]}Request") from None


def _cancelled(error: BaseException) -> bool:
    """Whether the call's own task was cancelled. A CancelledError can also come from a future that
    somebody else cancelled; grpc would leave the client without any answer then."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is None or task.cancelling() > 0
    return isinstance(error, GeneratorExit)


def _account(name: str, code: str, start: float) -> None:
    metrics.call_child(name, code).observe(time.monotonic() - start)
    call_trace.get().end(code)


def _log_answered(name: str, start: float) -> None:
    _account(name, "OK", start)
    if log.is_enabled_for(logging.DEBUG):
        log.debug("call", method=name, code="OK", ms=_ms_since(start), **_caller())


def _log_failure(name: str, start: float, error: BaseException, answer: status.Answer) -> None:
    fields = {"method": name, "code": answer.code.name, "ms": _ms_since(start), **_caller()}
    if answer.error_id:
        log.error("call failed", **fields, error_id=answer.error_id, exc_info=error)
    elif isinstance(error, InvalidRequest):
        # Its message names members of payloads.
        log.info("call refused", **fields, reason=answer.reason)
    else:
        log.info("call refused", **fields, reason=answer.reason, message=answer.message)


def _caller() -> dict[str, str]:
    """No actor for a call that was not admitted."""
    token = admitted.get(None)
    trace = {"trace_id": call_trace.get().trace_id}
    return trace if token is None else {"actor": token.name} | trace


def _ms_since(start: float) -> float:
    return round((time.monotonic() - start) * 1_000, 1)
