"""Pools that run handlers: in child processes, or in threads of this one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from worker.pool.base import Listener, Pool
from worker.pool.child import ChildLimits
from worker.pool.process import ProcessPool
from worker.pool.thread import ThreadPool
from worker.registry import HandlersError

__all__ = [
    "ChildLimits",
    "HandlersError",
    "Listener",
    "Pool",
    "ProcessPool",
    "ThreadPool",
    "make_pool",
]


def make_pool(
    isolation: Literal["process", "thread"],
    size: int,
    handler_modules: Sequence[str],
    listener: Listener,
    environment: Mapping[str, str] | None = None,
    limits: ChildLimits | None = None,
) -> Pool:
    """A pool of `size` slots, not yet started.

    `environment` is added to what handlers see in `os.environ`; in thread isolation that is this
    process's own, and `limits` have no say.
    """
    if isolation == "process":
        return ProcessPool(size, handler_modules, listener, environment, limits)
    return ThreadPool(size, handler_modules, listener, environment)
