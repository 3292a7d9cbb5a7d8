-- $1 bigint[]: outbox rows whose messages the broker has confirmed
DELETE FROM outbox WHERE id = ANY ($1)
