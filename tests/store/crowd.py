"""Many jobs at once, written past all verbs, for the tests of what reads them."""

from __future__ import annotations

import random
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

from jobsvc.core.attempts import JobError
from jobsvc.core.model import JobFilter
from jobsvc.core.states import TERMINAL_STATES, JobState
from jobsvc.store.database import Transaction
from jobsvc.store.dialects.statements import insert_many
from jobsvc.store.rows import error_to_json
from jobsvc.store.tables import EPOCH, idempotency_keys, job_labels, jobs

START = datetime(2026, 3, 1, tzinfo=UTC)
DAYS = 10
TYPES = ("mail", "pack", "scan.deep")
QUEUES = ("default", "slow")
ERRORS = ("ValueError", "TIMEOUT", "a 'quoted' \"type\"")
LABELS = {"env": ("prod", "test", "pröd'\"x"), "shop.id": ("1", "2", "3", "")}


def moment(chance: random.Random) -> datetime:
    return START + timedelta(seconds=chance.randrange(DAYS * 86_400))


def random_row(chance: random.Random) -> dict[str, Any]:
    """A row of `jobs`. Its id begins with another clock than the database's, minutes off."""
    state = chance.choice(tuple(JobState))
    created = moment(chance)
    off = timedelta(seconds=chance.randrange(-500, 500))
    milliseconds = (created + off - EPOCH) // timedelta(milliseconds=1)
    low = chance.getrandbits(62) | 2 << 62
    failed = state is JobState.FAILED or chance.random() < 0.3
    error = JobError(chance.choice(ERRORS), "no", "line 1") if failed else None
    ended = created + timedelta(seconds=chance.randrange(86_400))
    some = [key for key in LABELS if chance.random() < 0.6]
    return {
        "id": str(uuid.UUID(int=milliseconds << 80 | 7 << 76 | low)),
        "job_type": chance.choice(TYPES),
        "queue": chance.choice(QUEUES),
        "state": state,
        "priority": 0,
        "payload": b"",
        "labels": {key: chance.choice(LABELS[key]) for key in some},
        "max_attempts": 10,
        "initial_backoff": 1.0,
        "backoff_multiplier": 1.0,
        "max_backoff": 1.0,
        "jitter": 0.0,
        "timeout": 1.0,
        "idempotency_key": f"k{chance.getrandbits(40)}" if chance.random() < 0.3 else None,
        "trace_id": "",
        "span_id": "",
        "create_time": created,
        "schedule_time": created,
        "finish_time": ended if state in TERMINAL_STATES else None,
        "next_attempt_time": created if state is JobState.RETRYING else None,
        "lease_token": str(uuid.UUID(int=1)) if state is JobState.RUNNING else None,
        "error": error and error_to_json(error),
        "error_type": error and error.type,
        "error_time": ended if error else None,
        "last_sequence": 1,
    }


def insert(tx: Transaction, rows: list[dict[str, Any]]) -> None:
    insert_many(tx.connection, jobs, rows)
    pairs = [
        {"key": key, "value": value, "job_id": row["id"]}
        for row in rows
        for key, value in row["labels"].items()
    ]
    insert_many(tx.connection, job_labels, pairs)
    keys = [
        {
            "key": row["idempotency_key"],
            "request_hash": b"",
            "job_id": row["id"],
            "expire_time": START,
        }
        for row in rows
        if row["idempotency_key"]
    ]
    insert_many(tx.connection, idempotency_keys, keys)


def random_filter(chance: random.Random, rows: list[dict[str, Any]]) -> JobFilter:
    """Each field is set now and then, mostly to what some job has."""

    def some(values: tuple[Any, ...]) -> frozenset[Any]:
        return frozenset(chance.sample(values, chance.randint(1, len(values))))

    key = chance.choice([row["idempotency_key"] for row in rows if row["idempotency_key"]])
    fields: dict[str, Any] = {
        "states": some(tuple(JobState)),
        "job_types": some((*TYPES, "unknown")),
        "queue": chance.choice((*QUEUES, "unknown")),
        "labels": {k: chance.choice(LABELS[k]) for k in chance.sample(list(LABELS), 1)},
        "error_types": some((*ERRORS, "unknown")),
        "create_time_after": moment(chance),
        "create_time_before": moment(chance),
        "finish_time_after": moment(chance),
        "finish_time_before": moment(chance),
    }
    chosen = {name: value for name, value in fields.items() if chance.random() < 0.25}
    if chance.random() < 0.05:
        chosen["idempotency_key"] = chance.choice((key, "unknown"))
    return JobFilter(**chosen)
