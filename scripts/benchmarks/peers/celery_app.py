"""Celery's application; its addresses come in the environment."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery
from celery.signals import worker_ready

CONNECTIONS_MAX = 64

app: Any = Celery("bench")
app.conf.update(
    broker_url=os.environ["BENCH_BROKER_URL"],
    result_backend="db+" + os.environ["BENCH_DATABASE_URL"],
    broker_transport_options={"confirm_publish": os.environ["BENCH_CONFIRM"] == "1"},
    # Each of a client's threads can have a connection; the default is 10.
    broker_pool_limit=CONNECTIONS_MAX,
    broker_connection_retry_on_startup=True,
    task_acks_late=True,
    task_track_started=os.environ["BENCH_TRACK_STARTED"] == "1",
    # No-ops gain from it; above this Celery gets no faster.
    worker_prefetch_multiplier=int(os.environ["BENCH_PREFETCH"]),
)


def _echo(payload: dict[str, Any]) -> dict[str, Any]:
    return payload


echo: Any = app.task(name="bench.echo")(_echo)


def _tell_ready(**_: Any) -> None:
    print("bench worker ready", flush=True)


worker_ready.connect(_tell_ready)
