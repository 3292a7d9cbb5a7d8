-- QUEUED -> RUNNING for those of the messages' jobs that are plain.
-- $1 json: [{id, priority}] by id   $2 text[]: job types   $3 text: worker   $4 uuid: lease token
-- $5 interval: lease
-- Rows are looked up one by one. For a range in the order of the ids there is no index but the
-- key's; for an equality there are several that end in the id, and where the planner takes the
-- table for a small one it reads any of them whole. (IS TRUE hides the state from those that begin
-- with it.) What somebody else has locked is left to the verb, and
-- so is what has changed meanwhile, as it is found no more where it lay.
WITH input AS MATERIALIZED (
    SELECT $1 AS messages, $2 AS types, $3 AS worker_id, $4 AS token, $5 AS lease
), facts AS MATERIALIZED (
    SELECT clock_timestamp() AS now, x_base + pg_current_xact_id()::text::bigint AS x
    FROM service
    WHERE NOT limited
), locked AS MATERIALIZED (
    SELECT job.place
    FROM facts, input, json_to_recordset(input.messages) AS message(id uuid, priority smallint),
        LATERAL (
            SELECT jobs.ctid AS place
            FROM jobs
            WHERE jobs.id >= message.id AND jobs.id <= message.id
                AND (jobs.state = 'QUEUED') IS TRUE
                AND jobs.job_type = ANY (input.types)
                AND jobs.priority = message.priority
                AND jobs.concurrency_key IS NULL
                AND NOT jobs.held
                AND NOT jobs.apart
                AND jobs.held_for IS NULL
                AND (jobs.expire_time IS NULL OR jobs.expire_time > facts.now)
            ORDER BY jobs.id
            LIMIT 1
            FOR UPDATE SKIP LOCKED
        ) AS job
), started AS (
    UPDATE jobs
    SET state = 'RUNNING', attempt = attempt + 1, start_time = facts.now,
        worker_id = input.worker_id, lease_token = input.token,
        lease_expire_time = facts.now + input.lease, progress = NULL,
        last_sequence = last_sequence + 1, last_x = greatest(last_x, facts.x)
    FROM locked, facts, input
    WHERE jobs.ctid = locked.place
    RETURNING jobs.id, job_type, queue, attempt, payload, payload_content_type, timeout,
        trace_id, span_id, last_sequence, last_x, queued_time
), told AS (
    INSERT INTO job_events (job_id, sequence, type, state, event_time, attempt, worker_id, x)
    SELECT id, last_sequence, 'STARTED', 'RUNNING', facts.now, attempt, input.worker_id, last_x
    FROM started, facts, input
)
SELECT id::text, job_type, queue, attempt, payload, payload_content_type, timeout, trace_id,
    span_id, extract(epoch FROM facts.now - queued_time)::float8 AS waited, last_sequence
FROM started, facts
