from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from jobsvc import cron

MINUTE = timedelta(minutes=1)


def ticks(expression: str, zone: str, after: datetime, until: datetime) -> Iterator[datetime]:
    """Each computed from the one before, as the store does."""
    while (after := cron.next_time(expression, zone, after)) <= until:
        yield after


def local(zone: str, *moments: datetime) -> list[str]:
    return [f"{m.astimezone(ZoneInfo(zone)):%m-%d %H:%M%z}" for m in moments]


@pytest.mark.parametrize(
    "expression",
    [
        *("* * * * *", "*/5 8-18 * * mon-fri", "0 0 29 2 *", "0 0 1,15 jan,JUL 0", "59 23 31 12 7"),
        *("0 0 L * *", "0 12 LW * *", "30 6 * * 5L", "0 9 * * MON#1", "  0   0 * * *  "),
        ",".join(map(str, range(60))) + " * * * *",
    ],
)
def test_what_is_a_cron_expression(expression: str) -> None:
    assert cron.flaw(expression) == ""


@pytest.mark.parametrize("expression", ["", "* * * *", "0 * * * * *", "@daily", "* * * * * 2026"])
def test_it_has_five_fields(expression: str) -> None:
    assert cron.flaw(expression).startswith("must have five fields: minute, hour, day of month")


@pytest.mark.parametrize(
    ("expression", "field"),
    [
        *(("60 * * * *", "minute"), ("-1 * * * *", "minute"), ("*/0 * * * *", "minute")),
        *(("1, * * * *", "minute"), ("\u0661 * * * *", "minute"), ("1/2/3 * * * *", "minute")),
        *(("0 24 * * *", "hour"), ("0 5-1 * * *", "hour"), ("0 0 0 * *", "day of month")),
        *(("0 0 32 * *", "day of month"), ("0 0 1 13 *", "month"), ("0 0 1 mai *", "month")),
        *(("0 0 * * 8", "day of week"), ("0 0 * * MON#6", "day of week")),
    ],
)
def test_a_bad_field_is_named(expression: str, field: str) -> None:
    assert cron.flaw(expression).startswith(f"its {field} is not valid")


def test_what_never_comes_is_refused() -> None:
    assert cron.flaw("0 0 30 2 *") == "its day of month is not valid, or in none of its months"
    assert cron.flaw("0 0 31 4,6 *").endswith("in none of its months")
    # The fifth Monday of a February is its 29th.
    assert cron.flaw("0 0 */15 2 MON#5").startswith("never comes")
    with pytest.raises(ValueError, match="no tick"):
        cron.next_time("0 0 */15 2 MON#5", "UTC", datetime(2026, 1, 1, tzinfo=UTC))


def test_zones() -> None:
    assert {"UTC", "Europe/Berlin", "Asia/Kathmandu", "Australia/Lord_Howe"} <= cron.zones()
    assert not {"", "Europe", "localtime", "posixrules", "europe/berlin"} & cron.zones()
    with pytest.raises(ValueError, match="Mars/Base"):
        cron.next_time("* * * * *", "Mars/Base", datetime(2026, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize(
    ("zone", "day", "expression", "expected"),
    [
        # Jumped over: right after the jump, and the next days as ever.
        ("Europe/Berlin", "2026-03-28", "30 2 * * *", ["03-28 02:30+0100", "03-29 03:00+0200"]),
        ("Africa/Cairo", "2026-04-23", "0 0 * * *", ["04-23 00:00+0200", "04-24 01:00+0300"]),
        # Together with what comes then anyway it is one tick.
        ("Europe/Berlin", "2026-03-29", "0 1-3 * * *", ["03-29 01:00+0100", "03-29 03:00+0200"]),
        # Repeated: once, the first time.
        ("Europe/Berlin", "2026-10-25", "30 2 * * *", ["10-25 02:30+0200", "10-26 02:30+0100"]),
        ("America/Santiago", "2026-04-04", "30 23 * * *", ["04-04 23:30-0300", "04-05 23:30-0400"]),
        # By the clock alone: again in each repeated hour, nothing in one that is left out.
        (
            "Europe/Berlin",
            "2026-10-25",
            "*/30 2 * * *",
            ["10-25 02:00+0200", "10-25 02:30+0200", "10-25 02:00+0100", "10-25 02:30+0100"],
        ),
        ("Europe/Berlin", "2026-03-29", "*/30 2 * * *", ["03-30 02:00+0200", "03-30 02:30+0200"]),
        ("Asia/Kathmandu", "2026-03-29", "15 4 * * *", ["03-29 04:15+0545", "03-30 04:15+0545"]),
        # A jump of half an hour, from 02:00 to 02:30.
        ("Australia/Lord_Howe", "2026-10-04", "15 2 * * *", ["10-04 02:30+1100"]),
        ("Australia/Lord_Howe", "2026-04-05", "45 1 * * *", ["04-05 01:45+1100"]),
    ],
)
def test_nights_on_which_clocks_change(
    zone: str, day: str, expression: str, expected: list[str]
) -> None:
    midnight = datetime.fromisoformat(day).replace(tzinfo=ZoneInfo(zone)).astimezone(UTC)
    found = ticks(expression, zone, midnight - MINUTE, midnight + timedelta(days=7))
    assert local(zone, *itertools.islice(found, len(expected))) == expected


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/St_Johns"])
@pytest.mark.parametrize("expression", ["17 * * * *", "*/30 0-4 * * *"])
def test_by_the_clock_alone_nothing_is_left_out(zone: str, expression: str) -> None:
    """Beside each minute of the days around each change of the clocks."""
    here = ZoneInfo(zone)
    year = [datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=n) for n in range(365 * 24)]
    changes = [
        a
        for a, b in itertools.pairwise(year)
        if a.astimezone(here).utcoffset() != b.astimezone(here).utcoffset()
    ]
    assert len(changes) >= 2
    sets = [_minutes(expression.split()[0]), _hours(expression.split()[1])]
    for change in changes:
        start = change - timedelta(hours=8, minutes=1)
        minutes = [start + n * MINUTE for n in range(1, 16 * 60)]
        walls = [(m, m.astimezone(here)) for m in minutes]
        expected = [m for m, wall in walls if wall.minute in sets[0] and wall.hour in sets[1]]
        assert list(ticks(expression, zone, start, minutes[-1])) == expected


def _minutes(field: str) -> range | list[int]:
    return range(0, 60, int(field[2:])) if field.startswith("*/") else [int(field)]


def _hours(field: str) -> range:
    return range(24) if field == "*" else range(5)


@pytest.mark.parametrize("zone", ["Europe/Berlin", "Australia/Lord_Howe", "Antarctica/Troll"])
@pytest.mark.parametrize("expression", ["30 1-3 * * *", "59 23 * * 0", "0 0 L * *"])
def test_a_year_goes_forward(zone: str, expression: str) -> None:
    """Whatever it is asked after: a tick, or any moment between two."""
    start, end = (datetime(year, 1, 1, tzinfo=UTC) for year in (2026, 2027))
    found = list(ticks(expression, zone, start, end))
    assert 12 <= len(found) <= 366 * 4
    for before, tick in itertools.pairwise(found):
        assert before < tick
        for after in (before + timedelta(microseconds=1), tick - timedelta(microseconds=1)):
            assert cron.next_time(expression, zone, after) == tick


def test_the_tick_before() -> None:
    noon = datetime(2026, 6, 1, 12, tzinfo=UTC)
    assert local("UTC", cron.previous_time("0 12 * * *", "UTC", noon)) == ["05-31 12:00+0000"]
    berlin = "Europe/Berlin"
    assert local(berlin, cron.previous_time("30 2 * * *", berlin, noon)) == ["06-01 02:30+0200"]


def test_in_a_repeated_hour_its_times_are_over() -> None:
    berlin = "Europe/Berlin"
    again = datetime.fromisoformat("2026-10-25 02:10+01:00")
    assert local(berlin, cron.next_time("30 2 * * *", berlin, again)) == ["10-26 02:30+0100"]
