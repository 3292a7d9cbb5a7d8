"""awa's application: `python -m scripts.benchmarks.peers.awa_app` makes its schema, or with
`worker` runs a worker. Its address comes in the environment."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass
from typing import Any

from awa import AsyncClient

QUEUE = "bench"
SCHEMA = "awa"
# Jobs at once in a worker, and connections of a process.
CONCURRENCY = 64
CONNECTIONS_MAX = 32
# By default ended jobs are gone after seconds, as soon as their slot in a ring is wanted.
KEPT_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class Echo:
    payload: dict[str, Any]


def new_client() -> Any:
    return AsyncClient(os.environ["BENCH_DATABASE_URL"], max_connections=CONNECTIONS_MAX)


async def _run_worker() -> None:
    """Until it is killed."""
    async with new_client() as client:

        @client.task(Echo, queue=QUEUE)  # type: ignore[untyped-decorator]
        async def echo(job: Any) -> dict[str, Any]:
            return {"payload": job.args.payload}

        await client.start(
            [(QUEUE, CONCURRENCY)],
            queue_storage_schema=SCHEMA,
            queue_storage_queue_rotate_interval_ms=KEPT_MS,
        )
        print("bench worker ready", flush=True)
        await asyncio.Event().wait()


async def _make_schema() -> None:
    async with new_client() as client:
        await client.migrate()
        # What a new installation is to use, by its documentation.
        await client.install_queue_storage(schema=SCHEMA)


if __name__ == "__main__":
    asyncio.run(_run_worker() if "worker" in sys.argv else _make_schema())
