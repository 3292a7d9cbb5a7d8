"""Procrastinate's application: `python -m scripts.benchmarks.peers.procrastinate_app` makes its
schema, or with `worker` runs a worker. Its address comes in the environment."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import procrastinate

# Handlers that wait for nothing gain nothing from more.
CONCURRENCY = 10
CONNECTIONS_MAX = 32

app: Any = procrastinate.App(
    connector=procrastinate.PsycopgConnector(
        conninfo=os.environ["BENCH_DATABASE_URL"], min_size=1, max_size=CONNECTIONS_MAX
    )
)


async def _echo(payload: dict[str, Any]) -> dict[str, Any]:
    return payload


echo: Any = app.task(name="bench.echo", queue="bench")(_echo)


async def _run_worker() -> None:
    """Until it is killed."""
    async with app.open_async():
        print("bench worker ready", flush=True)
        await app.run_worker_async(concurrency=CONCURRENCY)


async def _make_schema() -> None:
    async with app.open_async():
        await app.schema_manager.apply_schema_async()


if __name__ == "__main__":
    asyncio.run(_run_worker() if "worker" in sys.argv else _make_schema())
