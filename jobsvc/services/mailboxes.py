"""How many bytes of events wait for watchers that read slowly."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, TypeVar

from jobsvc.core.attempts import Log, Output
from jobsvc.core.model import JobEvent

BYTES_MAX = 32 * 1024 * 1024
TAKE_BYTES = 64 * 1024

W = TypeVar("W", bound=Hashable)


class Mailboxes(Generic[W]):
    """The bytes of each watcher's mailbox. A mailbox is a read ahead: where there are too many
    bytes, it can be emptied and read again."""

    def __init__(self) -> None:
        self._held = 0
        self._bytes: dict[W, int] = {}  # the oldest first; none that is empty

    def put(self, watcher: W, count: int) -> Iterator[W]:
        """`count` bytes are put into an empty mailbox. Those whose mailboxes are to be emptied:
        never this one, so that somebody gets on."""
        if count:
            self._held += count
            self._bytes[watcher] = count
        while self._held > BYTES_MAX and len(self._bytes) > 1:
            oldest = next(iter(self._bytes))
            self.forget(oldest)
            yield oldest

    def take(self, watcher: W, events: Sequence[JobEvent]) -> int:
        """How many of the `events` in a mailbox leave it now: all, unless they are many bytes."""
        held = self._bytes.get(watcher, 0)
        if held <= TAKE_BYTES:
            self.forget(watcher)
            return len(events)
        count = taken = 0
        while count < len(events) and taken < TAKE_BYTES:
            taken += _bytes(events[count])
            count += 1
        if count == len(events):
            self.forget(watcher)
        else:
            left = held * (len(events) - count) // len(events)
            self._bytes[watcher] = left
            self._held += left - held
        return count

    def forget(self, watcher: W) -> None:
        self._held -= self._bytes.pop(watcher, 0)


def byte_count(events: Sequence[JobEvent]) -> int:
    """Of what handlers wrote; the rest of an event is small."""
    return sum(map(_bytes, events))


def _bytes(event: JobEvent) -> int:
    match event.report:
        case Output(text, data):
            return len(text or "") + len(data or b"")
        case Log(_, message):
            return len(message)
    return 0
