"""Why the database cannot be had, told to whoever runs the service."""

from __future__ import annotations

import threading
import time

from jobsvc import telemetry

# Out of sight for so long, a trouble is news again.
FORGET_SECONDS = 60.0


class Troubles:
    """Logs each once for as long as it lasts, however many tries meet it, of whichever thread; what
    else succeeds meanwhile is no end of it: with a full disk, or a privilege that is missing, many
    things do. Safe to use from any thread."""

    def __init__(self) -> None:
        self._seen: dict[str, float] = {}  # monotonic seconds, when last
        self._lock = threading.Lock()
        self._log = telemetry.get_logger("database")

    def tell(self, cause: str) -> None:
        now = time.monotonic()
        with self._lock:
            self._seen = {c: at for c, at in self._seen.items() if now - at < FORGET_SECONDS}
            is_news = cause not in self._seen
            self._seen[cause] = now
        if is_news:
            self._log.warning("database out of reach", reason=cause)
