-- What follows the cursors of watchers, each up to so many events, in order.
-- $1 uuid[]: jobs   $2 bigint[]: the sequence of each after which to begin   $3 int: how many
SELECT given.number, event.job_id::text, event.sequence, event.type, event.state,
    (extract(epoch FROM event.event_time) * 1000000)::bigint, event.attempt, event.worker_id,
    event.detail::text
FROM unnest($1, $2) AS given(id, number) JOIN job_events AS event ON event.job_id = given.id
WHERE event.sequence > given.number AND event.sequence <= given.number + $3
ORDER BY event.job_id, given.number, event.sequence
