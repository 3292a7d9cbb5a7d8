"""Ticks of servers side by side, on PostgreSQL and RabbitMQ."""

from __future__ import annotations

import sqlalchemy as sa

from generated.jobsvc.v1.job_service_pb2 import SubmitJobRequest
from generated.jobsvc.v1.schedule_service_pb2 import Schedule
from jobsvc.store.database import Transaction
from jobsvc.store.tables import job_events, jobs, schedules
from tests.harness import Service, until

SCHEDULES = 20
ROUNDS = 3
NEVER = "0 0 1 1 *"


def test_each_tick_submits_once_whichever_server_dies(service: Service) -> None:
    service.start(servers=3)
    client = service.client()
    for number in range(SCHEDULES):
        request = SubmitJobRequest(job_type="demo.echo")
        client.schedules.create(Schedule(schedule_id=f"s{number}", cron=NEVER, request=request))
    for _ in range(ROUNDS):
        service.database.write(make_due)
        if len(service.servers) > 1:
            service.servers.pop().kill()
        until(lambda: due(service) == 0, 20, "no schedule is due")
    by_schedule = sa.select(job_events.c.detail["actor"].as_string(), sa.func.count()).where(
        job_events.c.type == "SUBMITTED"
    )
    counted = service.database.read(lambda c: c.execute(by_schedule.group_by(sa.text("1"))).all())
    assert dict(map(tuple, counted)) == {
        f"schedule:s{number}": ROUNDS for number in range(SCHEDULES)
    }
    service.wait_ended(SCHEDULES * ROUNDS, 30)
    listed = {s.schedule_id: s.last_job_id for s in client.schedules.list()}
    assert len(listed) == SCHEDULES
    assert service.count(jobs.c.id.in_(listed.values())) == SCHEDULES


def make_due(tx: Transaction) -> None:
    tx.execute(sa.update(schedules).values(next_time=tx.now))


def due(service: Service) -> int:
    statement = sa.select(sa.func.count()).where(schedules.c.next_time <= sa.func.now())
    return int(service.database.read(lambda c: c.execute(statement).scalar_one()))
