-- How far jobs have come.
-- $1 uuid[]
SELECT id::text, last_sequence, state FROM jobs WHERE id = ANY ($1)
