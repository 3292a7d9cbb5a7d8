"""What is read from files, and read anew when they change."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from jobsvc import telemetry

T = TypeVar("T")


class Followed(Generic[T]):
    """The value that files held when they were last read well. May be shared by threads."""

    def __init__(self, what: str, paths: Sequence[str], read: Callable[[], T]) -> None:
        """`read` raises ValueError, safe to log, for files that are not good; so does this. `what`
        names the value in the log. Without `paths` it never changes."""
        self._what = what
        self._paths = paths
        self._read = read
        self._lock = threading.Lock()
        self._seen = self._looked = self._look()
        self.current = read()

    def refresh(self) -> bool:
        """Reads the files if they hold something else than the last time; True if `current` is of
        that reading. Where they are not good it stays as it was, and an error is logged once."""
        with self._lock:
            seen = self._look()
            if seen == self._seen:
                return False
            self._seen = seen
            log = telemetry.get_logger(__name__)
            try:
                self.current = self._read()
            except ValueError as error:
                log.error("bad files; what was there stays", what=self._what, reason=str(error))
                return False
            log.info("files read anew", what=self._what)
            return True

    def settled(self) -> bool:
        """Whether the files hold what they held at the last call: nobody is in the middle of
        writing them."""
        before, self._looked = self._looked, self._look()
        return before == self._looked

    def _look(self) -> list[bytes]:
        """What the files hold, by digest: some hold keys. Sizes and times would not do: a file may
        be touched again and again, or replaced by one that has the times of the other."""
        return [_digest(path) for path in self._paths]


def _digest(path: str) -> bytes:
    try:
        return hashlib.sha256(Path(path).read_bytes()).digest()
    except OSError:
        return b""
