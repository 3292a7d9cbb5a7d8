"""A handler module that replaces Python's threads, as `gevent.monkey.patch_all()` does."""

from __future__ import annotations

import _thread
import threading
from typing import Any


def start(*_: Any) -> int:
    """It would run once the main thread waits for it, which it never does."""
    return 0


_thread.start_new_thread = threading._start_new_thread = start  # type: ignore[attr-defined]
