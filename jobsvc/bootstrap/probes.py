"""Probes and metrics over HTTP, where the settings want them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from jobsvc import metrics, telemetry
from jobsvc.errors import CannotStart
from jobsvc.settings import Settings
from jobsvc.telemetry import Probes, Vitals

if TYPE_CHECKING:  # the parent of several servers has no database, and is small
    from jobsvc.store.database import Database


def serve_probes(
    settings: Settings, database: Database, ready: Callable[[], bool]
) -> Probes | None:
    """Of this process. None where they are off. Raises CannotStart as `serve` does."""
    metrics.READY.set_function(ready)
    metrics.POOL_IN_USE.set_function(lambda: database.connections_in_use)
    return serve(settings, Vitals(ready))


def serve(settings: Settings, vitals: Vitals) -> Probes | None:
    """None where they are off. Raises CannotStart where the address cannot be had."""
    try:
        return telemetry.serve_probes(settings, vitals)
    except OSError as error:
        raise CannotStart(
            f"cannot serve metrics on {settings.metrics_listen}: {error.strerror}; "
            "set JOBSVC_METRICS_LISTEN"
        ) from error
