"""Probes and metrics over HTTP, where the settings want them."""

from __future__ import annotations

from collections.abc import Callable

from jobsvc import metrics, telemetry
from jobsvc.errors import CannotStart
from jobsvc.settings import Settings
from jobsvc.store.database import Database
from jobsvc.telemetry import Probes


def serve_probes(
    settings: Settings, database: Database, ready: Callable[[], bool]
) -> Probes | None:
    """None where they are off. Raises CannotStart where the address cannot be had."""
    metrics.READY.set_function(ready)
    metrics.POOL_IN_USE.set_function(lambda: database.connections_in_use)
    try:
        return telemetry.serve_probes(settings, ready)
    except OSError as error:
        raise CannotStart(
            f"cannot serve metrics on {settings.metrics_listen}: {error.strerror}; "
            "set JOBSVC_METRICS_LISTEN"
        ) from error
