"""The types of locked rows say what the table says: mypy finds what they do not name."""

from __future__ import annotations

from typing import get_type_hints

from jobsvc.store.locking import LOCK_COLUMNS, JobChanges, LockedJob
from jobsvc.store.tables import jobs


def test_a_locked_job_has_the_columns_that_are_read_under_the_lock() -> None:
    beside = {"payload", "payload_content_type"}
    assert set(get_type_hints(LockedJob)) == {c.name for c in LOCK_COLUMNS} | beside


def test_only_columns_of_the_table_are_changed() -> None:
    assert set(get_type_hints(JobChanges)) <= set(jobs.c.keys())


def test_what_the_table_lets_be_null_may_be_none() -> None:
    hints = get_type_hints(LockedJob)
    nullable = {name for name, hint in hints.items() if type(None) in getattr(hint, "__args__", ())}
    assert nullable == {name for name in hints if jobs.c[name].nullable}
