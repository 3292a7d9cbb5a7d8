"""Millions of finished jobs at once: rows as the service would have left them, with an event each.

Straight into the tables, since the service would take hours; what is measured beside them goes
through the service.
"""

from __future__ import annotations

import sys
from typing import Any

import psycopg2

from jobsvc.store.dialects.sockets import waiting_long

CHUNK = 500_000

# One in a hundred has failed; a thousand job types, a hundred queues, one label in a thousand.
_JOBS = """
INSERT INTO jobs (id, job_type, queue, state, priority, payload, labels, attempt, failures,
    max_attempts, initial_backoff, backoff_multiplier, max_backoff, jitter, timeout, trace_id,
    span_id, create_time, schedule_time, start_time, finish_time, purge_time, queued_time,
    dispatch_time, error, error_type, result, worker_id, last_sequence)
SELECT (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') || '7'
        || substr(md5(n::text), 1, 3) || '8' || substr(md5(n::text), 4, 15))::uuid,
    'bench.type' || n % 1000, 'bench.queue' || n % 100,
    CASE WHEN n % 100 = 0 THEN 'FAILED' ELSE 'SUCCEEDED' END, 0, decode(repeat('78', 180), 'hex'),
    CASE WHEN n % 1000 = 0 THEN jsonb_build_object('bench', (n / 1000)::text)
        ELSE '{{}}'::jsonb END,
    1, (n % 100 = 0)::int, 10, 10, 2, 3600, 0.2, 1800, md5(n::text), '', at, at, at, at,
    at + interval '30 days', at, at,
    CASE WHEN n % 100 = 0 THEN '{{"type": "ValueError", "message": "no", "traceback": "",
        "retryable": false}}'::jsonb END,
    CASE WHEN n % 100 = 0 THEN 'ValueError' END,
    CASE WHEN n % 100 <> 0 THEN decode(repeat('79', 40), 'hex') END, 'bench', 3
FROM (SELECT n, now() - (interval '1 day') - ({total} - n) * interval '100 ms' AS at
    FROM generate_series({first}, {last}) AS n) AS numbered
"""
_EVENTS = """
INSERT INTO job_events (job_id, sequence, type, state, event_time, attempt)
SELECT id, 1, 'SUBMITTED', 'QUEUED', create_time, 0 FROM jobs
"""
_LABELS = """
INSERT INTO job_labels (key, value, job_id)
SELECT 'bench', labels ->> 'bench', id FROM jobs WHERE labels ? 'bench'
"""
# It is long ago: nothing of it is to be written while what comes after it is measured.
_SETTLE = (
    *(f"VACUUM ANALYZE {table}" for table in ("jobs", "job_events", "job_labels")),
    "CHECKPOINT",
)


def fill(url: str, total: int) -> None:
    """Into a database that has the schema and is empty."""
    connection: Any = psycopg2.connect(url.replace("+psycopg2", "", 1))
    try:
        connection.autocommit = True
        cursor = connection.cursor()
        with waiting_long():
            cursor.execute("SET synchronous_commit = off; SET maintenance_work_mem = '512MB'")
            for first in range(1, total + 1, CHUNK):
                last = min(first + CHUNK - 1, total)
                cursor.execute(_JOBS.format(first=first, last=last, total=total))
                print(f"{last:,} of {total:,} finished jobs", file=sys.stderr, flush=True)
            for statement in (_EVENTS, _LABELS, *_SETTLE):
                cursor.execute(statement)
    finally:
        connection.close()
