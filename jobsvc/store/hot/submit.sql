-- New jobs, each with its idempotency key, labels, first event and a message owed to the broker.
-- $1 json: the jobs; payload and request_hash are base64   $2 bigint: registry revision
-- $3 interval: how long a key lives   $4 interval: how long the relay leaves a message alone
-- A job whose key is in use is left out. Keys are taken in their order, as other servers take
-- them: in another two would deadlock.
WITH input AS MATERIALIZED (
    SELECT $1 AS jobs, $2 AS revision, $3 AS key_lifetime, $4 AS grace
), facts AS MATERIALIZED (
    SELECT clock_timestamp() AS now, x_base + pg_current_xact_id()::text::bigint AS x
    FROM service, input
    WHERE NOT limited AND registry_revision = input.revision
), given AS MATERIALIZED (
    SELECT new.*, facts.now, facts.x
    FROM facts, input, json_to_recordset(input.jobs) AS new(
        id uuid, job_type text, queue text, priority smallint, payload text,
        payload_content_type text, labels jsonb, max_attempts int, initial_backoff float8,
        backoff_multiplier float8, max_backoff float8, jitter float8, timeout float8,
        retention float8, idempotency_key text, request_hash text, concurrency_key text,
        concurrency_max int, trace_id text, span_id text, actor text
    )
), taken AS (
    INSERT INTO idempotency_keys (key, request_hash, job_id, expire_time)
    SELECT idempotency_key, decode(request_hash, 'base64'), id, now + key_lifetime
    FROM given, input
    WHERE idempotency_key IS NOT NULL
    ORDER BY idempotency_key
    ON CONFLICT (key) DO NOTHING
    RETURNING job_id
), stored AS (
    INSERT INTO jobs (
        id, job_type, queue, state, priority, payload, payload_content_type, labels,
        max_attempts, initial_backoff, backoff_multiplier, max_backoff, jitter, timeout,
        retention, idempotency_key, concurrency_key, concurrency_max, trace_id, span_id,
        create_time, schedule_time, last_sequence, last_x, queued_time, dispatch_time
    )
    SELECT id, job_type, queue, 'QUEUED', priority, decode(payload, 'base64'),
        payload_content_type, labels, max_attempts, initial_backoff, backoff_multiplier,
        max_backoff, jitter, timeout, retention, idempotency_key, concurrency_key,
        concurrency_max, trace_id, span_id, now, now, 1, x, now, now
    FROM given
    WHERE idempotency_key IS NULL OR id IN (SELECT job_id FROM taken)
    RETURNING id
), labelled AS (
    INSERT INTO job_labels (key, value, job_id)
    SELECT label.key, label.value, given.id
    FROM given, jsonb_each_text(given.labels) AS label
    WHERE given.id IN (SELECT id FROM stored)
), told AS (
    INSERT INTO job_events (job_id, sequence, type, state, event_time, attempt, x, detail)
    SELECT id, 1, 'SUBMITTED', 'QUEUED', now, 0, x, json_build_object('actor', actor)
    FROM given
    WHERE id IN (SELECT id FROM stored)
), owed AS (
    INSERT INTO outbox (
        kind, job_id, job_type, queue, priority, attempt, error_type, create_time, not_before
    )
    SELECT 'job', id, job_type, queue, priority, 0, '', now, now + grace
    FROM given, input
    WHERE id IN (SELECT id FROM stored)
    RETURNING job_id, id
)
SELECT job_id::text, id, facts.now FROM owed, facts
