"""The tables, their named checks and the indexes, each with the query that it serves.

Payloads and results are bytes in wire form, never jsonb: it is cheaper, and jsonb is not exact
(it loses -0.0, the order of keys and duplicates). Spans are seconds as float.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from jobsvc.core.states import TERMINAL_STATES, WAITING_STATES, JobState

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


class UtcTime(sa.types.TypeDecorator[datetime]):
    """An aware UTC datetime: timestamptz, on SQLite (which has none) microseconds since 1970."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        if dialect.name == "sqlite":
            return dialect.type_descriptor(sa.BigInteger())
        return dialect.type_descriptor(sa.DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> Any:
        if value is None or dialect.name != "sqlite":
            return value
        return (value - EPOCH) // MICROSECOND

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        if dialect.name == "sqlite":
            return EPOCH + timedelta(microseconds=value)
        moment: datetime = value
        return moment if moment.tzinfo is UTC else moment.astimezone(UTC)


JobId = sa.Uuid(as_uuid=False)
Json = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
BigId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Seconds: sa.Double[float] = sa.Double()

metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
    }
)


def _any_of(column: str, values: tuple[str, ...]) -> str:
    return f"{column} IN ({', '.join(repr(str(v)) for v in values)})"


def _where(condition: str) -> dict[str, Any]:
    return {"postgresql_where": sa.text(condition), "sqlite_where": sa.text(condition)}


_waiting = _any_of("state", WAITING_STATES)
_active = _any_of("state", (*WAITING_STATES, JobState.RUNNING))
_ended = _any_of("state", TERMINAL_STATES)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", JobId, primary_key=True),
    sa.Column("job_type", sa.Text, nullable=False),
    sa.Column("queue", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("priority", sa.SmallInteger, nullable=False),
    sa.Column("payload", sa.LargeBinary, nullable=False),
    sa.Column("payload_content_type", sa.Text),
    sa.Column("labels", Json, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False, server_default="0"),
    # Failed attempts and lost workers of the present budget: since SUBMITTED, or a retry by hand.
    sa.Column("failures", sa.Integer, nullable=False, server_default="0"),
    sa.Column("crashes", sa.Integer, nullable=False, server_default="0"),
    # It ran in a worker when that died: it runs alone in one, until an attempt ends by itself.
    sa.Column("apart", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("max_attempts", sa.Integer, nullable=False),
    sa.Column("initial_backoff", Seconds, nullable=False),
    sa.Column("backoff_multiplier", Seconds, nullable=False),
    sa.Column("max_backoff", Seconds, nullable=False),
    sa.Column("jitter", Seconds, nullable=False),
    sa.Column("timeout", Seconds, nullable=False),
    sa.Column("retention", Seconds),
    sa.Column("idempotency_key", sa.Text),
    sa.Column("unique_key", sa.Text),
    sa.Column("unique_scope", sa.Text),
    sa.Column("unique_on_conflict", sa.Text),
    sa.Column("concurrency_key", sa.Text),
    sa.Column("concurrency_max", sa.Integer),
    # Of the call that submitted it, for a worker's span to link to.
    sa.Column("trace_id", sa.Text, nullable=False),
    sa.Column("span_id", sa.Text, nullable=False),
    sa.Column("create_time", UtcTime, nullable=False),
    sa.Column("schedule_time", UtcTime, nullable=False),
    sa.Column("start_time", UtcTime),
    sa.Column("finish_time", UtcTime),
    sa.Column("next_attempt_time", UtcTime),
    sa.Column("expire_time", UtcTime),
    sa.Column("purge_time", UtcTime),
    sa.Column("progress", Json),
    sa.Column("error", Json),
    sa.Column("error_type", sa.Text),  # of `error`, to find jobs by
    sa.Column("error_time", UtcTime),  # when it happened
    sa.Column("result", sa.LargeBinary),
    sa.Column("result_content_type", sa.Text),
    sa.Column("worker_id", sa.Text),
    # The fence: a new random token at each claim; no write of an attempt without it. Not `attempt`:
    # after a failover that lost commits the same number can be handed out twice.
    sa.Column("lease_token", JobId),
    sa.Column("lease_expire_time", UtcTime),
    # Not NULL once the cancel of a running job was requested; it stays, however the job ends.
    sa.Column("cancel_reason", sa.Text),
    # QUEUED, and waits for room with no message owed; redispatch leaves it alone.
    sa.Column("held", sa.Boolean, nullable=False, server_default=sa.false()),
    # What it is held for: TYPE (no worker has its type), QUEUE (its queue is paused or at a limit)
    # or KEY (as many of its concurrency key run as may). OFFERED: held no more, since there was
    # room again; its message is on the way.
    sa.Column("held_for", sa.Text),
    sa.Column("last_sequence", sa.BigInteger, nullable=False),
    # The place of its last event in the order of all events (job_events.x).
    sa.Column("last_x", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("log_bytes", sa.Integer, nullable=False, server_default="0"),
    sa.Column("output_bytes", sa.Integer, nullable=False, server_default="0"),
    # Since when it is, or was, QUEUED.
    sa.Column("queued_time", UtcTime),
    # When the latest message was owed to the broker, and how often since the job became QUEUED.
    sa.Column("dispatch_time", UtcTime),
    sa.Column("dispatch_count", sa.Integer, nullable=False, server_default="0"),
    sa.CheckConstraint(_any_of("state", tuple(JobState)), name="state"),
    sa.CheckConstraint(f"(finish_time IS NOT NULL) = ({_ended})", name="finish_time"),
    sa.CheckConstraint("(lease_token IS NOT NULL) = (state = 'RUNNING')", name="lease"),
    sa.CheckConstraint("(next_attempt_time IS NOT NULL) = (state = 'RETRYING')", name="retry"),
    # Promoter: what is due. By queue, to count them.
    sa.Index(
        "ix_jobs_scheduled",
        "schedule_time",
        "queue",
        **_where("state = 'SCHEDULED'"),
    ),
    sa.Index(
        "ix_jobs_retrying",
        "next_attempt_time",
        "queue",
        **_where("state = 'RETRYING'"),
    ),
    # Redispatch: what was owed to the broker long ago and has not started.
    sa.Index(
        "ix_jobs_queued",
        "queue",
        "dispatch_time",
        **_where("state = 'QUEUED'"),
    ),
    # Release: the best of those that wait for room in a queue, or for a key; what waits for a type;
    # what was offered room not long ago.
    sa.Index(
        "ix_jobs_held",
        "queue",
        sa.text("priority DESC"),
        "id",
        **_where("held AND held_for = 'QUEUE'"),
    ),
    sa.Index(
        "ix_jobs_held_key",
        "concurrency_key",
        sa.text("concurrency_max DESC"),
        sa.text("priority DESC"),
        "id",
        **_where("held AND held_for = 'KEY'"),
    ),
    sa.Index(
        "ix_jobs_held_type",
        "queue",
        "job_type",
        "id",
        **_where("held AND (held_for IS NULL OR held_for = 'TYPE')"),
    ),
    sa.Index(
        "ix_jobs_offered",
        "queue",
        "dispatch_time",
        **_where("state = 'QUEUED' AND held_for = 'OFFERED'"),
    ),
    sa.Index(
        "ix_jobs_offered_key",
        "concurrency_key",
        "dispatch_time",
        **_where("state = 'QUEUED' AND held_for = 'OFFERED'"),
    ),
    # How many jobs of a concurrency key run.
    sa.Index(
        "ix_jobs_running_key",
        "concurrency_key",
        **_where("concurrency_key IS NOT NULL AND state = 'RUNNING'"),
    ),
    # Who holds a unique key.
    sa.Index(
        "ix_jobs_unique",
        "job_type",
        "unique_key",
        **_where(f"unique_key IS NOT NULL AND {_active}"),
    ),
    # Reaper: whose lease ran out. By queue, to count what runs.
    sa.Index(
        "ix_jobs_leased",
        "lease_expire_time",
        "queue",
        **_where("state = 'RUNNING'"),
    ),
    # Expiration of what still waits.
    sa.Index(
        "ix_jobs_expiring",
        "expire_time",
        **_where(f"expire_time IS NOT NULL AND {_waiting}"),
    ),
    # Purge.
    sa.Index(
        "ix_jobs_purge",
        "purge_time",
        **_where("purge_time IS NOT NULL"),
    ),
    # Lists, newest first: ids are in the order of their making.
    sa.Index("ix_jobs_list_state", "state", "id"),
    sa.Index("ix_jobs_list_job_type", "job_type", "id"),
    sa.Index("ix_jobs_list_queue", "queue", "id"),
    sa.Index("ix_jobs_list_error_type", "error_type", "id", **_where("error_type IS NOT NULL")),
    # All that have an error. Its first column is always true: an order that no other index has.
    sa.Index(
        "ix_jobs_list_error",
        sa.text("(error_time IS NOT NULL)"),
        "id",
        **_where("error_time IS NOT NULL"),
    ),
    sa.Index("ix_jobs_finish_time", "finish_time", **_where("finish_time IS NOT NULL")),
    # Room on each page for the updates of a job's life, so that most of them stay on it.
    postgresql_with={"fillfactor": "80"},
)

# The labels of jobs once more, to find jobs by.
job_labels = sa.Table(
    "job_labels",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, primary_key=True),
    sa.Column("job_id", JobId, primary_key=True),
    sa.Index("ix_job_labels_job_id", "job_id"),
)

# No foreign key to jobs: an event is only ever written under its job's row lock, and the purge
# deletes both in one transaction; a key would cost a lookup for each event.
job_events = sa.Table(
    "job_events",
    metadata,
    sa.Column("job_id", JobId, primary_key=True),
    sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("type", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("event_time", UtcTime, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("worker_id", sa.Text),
    # With job_id and sequence the place in one order of all events: Transaction.x says which.
    sa.Column("x", sa.BigInteger, nullable=False, server_default="0"),
    # What only some types carry: error, progress, log, output, next_attempt_time, actor.
    sa.Column("detail", sa.JSON(none_as_null=True)),
    sa.CheckConstraint(_any_of("state", tuple(JobState)), name="state"),
    # WatchJobs. Of one transaction there are few, so that x alone is narrow enough.
    sa.Index("ix_job_events_x", "x"),
)

# Messages owed to the broker. A row is written with the change that owes it and deleted once the
# broker has confirmed; `not_before` keeps the relay off a row that its writer is publishing.
outbox = sa.Table(
    "outbox",
    metadata,
    sa.Column("id", BigId, sa.Identity(), primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("job_id", JobId, nullable=False),
    sa.Column("job_type", sa.Text, nullable=False),
    sa.Column("queue", sa.Text, nullable=False),
    sa.Column("priority", sa.SmallInteger, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("error_type", sa.Text, nullable=False),
    sa.Column("create_time", UtcTime, nullable=False),
    sa.Column("not_before", UtcTime, nullable=False),
    sa.CheckConstraint("kind IN ('job', 'dead')", name="kind"),
    sa.Index("ix_outbox_not_before", "not_before"),
    sa.Index("ix_outbox_job_id", "job_id"),
)

# They outlive their jobs.
idempotency_keys = sa.Table(
    "idempotency_keys",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("request_hash", sa.LargeBinary, nullable=False),
    sa.Column("job_id", JobId, nullable=False),
    # Not before this, and not before its job is gone.
    sa.Column("expire_time", UtcTime, nullable=False),
    sa.Index("ix_idempotency_keys_expire_time", "expire_time"),
)

job_types = sa.Table(
    "job_types",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("payload_schema", sa.Text),
    sa.Column("queue", sa.Text),
    sa.Column("max_attempts", sa.Integer),
    sa.Column("timeout", Seconds),
)

workers = sa.Table(
    "workers",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("version", sa.Text, nullable=False),
    sa.Column("queues", Json, nullable=False),
    sa.Column("job_types", Json, nullable=False),
    sa.Column("concurrency", sa.Integer, nullable=False),
    sa.Column("prefetch", sa.Integer, nullable=False),
    sa.Column("start_time", UtcTime, nullable=False),
    sa.Column("heartbeat_time", UtcTime, nullable=False),
    # As of its last heartbeat: when it last claimed a job, and by queue how many messages it holds.
    sa.Column("claim_time", UtcTime),
    sa.Column("unacknowledged", Json, nullable=False, server_default="{}"),
)

queues = sa.Table(
    "queues",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    # Which queue of the broker carries it: jobs.q.NAME, from 2 on jobs.q.NAME@GENERATION.
    sa.Column("generation", sa.Integer, nullable=False, server_default="1"),
    sa.Column("paused", sa.Boolean, nullable=False, server_default=sa.false()),
    # NULL = no limit.
    sa.Column("max_running", sa.Integer),
    sa.Column("rate_max_starts", sa.Integer),
    sa.Column("rate_period", Seconds),
    sa.CheckConstraint("(rate_max_starts IS NULL) = (rate_period IS NULL)", name="rate"),
)

# Starts in queues with a rate limit, gathered by the moment at which they count no more.
queue_starts = sa.Table(
    "queue_starts",
    metadata,
    sa.Column("queue", sa.Text, primary_key=True),
    sa.Column("until", UtcTime, primary_key=True),
    sa.Column("starts", sa.Integer, nullable=False),
)

schedules = sa.Table(
    "schedules",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("cron", sa.Text, nullable=False),
    sa.Column("time_zone", sa.Text, nullable=False),
    sa.Column("request", sa.LargeBinary, nullable=False),  # a SubmitJobRequest in wire form
    sa.Column("paused", sa.Boolean, nullable=False),
    sa.Column("missed_ticks", sa.Text, nullable=False),
    sa.Column("overlap", sa.Text, nullable=False),
    sa.Column("next_time", UtcTime, nullable=False),
    sa.Column("last_time", UtcTime),
    sa.Column("last_job_id", JobId),
    sa.Column("revision", sa.BigInteger, nullable=False),  # the etag
    sa.CheckConstraint(_any_of("missed_ticks", ("SKIP", "RUN_ONCE")), name="missed_ticks"),
    sa.CheckConstraint(_any_of("overlap", ("ALLOW", "SKIP")), name="overlap"),
    # The tick: what is due.
    sa.Index("ix_schedules_next_time", "next_time", **_where("NOT paused")),
)

# One row: facts about this database as a whole.
service = sa.Table(
    "service",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("incarnation", JobId, nullable=False),
    # The oldest release that the schema still serves; each migration says.
    sa.Column("oldest_release", sa.Text, nullable=False),
    # Grows with every change of what workers announce; servers compare it on each submit.
    sa.Column("registry_revision", sa.BigInteger, nullable=False),
    # Whether some queue is paused or has a limit; while none has, nobody looks.
    sa.Column("limited", sa.Boolean, nullable=False, server_default=sa.false()),
    # Signs page and resume tokens.
    sa.Column("secret", sa.LargeBinary, nullable=False, server_default=sa.text("''")),
    # What is added to a transaction's number to make an x (Transaction.x).
    sa.Column("x_base", sa.BigInteger, nullable=False, server_default="0"),
    # Which cluster and database this was when the incarnation began; '' on SQLite.
    sa.Column("home", sa.Text, nullable=False, server_default=sa.text("''")),
    sa.CheckConstraint("id = 1", name="one_row"),
)
