"""Runs the migrations on the engine that jobsvc.store.migrating hands over."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context

from jobsvc.store.dialects.sockets import waiting_long
from jobsvc.store.tables import metadata

# Any number: it keeps two `jobsvc migrate` from running side by side on one database.
_MIGRATE_LOCK = 0x6A6F6273


def run(connection: sa.Connection) -> None:
    context.configure(connection=connection, target_metadata=metadata, compare_server_default=True)
    with context.begin_transaction():
        if connection.dialect.name == "postgresql":
            # For this transaction alone: the connection goes back to a pool that serves calls.
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
            connection.exec_driver_sql("SET LOCAL lock_timeout = 0")
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATE_LOCK)))
            # Waiting for a table's lock holds up everybody behind us, so not for long; the work
            # itself may take its time.
            connection.exec_driver_sql("SET LOCAL lock_timeout = '2s'")
        context.run_migrations()


engine: sa.Engine = context.config.attributes["engine"]
with waiting_long(), engine.connect() as connection:
    connection.execution_options(jobsvc_write=True)
    run(connection)
    connection.commit()
