-- RUNNING -> SUCCEEDED for those of the endings that are plain and hold their lease.
-- $1 json: [{id, token, result (base64), content_type}] by id
-- $2 float8: retention by default, seconds
-- Rows are looked up and locked as in claim.sql.
WITH facts AS MATERIALIZED (
    SELECT clock_timestamp() AS now, x_base + pg_current_xact_id()::text::bigint AS x
    FROM service
    WHERE NOT limited
), locked AS MATERIALIZED (
    SELECT job.place, ending.result, ending.content_type
    FROM facts,
        json_to_recordset($1) AS ending(id uuid, token uuid, result text, content_type text),
        LATERAL (
            SELECT jobs.ctid AS place
            FROM jobs
            WHERE jobs.id >= ending.id AND jobs.id <= ending.id
                AND (jobs.state = 'RUNNING') IS TRUE
                AND jobs.lease_token = ending.token
                AND jobs.concurrency_key IS NULL
            ORDER BY jobs.id
            LIMIT 1
            FOR UPDATE SKIP LOCKED
        ) AS job
), ended AS (
    UPDATE jobs
    SET state = 'SUCCEEDED', result = decode(locked.result, 'base64'),
        result_content_type = locked.content_type, lease_token = NULL, lease_expire_time = NULL,
        finish_time = facts.now,
        purge_time = facts.now + coalesce(retention, $2) * interval '1 second',
        last_sequence = last_sequence + 1, last_x = greatest(last_x, facts.x)
    FROM locked, facts
    WHERE jobs.ctid = locked.place
    RETURNING jobs.id, job_type, queue, attempt, worker_id, last_sequence, last_x
), told AS (
    INSERT INTO job_events (job_id, sequence, type, state, event_time, attempt, worker_id, x)
    SELECT id, last_sequence, 'SUCCEEDED', 'SUCCEEDED', facts.now, attempt, worker_id, last_x
    FROM ended, facts
)
SELECT id::text, job_type, queue, last_sequence FROM ended
