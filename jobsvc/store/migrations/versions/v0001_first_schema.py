"""The first schema.

Revision: 0001, after nothing
"""

import uuid

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

OLDEST_RELEASE = "0.1.0"

Time = sa.DateTime(timezone=True).with_variant(sa.BigInteger(), "sqlite")
Json = sa.JSON().with_variant(JSONB(), "postgresql")
BigId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "idempotency_keys",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("request_hash", sa.LargeBinary(), nullable=False),
        sa.Column("job_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("expire_time", Time, nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_idempotency_keys")),
    )
    op.create_index(
        "ix_idempotency_keys_expire_time", "idempotency_keys", ["expire_time"], unique=False
    )
    op.create_table(
        "job_events",
        sa.Column("job_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("event_time", Time, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("worker_id", sa.Text(), nullable=True),
        sa.Column("detail", sa.JSON(), nullable=True),
        sa.CheckConstraint(
            "state IN ('SCHEDULED', 'QUEUED', 'RUNNING', 'RETRYING', "
            "'SUCCEEDED', 'FAILED', 'CANCELLED')",
            name=op.f("ck_job_events_state"),
        ),
        sa.PrimaryKeyConstraint("job_id", "sequence", name=op.f("pk_job_events")),
    )
    op.create_table(
        "job_types",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("payload_schema", sa.Text(), nullable=True),
        sa.Column("queue", sa.Text(), nullable=True),
        sa.Column("max_attempts", sa.Integer(), nullable=True),
        sa.Column("timeout", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_job_types")),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("job_type", sa.Text(), nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("priority", sa.SmallInteger(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.Column("payload_content_type", sa.Text(), nullable=True),
        sa.Column("labels", Json, nullable=False),
        sa.Column("attempt", sa.Integer(), server_default="0", nullable=False),
        sa.Column("failures", sa.Integer(), server_default="0", nullable=False),
        sa.Column("crashes", sa.Integer(), server_default="0", nullable=False),
        sa.Column("max_attempts", sa.Integer(), nullable=False),
        sa.Column("initial_backoff", sa.Double(), nullable=False),
        sa.Column("backoff_multiplier", sa.Double(), nullable=False),
        sa.Column("max_backoff", sa.Double(), nullable=False),
        sa.Column("jitter", sa.Double(), nullable=False),
        sa.Column("timeout", sa.Double(), nullable=False),
        sa.Column("retention", sa.Double(), nullable=True),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.Column("trace_id", sa.Text(), nullable=False),
        sa.Column("span_id", sa.Text(), nullable=False),
        sa.Column("create_time", Time, nullable=False),
        sa.Column("schedule_time", Time, nullable=False),
        sa.Column("start_time", Time, nullable=True),
        sa.Column("finish_time", Time, nullable=True),
        sa.Column("next_attempt_time", Time, nullable=True),
        sa.Column("expire_time", Time, nullable=True),
        sa.Column("purge_time", Time, nullable=True),
        sa.Column("progress", Json, nullable=True),
        sa.Column("error", Json, nullable=True),
        sa.Column("result", sa.LargeBinary(), nullable=True),
        sa.Column("result_content_type", sa.Text(), nullable=True),
        sa.Column("worker_id", sa.Text(), nullable=True),
        sa.Column("lease_token", sa.Uuid(as_uuid=False), nullable=True),
        sa.Column("lease_expire_time", Time, nullable=True),
        sa.Column("cancel_reason", sa.Text(), nullable=True),
        sa.Column("held", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("last_sequence", sa.BigInteger(), nullable=False),
        sa.Column("log_bytes", sa.Integer(), server_default="0", nullable=False),
        sa.Column("output_bytes", sa.Integer(), server_default="0", nullable=False),
        sa.Column("queued_time", Time, nullable=True),
        sa.Column("dispatch_time", Time, nullable=True),
        sa.Column("dispatch_count", sa.Integer(), server_default="0", nullable=False),
        sa.CheckConstraint(
            "(finish_time IS NOT NULL) = (state IN ('SUCCEEDED', 'FAILED', 'CANCELLED'))",
            name=op.f("ck_jobs_finish_time"),
        ),
        sa.CheckConstraint(
            "(lease_token IS NOT NULL) = (state = 'RUNNING')", name=op.f("ck_jobs_lease")
        ),
        sa.CheckConstraint(
            "(next_attempt_time IS NOT NULL) = (state = 'RETRYING')", name=op.f("ck_jobs_retry")
        ),
        sa.CheckConstraint(
            "state IN ('SCHEDULED', 'QUEUED', 'RUNNING', 'RETRYING', "
            "'SUCCEEDED', 'FAILED', 'CANCELLED')",
            name=op.f("ck_jobs_state"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
        postgresql_with={"fillfactor": "80"},
    )
    op.create_index(
        "ix_jobs_expiring",
        "jobs",
        ["expire_time"],
        unique=False,
        postgresql_where=sa.text(
            "expire_time IS NOT NULL AND state IN ('SCHEDULED', 'QUEUED', 'RETRYING')"
        ),
        sqlite_where=sa.text(
            "expire_time IS NOT NULL AND state IN ('SCHEDULED', 'QUEUED', 'RETRYING')"
        ),
    )
    op.create_index(
        "ix_jobs_held",
        "jobs",
        ["queue", "job_type"],
        unique=False,
        postgresql_where=sa.text("held"),
        sqlite_where=sa.text("held"),
    )
    op.create_index(
        "ix_jobs_leased",
        "jobs",
        ["lease_expire_time"],
        unique=False,
        postgresql_where=sa.text("state = 'RUNNING'"),
        sqlite_where=sa.text("state = 'RUNNING'"),
    )
    op.create_index(
        "ix_jobs_purge",
        "jobs",
        ["purge_time"],
        unique=False,
        postgresql_where=sa.text("purge_time IS NOT NULL"),
        sqlite_where=sa.text("purge_time IS NOT NULL"),
    )
    op.create_index(
        "ix_jobs_queued",
        "jobs",
        ["queue", "dispatch_time"],
        unique=False,
        postgresql_where=sa.text("state = 'QUEUED'"),
        sqlite_where=sa.text("state = 'QUEUED'"),
    )
    op.create_index(
        "ix_jobs_retrying",
        "jobs",
        ["next_attempt_time"],
        unique=False,
        postgresql_where=sa.text("state = 'RETRYING'"),
        sqlite_where=sa.text("state = 'RETRYING'"),
    )
    op.create_index(
        "ix_jobs_scheduled",
        "jobs",
        ["schedule_time"],
        unique=False,
        postgresql_where=sa.text("state = 'SCHEDULED'"),
        sqlite_where=sa.text("state = 'SCHEDULED'"),
    )
    op.create_table(
        "outbox",
        sa.Column("id", BigId, sa.Identity(always=False), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("job_type", sa.Text(), nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("priority", sa.SmallInteger(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("error_type", sa.Text(), nullable=False),
        sa.Column("create_time", Time, nullable=False),
        sa.Column("not_before", Time, nullable=False),
        sa.CheckConstraint("kind IN ('job', 'dead')", name=op.f("ck_outbox_kind")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox")),
    )
    op.create_index("ix_outbox_job_id", "outbox", ["job_id"], unique=False)
    op.create_index("ix_outbox_not_before", "outbox", ["not_before"], unique=False)
    op.create_table(
        "queues",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("generation", sa.Integer(), server_default="1", nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_queues")),
    )
    service = op.create_table(
        "service",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("incarnation", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("oldest_release", sa.Text(), nullable=False),
        sa.Column("registry_revision", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_service_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_service")),
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("queues", Json, nullable=False),
        sa.Column("job_types", Json, nullable=False),
        sa.Column("concurrency", sa.Integer(), nullable=False),
        sa.Column("prefetch", sa.Integer(), nullable=False),
        sa.Column("start_time", Time, nullable=False),
        sa.Column("heartbeat_time", Time, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
    )
    op.bulk_insert(
        service,
        [
            {
                "id": 1,
                "incarnation": str(uuid.uuid4()),
                "oldest_release": OLDEST_RELEASE,
                "registry_revision": 0,
            }
        ],
    )


def downgrade() -> None:
    op.drop_table("workers")
    op.drop_table("service")
    op.drop_table("queues")
    op.drop_table("outbox")
    op.drop_table("jobs")
    op.drop_table("job_types")
    op.drop_table("job_events")
    op.drop_table("idempotency_keys")
