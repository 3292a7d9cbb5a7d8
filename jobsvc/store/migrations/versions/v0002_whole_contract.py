"""What lists, fleet watches, unique and concurrency keys, queue limits and schedules need.

Revision: 0002, after 0001
"""

import secrets
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

OLDEST_RELEASE = "0.1.0"

Time = sa.DateTime(timezone=True).with_variant(sa.BigInteger(), "sqlite")
Json = sa.JSON().with_variant(JSONB(), "postgresql")
JobId = sa.Uuid(as_uuid=False)

LISTED = ("state", "job_type", "queue")
TIMED = (
    ("scheduled", "schedule_time", "SCHEDULED"),
    ("retrying", "next_attempt_time", "RETRYING"),
    ("leased", "lease_expire_time", "RUNNING"),
)
ACTIVE = "state IN ('SCHEDULED', 'QUEUED', 'RETRYING', 'RUNNING')"


def upgrade() -> None:
    sqlite = op.get_context().dialect.name == "sqlite"
    _jobs(sqlite)
    _labels(sqlite)
    op.add_column("job_events", sa.Column("x", sa.BigInteger(), server_default="0", nullable=False))
    op.create_index("ix_job_events_x", "job_events", ["x"])
    op.add_column("workers", sa.Column("claim_time", Time))
    op.add_column("workers", sa.Column("unacknowledged", Json, server_default="{}", nullable=False))
    _queues()
    _schedules()
    _service()


def _job_columns() -> list[sa.Column[Any]]:
    return [
        sa.Column("unique_key", sa.Text()),
        sa.Column("unique_scope", sa.Text()),
        sa.Column("unique_on_conflict", sa.Text()),
        sa.Column("concurrency_key", sa.Text()),
        sa.Column("concurrency_max", sa.Integer()),
        sa.Column("error_type", sa.Text()),
        sa.Column("error_time", Time),
        sa.Column("held_for", sa.Text()),
        sa.Column("last_x", sa.BigInteger(), server_default="0", nullable=False),
    ]


def _service_columns() -> list[sa.Column[Any]]:
    return [
        sa.Column("limited", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("secret", sa.LargeBinary(), server_default=sa.text("''"), nullable=False),
        sa.Column("x_base", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("home", sa.Text(), server_default=sa.text("''"), nullable=False),
    ]


def _jobs(sqlite: bool) -> None:
    for column in _job_columns():
        op.add_column("jobs", column)
    op.execute("UPDATE jobs SET held_for = 'TYPE' WHERE held")
    if sqlite:
        op.execute(
            "UPDATE jobs SET error_type = json_extract(error, '$.type') WHERE error IS NOT NULL"
        )
    else:
        op.execute("UPDATE jobs SET error_type = error ->> 'type' WHERE error IS NOT NULL")
    # Of one that has not ended, the latest attempt's start is as near as its columns tell.
    op.execute(
        "UPDATE jobs SET error_time = coalesce(finish_time, start_time) WHERE error IS NOT NULL"
    )
    op.drop_index("ix_jobs_held", "jobs")
    best, widest = sa.text("priority DESC"), sa.text("concurrency_max DESC")
    held_for_key = "held AND held_for = 'KEY'"
    _index("ix_jobs_held", ["queue", best, "id"], "held AND held_for = 'QUEUE'")
    _index("ix_jobs_held_key", ["concurrency_key", widest, best, "id"], held_for_key)
    _index(
        "ix_jobs_held_type",
        ["queue", "job_type", "id"],
        "held AND (held_for IS NULL OR held_for = 'TYPE')",
    )
    offered = "state = 'QUEUED' AND held_for = 'OFFERED'"
    _index("ix_jobs_offered", ["queue", "dispatch_time"], offered)
    _index("ix_jobs_offered_key", ["concurrency_key", "dispatch_time"], offered)
    for name, moment, state in TIMED:
        op.drop_index(f"ix_jobs_{name}", "jobs")
        _index(f"ix_jobs_{name}", [moment, "queue"], f"state = '{state}'")
    _index(
        "ix_jobs_running_key",
        ["concurrency_key"],
        "concurrency_key IS NOT NULL AND state = 'RUNNING'",
    )
    _index("ix_jobs_unique", ["job_type", "unique_key"], f"unique_key IS NOT NULL AND {ACTIVE}")
    for name in LISTED:
        op.create_index(f"ix_jobs_list_{name}", "jobs", [name, "id"])
    _index("ix_jobs_list_error_type", ["error_type", "id"], "error_type IS NOT NULL")
    has_error = sa.text("(error_time IS NOT NULL)")
    _index("ix_jobs_list_error", [has_error, "id"], "error_time IS NOT NULL")
    _index("ix_jobs_finish_time", ["finish_time"], "finish_time IS NOT NULL")


def _index(name: str, columns: list[str | sa.TextClause], where: str) -> None:
    condition = sa.text(where)
    op.create_index(name, "jobs", columns, postgresql_where=condition, sqlite_where=condition)


def _labels(sqlite: bool) -> None:
    op.create_table(
        "job_labels",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("job_id", JobId, nullable=False),
        sa.PrimaryKeyConstraint("key", "value", "job_id", name=op.f("pk_job_labels")),
    )
    if sqlite:
        pairs = "SELECT pair.key, pair.value, jobs.id FROM jobs, json_each(jobs.labels) AS pair"
    else:
        pairs = (
            "SELECT pair.key, pair.value, jobs.id FROM jobs, jsonb_each_text(jobs.labels) AS pair"
        )
    op.execute(f"INSERT INTO job_labels (key, value, job_id) {pairs}")
    op.create_index("ix_job_labels_job_id", "job_labels", ["job_id"])


def _queues() -> None:
    op.add_column(
        "queues", sa.Column("paused", sa.Boolean(), server_default=sa.false(), nullable=False)
    )
    op.add_column("queues", sa.Column("max_running", sa.Integer()))
    op.add_column("queues", sa.Column("rate_max_starts", sa.Integer()))
    # With its column, since SQLite can add a check in no other way.
    kind = sa.Double().compile(dialect=op.get_context().dialect)
    op.execute(
        f"ALTER TABLE queues ADD COLUMN rate_period {kind} CONSTRAINT ck_queues_rate "
        "CHECK ((rate_max_starts IS NULL) = (rate_period IS NULL))"
    )
    op.create_table(
        "queue_starts",
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("until", Time, nullable=False),
        sa.Column("starts", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("queue", "until", name=op.f("pk_queue_starts")),
    )


def _schedules() -> None:
    op.create_table(
        "schedules",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("cron", sa.Text(), nullable=False),
        sa.Column("time_zone", sa.Text(), nullable=False),
        sa.Column("request", sa.LargeBinary(), nullable=False),
        sa.Column("paused", sa.Boolean(), nullable=False),
        sa.Column("missed_ticks", sa.Text(), nullable=False),
        sa.Column("overlap", sa.Text(), nullable=False),
        sa.Column("next_time", Time, nullable=False),
        sa.Column("last_time", Time),
        sa.Column("last_job_id", JobId),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "missed_ticks IN ('SKIP', 'RUN_ONCE')", name=op.f("ck_schedules_missed_ticks")
        ),
        sa.CheckConstraint("overlap IN ('ALLOW', 'SKIP')", name=op.f("ck_schedules_overlap")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_schedules")),
    )
    condition = sa.text("NOT paused")
    op.create_index(
        "ix_schedules_next_time",
        "schedules",
        ["next_time"],
        postgresql_where=condition,
        sqlite_where=condition,
    )


def _service() -> None:
    for column in _service_columns():
        op.add_column("service", column)
    service = sa.table(
        "service", sa.column("secret", sa.LargeBinary()), sa.column("oldest_release", sa.Text())
    )
    op.execute(
        sa.update(service).values(secret=secrets.token_bytes(32), oldest_release=OLDEST_RELEASE)
    )


def downgrade() -> None:
    for table in ("schedules", "queue_starts", "job_labels"):
        op.drop_table(table)
    for column in _service_columns():
        op.drop_column("service", column.name)
    for name in ("rate_period", "rate_max_starts", "max_running", "paused"):
        op.drop_column("queues", name)
    for name in ("unacknowledged", "claim_time"):
        op.drop_column("workers", name)
    op.drop_index("ix_job_events_x", "job_events")
    op.drop_column("job_events", "x")
    held = ("held", "held_key", "held_type", "offered", "offered_key")
    indexes = ("finish_time", *held, "running_key", "unique")
    for name in (*indexes, *(f"list_{column}" for column in (*LISTED, "error_type", "error"))):
        op.drop_index(f"ix_jobs_{name}", "jobs")
    _index("ix_jobs_held", ["queue", "job_type"], "held")
    for name, moment, state in TIMED:
        op.drop_index(f"ix_jobs_{name}", "jobs")
        _index(f"ix_jobs_{name}", [moment], f"state = '{state}'")
    for column in _job_columns():
        op.drop_column("jobs", column.name)
