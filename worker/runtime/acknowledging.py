"""How few calls tell a broker which messages of a channel are done."""

from __future__ import annotations

from collections.abc import Iterable


class Unacknowledged:
    """The tags of one channel that are not acknowledged yet, in the order of their delivery.

    What is done as far as the first that is not takes one call, whatever its number. What is done
    beyond that takes a call each, unless the ones before are done, too, by the next time.
    """

    def __init__(self) -> None:
        self._done: dict[int, bool] = {}
        self._beyond: set[int] = set()  # what was beyond the first gap the last time

    def __len__(self) -> int:
        return len(self._done)

    @property
    def waiting(self) -> bool:
        """Whether something is done that was kept for the next time."""
        return bool(self._beyond)

    def add(self, tag: int) -> None:
        self._done[tag] = False

    def remove(self, tag: int) -> None:
        """Of what goes back: no acknowledgement may include it any more."""
        self._done.pop(tag, None)
        self._beyond.discard(tag)

    def take(self, done: Iterable[int], keep: int) -> tuple[int | None, list[int]]:
        """What to acknowledge now that `done` is: all up to a tag, and others one by one.

        At most `keep` of those that would take a call each are kept for the next time.
        """
        singles = []
        for tag in done:
            if tag in self._done:
                self._done[tag] = True
            else:
                singles.append(tag)  # not of ours: the broker has something to say about it
        up_to = None
        for tag, is_done in self._done.items():
            if not is_done:
                break
            up_to = tag
        if up_to is not None:
            self._done = {tag: is_done for tag, is_done in self._done.items() if tag > up_to}
        beyond = [tag for tag, is_done in self._done.items() if is_done]
        kept = [tag for tag in beyond if tag not in self._beyond][:keep]
        self._beyond = set(kept)
        for tag in beyond:
            if tag not in self._beyond:
                del self._done[tag]
                singles.append(tag)
        return up_to, singles
