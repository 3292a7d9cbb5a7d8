"""What the broker has confirmed is owed no more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from jobsvc.store import dispatching
from jobsvc.store.database import Database
from jobsvc.store.dialects.prepared import Statement

FORGET_PUBLISHED: Final = Statement.from_file("forget_published", "bigint[]", durable=False)


def forget_published(database: Database, outbox_ids: Sequence[int]) -> None:
    """May be lost (the message is sent once more then), and so may run twice. Raises
    DatabaseUnavailable."""
    if database.sqlite:
        database.write(lambda tx: dispatching.forget_published(tx, outbox_ids))
    else:
        database.once(FORGET_PUBLISHED, list(outbox_ids))
