"""What calls may hold of their requests, and for how long a request may take to come.

gRPC's core makes room for a whole message as soon as it is asked for it. So it is asked only while
there is room for the longest: a call waits for its turn, and the turn goes round between callers.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import grpc.aio

from jobsvc.errors import JobsvcError, LimitReached, Undecodable
from jobsvc.rpc.validate import MESSAGE_BYTES_MAX

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

MIB = 1024 * 1024
# What a call that is worked on counts for at least, which bounds how many are: the others wait
# here, where the turn goes round, and not before the database, where nobody looks whose they are.
CALL_BYTES = 128 * 1024


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """Bytes of requests that come or are worked on, in all and of one caller; how many calls may
    wait for their turn; how long a request may take to come, and how long if others wait."""

    bytes_max: int = 96 * MIB
    caller_bytes_max: int = 64 * MIB
    waiting_max: int = 6_000
    seconds_max: float = 30.0
    pressed_seconds_max: float = 0.5


# Of calls that need no token: their requests are short, and strangers hold up nobody but strangers.
PUBLIC_LIMITS = IntakeLimits(bytes_max=24 * MIB, caller_bytes_max=9 * MIB, waiting_max=1_000)


class RequestMissing(Undecodable):
    """The client has ended its side of the call without a message."""

    def __init__(self) -> None:
        JobsvcError.__init__(self, "the client ended its side of the call without a request")


class Receipt:
    """What one call holds; `refusal` is why its request is not waited for any longer."""

    __slots__ = ("caller", "cancelling", "held", "refusal", "since", "task", "turn")

    def __init__(self, caller: str, now: float) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.caller = caller
        self.cancelling = task.cancelling()
        self.held = 0
        self.refusal: LimitReached | None = None
        self.since = now
        self.task = task
        self.turn: asyncio.Future[None] | None = None

    def refuse(self, why: str) -> None:
        if self.refusal is None:
            self.refusal = LimitReached(why)
            self.task.cancel()


class Intake:
    """For one event loop."""

    def __init__(self, limits: IntakeLimits | None = None) -> None:
        self._limits = limits or IntakeLimits()
        self._held = 0
        self._by_caller: dict[str, int] = {}
        # Whose request is being received, and who waits for that; the longest first.
        self._receiving: dict[Receipt, None] = {}
        self._waiting: dict[Receipt, None] = {}
        self._queues: OrderedDict[str, deque[Receipt]] = OrderedDict()

    async def receive(self, caller: str, context: Context) -> tuple[bytes, Receipt]:
        """One message of the call, and what is to be released once it has been worked on. Raises
        LimitReached and RequestMissing."""
        receipt = Receipt(caller, time.monotonic())
        try:
            if caller in self._queues or not self._has_room(caller):
                await self._wait(receipt)
            else:
                self._hold(receipt, MESSAGE_BYTES_MAX)
            self._receiving[receipt] = None
            data = await context.read()
            if data is grpc.aio.EOF:
                raise RequestMissing
        except BaseException as error:  # noqa: BLE001 - raised again, or what stands behind it
            self.release(receipt)
            self._raise(receipt, error)
        finally:
            self._receiving.pop(receipt, None)
        self._shrink(receipt, max(len(data), CALL_BYTES))
        return data, receipt

    def release(self, receipt: Receipt) -> None:
        self._shrink(receipt, 0)

    def look(self) -> None:
        """Ends what takes too long. To be called now and then."""
        now, limits = time.monotonic(), self._limits
        for coming in (self._receiving, self._waiting):
            for receipt in coming:
                if receipt.since + limits.seconds_max > now:
                    break
                receipt.refuse(f"no request came within {limits.seconds_max:g} s")
        if self._waiting and self._receiving:
            self._press(now - limits.pressed_seconds_max)

    def _press(self, since: float) -> None:
        """Others wait: for each caller that does, one request that has been coming for long is
        given up, and first those of whoever holds most."""
        slow = [receipt for receipt in self._receiving if receipt.since < since]
        slow.sort(key=lambda receipt: self._by_caller[receipt.caller], reverse=True)
        for receipt in slow[: len(self._queues)]:
            receipt.refuse("the request came slowly, and others waited")

    async def _wait(self, receipt: Receipt) -> None:
        if len(self._waiting) >= self._limits.waiting_max:
            self._make_way(receipt)
        receipt.turn = asyncio.get_running_loop().create_future()
        self._waiting[receipt] = None
        self._queues.setdefault(receipt.caller, deque()).append(receipt)
        try:
            await receipt.turn
        except BaseException:
            self._drop(receipt)
            raise
        receipt.since = time.monotonic()

    def _make_way(self, receipt: Receipt) -> None:
        """Room for one more in the queues: at the cost of the caller that has most there."""
        most = max(self._queues, key=lambda caller: len(self._queues[caller]))
        why = f"{self._limits.waiting_max} calls wait for their requests to be read already"
        if len(self._queues.get(receipt.caller, ())) + 1 >= len(self._queues[most]):
            raise LimitReached(why)
        last = self._queues[most][-1]
        self._drop(last)
        last.refuse(why)

    def _drop(self, receipt: Receipt) -> None:
        if receipt not in self._waiting:
            return
        del self._waiting[receipt]
        queue = self._queues[receipt.caller]
        queue.remove(receipt)
        if not queue:
            del self._queues[receipt.caller]

    def _has_room(self, caller: str) -> bool:
        limits = self._limits
        return (
            self._held + MESSAGE_BYTES_MAX <= limits.bytes_max
            and self._by_caller.get(caller, 0) + MESSAGE_BYTES_MAX <= limits.caller_bytes_max
        )

    def _hold(self, receipt: Receipt, count: int) -> None:
        receipt.held = count
        self._held += count
        self._by_caller[receipt.caller] = self._by_caller.get(receipt.caller, 0) + count

    def _shrink(self, receipt: Receipt, count: int) -> None:
        if receipt.held == count:
            return
        freed, receipt.held = receipt.held - count, count
        self._held -= freed
        if left := self._by_caller[receipt.caller] - freed:
            self._by_caller[receipt.caller] = left
        else:
            del self._by_caller[receipt.caller]
        if self._queues:
            self._serve()

    def _serve(self) -> None:
        """Gives turns, as long as there is room, round about between the callers."""
        for _ in range(len(self._queues)):
            if self._held + MESSAGE_BYTES_MAX > self._limits.bytes_max:
                return
            caller, queue = self._queues.popitem(last=False)
            if self._has_room(caller):
                receipt = queue.popleft()
                del self._waiting[receipt]
                if receipt.turn is not None and not receipt.turn.done():
                    self._hold(receipt, MESSAGE_BYTES_MAX)
                    receipt.turn.set_result(None)
            if queue:
                self._queues[caller] = queue

    @staticmethod
    def _raise(receipt: Receipt, error: BaseException) -> NoReturn:
        # Unless the client has left at the same moment, which is told by another cancel.
        if (
            receipt.refusal is not None
            and isinstance(error, asyncio.CancelledError)
            and receipt.task.uncancel() <= receipt.cancelling
        ):
            raise receipt.refusal from None
        raise error
