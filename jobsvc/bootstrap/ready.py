"""The last lines of a server's start."""

from __future__ import annotations

from jobsvc import telemetry
from jobsvc.settings import Settings


def announce(settings: Settings, address: str) -> None:
    log = telemetry.get_logger("jobsvc")
    if not (settings.tokens or settings.tokens_file):
        log.warning("no tokens are set: whoever reaches the address may do everything")
    log.info("ready", address=address)
