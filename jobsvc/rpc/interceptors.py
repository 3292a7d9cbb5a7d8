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
from contextlib import aclosing, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from jobsvc import metrics
from jobsvc.errors import (
    Draining,
    InvalidRequest,
    JobsvcError,
    Undecodable,
)
from jobsvc.rpc import status, validate
from jobsvc.rpc.access import LASTING, Access, admitted
from jobsvc.rpc.crowd import Crowd
from jobsvc.rpc.intake import PUBLIC_LIMITS, Intake, Receipt, RequestMissing
from jobsvc.rpc.patience import WRITE_SECONDS_MAX, ClientGone, Patience
from jobsvc.rpc.unread import Unread
from jobsvc.telemetry import get_logger
from jobsvc.tokens import ANONYMOUS
from jobsvc.tracing import begin_call, call_trace

log = get_logger(__name__)

# Generic to the type checker alone.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

OURS = "/jobsvc.v1."
# Calls that wait for something else than the server: they keep nobody from being worked on.
WAITING = frozenset({"JobService/GetResult"})
PUBLIC = "/"  # what the names of methods begin with that are not ours
ABORT_SECONDS_MAX = 1.0
LOOK_SECONDS = 0.25
STUCK_BYTES = 128 * 1024  # of a stream that has ended: what its client has not read


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


class CallBoundary(grpc.aio.ServerInterceptor):
    """Nothing leaves a call but an answer, a status of jobsvc.rpc.status, or the end of a call that
    the client has left.

    A call of ours that `access` does not admit is refused before anything else is looked at; a
    stream ends when it is no longer allowed. The methods that are not ours (health, reflection) are
    for everybody, and so have limits of their own.
    """

    def __init__(
        self,
        access: Access,
        *,
        write_seconds_max: float = WRITE_SECONDS_MAX,
        abort_seconds_max: float = ABORT_SECONDS_MAX,
        intake: Intake | None = None,
        public_intake: Intake | None = None,
        unread: Unread | None = None,
        crowd: Crowd | None = None,
    ) -> None:
        self.access = access
        self._write_seconds_max = write_seconds_max
        self._abort_seconds_max = abort_seconds_max
        self._intake = intake or Intake()
        self._public_intake = public_intake or Intake(PUBLIC_LIMITS)
        self._unread = unread or Unread()
        self._crowd = crowd or Crowd()
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

    async def follow(self) -> NoReturn:
        """Ends what takes its clients too long: a request to come, an answer to be read."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self._intake.look()
            self._public_intake.look()
            self._unread.look()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        path = handler_call_details.method
        ours = path.startswith(OURS)
        name = path.removeprefix(OURS)
        known = self._handlers.get(name)
        if known is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            known = self._handlers[name] = self._wrap(name, handler, public=not ours)
        metadata = handler_call_details.invocation_metadata or ()
        _metadata.set(metadata)
        if not ours:
            return known
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

    def _wrap(self, name: str, handler: Handler, *, public: bool) -> Handler:
        """Bytes in, bytes out: all of the (de)serializing is done inside the boundary. To grpc.aio
        all requests are streams, or it would ask for them before anybody could say no."""
        decode = handler.request_deserializer
        if not handler.response_streaming:
            method = handler.unary_unary
            if name in LASTING:
                method = self._held(name, method)
            return grpc.stream_unary_rpc_method_handler(self._unary(name, method, decode))
        if not public:
            return grpc.stream_stream_rpc_method_handler(
                self._stream(name, handler.unary_stream, decode)
            )
        method = handler.stream_stream or _of_first(handler.unary_stream)
        return grpc.stream_stream_rpc_method_handler(self._public_stream(name, method, decode))

    def _held(self, name: str, method: Any) -> Any:
        async def call(request: Message, context: Context) -> Message:
            async with self.access.held(name):
                answer: Message = await method(request, context)
                return answer

        return call

    def _unary(self, name: str, method: Any, decode: Any) -> Any:
        intake = self._public_intake if name.startswith(PUBLIC) else self._intake

        async def call(_requests: object, context: Context) -> bytes:
            by = _by(context)
            data, receipt = await self._received(name, by, context, intake)
            with self._under_way:
                start = time.monotonic()
                try:
                    self._begin(name)
                    request = _decoded(decode, data, name)
                    if name in WAITING:
                        intake.release(receipt)
                    response: Message = await method(request, context)
                    answer = response.SerializeToString()
                    self._unread.add(by, len(answer))
                    _log_answered(name, start)
                    return answer
                except BaseException as error:  # noqa: BLE001 - the boundary is for all of them
                    await self._end(name, start, error, context)
                finally:
                    intake.release(receipt)

        return call

    def _stream(self, name: str, method: Any, decode: Any) -> Any:
        async def call(_requests: object, context: Context) -> None:
            by = _by(context)
            data, receipt = await self._received(name, by, context, self._intake)
            with self._under_way:
                start = time.monotonic()
                try:
                    self._begin(name)
                    request = _decoded(decode, data, name)
                    del data
                    self._intake.release(receipt)
                    async with self.access.held(name):
                        await self._write(method(request, context), by, context)
                    self._unread.add(by, 0)
                    _log_answered(name, start)
                except BaseException as error:  # noqa: BLE001 - the boundary is for all of them
                    self._intake.release(receipt)
                    await self._end(name, start, error, context)

        return call

    def _public_stream(self, name: str, method: Any, decode: Any) -> Any:
        """One that lasts, of somebody who needs no token."""

        async def requests(by: str, context: Context) -> AsyncGenerator[Any]:
            with suppress(RequestMissing):
                while True:
                    data, receipt = await self._public_intake.receive(by, context)
                    self._public_intake.release(receipt)
                    yield _decoded(decode, data, name)

        async def call(_requests: object, context: Context) -> None:
            start, by = time.monotonic(), context.peer()
            call_trace.set(begin_call(name, _metadata.get()))
            try:
                async with self._crowd.held(by), aclosing(requests(by, context)) as given:
                    await self._write(method(given, context), by, context)
                self._unread.add(by, 0)
            except BaseException as error:  # noqa: BLE001 - the boundary is for all of them
                await self._end(name, start, error, context)

        return call

    async def _received(
        self, name: str, by: str, context: Context, intake: Intake
    ) -> tuple[bytes, Receipt]:
        """The call's request, as soon as it is there."""
        call_trace.set(begin_call(name, _metadata.get()))
        start = time.monotonic()
        try:
            return await intake.receive(by, context)
        except BaseException as error:  # noqa: BLE001 - the boundary is for all of them
            with self._under_way:
                await self._end(name, start, error, context)

    async def _write(
        self, messages: AsyncGenerator[Message | bytes], by: str, context: Context
    ) -> None:
        with Patience(self._write_seconds_max, by) as patience:
            self._unread.streams[patience] = None
            try:
                async with aclosing(messages):
                    async for message in messages:
                        await patience.write(_encoded(message), context)
            finally:
                del self._unread.streams[patience]

    def _begin(self, name: str) -> None:
        if name.startswith(PUBLIC):
            return
        self.access.check(name)
        if self._draining:
            raise Draining

    async def _end(
        self, name: str, start: float, error: BaseException, context: Context
    ) -> NoReturn:
        """Ends the call with the status of `error`. Raises what makes grpc leave the call alone:
        to return after a cancel would leak memory in it."""
        if isinstance(error, ClientGone) or _cancelled(error):
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
            self._unread.keep(_by(context), STUCK_BYTES)
            raise asyncio.CancelledError from None


def _by(context: Context) -> str:
    """Whose share the call takes: its token's, or that of its connection where there is none."""
    token = admitted.get(None)
    return context.peer() if token is None or token.name == ANONYMOUS else token.name


def _of_first(method: Any) -> Any:
    """A method that takes one request, as one that takes a stream of them."""

    async def call(requests: AsyncGenerator[Any], context: Context) -> AsyncGenerator[Any]:
        async for request in requests:
            async for message in method(request, context):
                yield message

    return call


def _encoded(message: Message | bytes) -> bytes:
    """What goes to many is encoded by its servicer, once."""
    return message if isinstance(message, bytes) else message.SerializeToString()


def _decoded(decode: Callable[[bytes], Any], data: bytes, name: str) -> Any:
    validate.check(validate.undecoded(name, data))
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
