"""This service measured beside Celery with database results and a bare gRPC echo.

`sides` starts each of them on private nodes, `load` makes the calls from processes of its own,
`sections` says what is measured, `report` what is printed. Everything runs on one machine and
shares its cores, so what matters is how the sides compare within one run; rounds are repeated so
that noise shows.

What makes it a fair race: the same job (it answers with its payload), the same broker, database
and versions of Kombu, SQLAlchemy and psycopg2, two worker processes each, late acknowledgement,
durable queues and persistent messages, PostgreSQL with fsync. A submit counts once it is answered:
here that means committed to the database. Celery by default does not wait for its broker at all,
so it is measured both with publisher confirms (the nearest that it has) and without.
"""
