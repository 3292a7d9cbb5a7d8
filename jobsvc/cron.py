"""Cron expressions of five fields, read in a time zone.

As Debian's cron has it: where neither minute nor hour begins with `*`, a time that the clocks jump
over comes right after the jump, and one that they repeat comes once. Any other expression goes by
the clock alone: it has no tick in an hour that is jumped over, and all of them again in an hour
that is repeated.
"""

from __future__ import annotations

import functools
import zoneinfo
from datetime import UTC, datetime

from cronsim import CronSim, CronSimError

FIELDS = 5
_REFERENCE = datetime(2026, 1, 1, tzinfo=UTC)
# What some systems have among their zones, and is none.
_NO_ZONES = frozenset({"Factory", "localtime"})


def flaw(expression: str) -> str:
    """What is wrong with an expression; empty if nothing is."""
    if len(expression.split()) != FIELDS:
        return "must have five fields: minute, hour, day of month, month, day of week"
    try:
        next(CronSim(expression, _REFERENCE))
    except CronSimError as error:
        field = str(error).removeprefix("Bad ").replace("-", " ")
        never = ", or in none of its months" if field == "day of month" else ""
        return f"its {field} is not valid{never}"
    except StopIteration:
        return "never comes: no day within 50 years fits all of its fields"
    return ""


@functools.cache
def zones() -> frozenset[str]:
    return frozenset(zoneinfo.available_timezones()) - _NO_ZONES


def next_time(expression: str, time_zone: str, after: datetime) -> datetime:
    """The first tick after a moment. Raises ValueError where there is none, or the expression or
    the zone cannot be read (any more: zones are the machine's)."""
    try:
        for tick in CronSim(expression, after.astimezone(zoneinfo.ZoneInfo(time_zone))):
            # In a repeated hour the first of its times can lie before.
            if (moment := tick.astimezone(UTC)) > after:
                return moment
    except (CronSimError, zoneinfo.ZoneInfoNotFoundError) as error:
        raise ValueError(str(error)) from error
    raise ValueError("it has no tick within 50 years")


def previous_time(expression: str, time_zone: str, before: datetime) -> datetime:
    """A tick before a moment: the last, but for the nights on which clocks change."""
    zone = zoneinfo.ZoneInfo(time_zone)
    return next(CronSim(expression, before.astimezone(zone), reverse=True)).astimezone(UTC)
