"""What a job goes through, on PostgreSQL and RabbitMQ."""

from __future__ import annotations

import email.message
import itertools
import json
import pickle
import random
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import psutil
import pytest
import sqlalchemy as sa

from jobsvc.client import (
    CallFailed,
    GetResultResponse,
    JobEvent,
    event_name,
    from_value,
    is_terminal,
    state_name,
)
from jobsvc.core.states import EventType, JobState
from jobsvc.store.tables import job_events, jobs
from tests.e2e.conftest import Mailbox
from tests.harness import Service, until
from tests.harness.load import QUICK_RETRY
from tests.harness.service import PATIENCE

START_LATE_SECONDS_MAX = 2.0 * PATIENCE
STARTED = job_events.c.type == EventType.STARTED
SEED = {"recipient_email": "test@example.com", "subject": "Hello", "body": "A line.\nAnother."}


def names(events: Sequence[JobEvent]) -> list[str]:
    return [event_name(event.type) for event in events]


def dead_messages(service: Service, job_id: str) -> list[object]:
    """Once there are any; takes those of other jobs off the queue too."""

    def look() -> list[object]:
        return [m for m in service.broker.take_json("jobs.dead") if m["job_id"] == job_id]

    return until(look, 10, f"a message on jobs.dead for {job_id}")


def test_seed_payload_is_mailed(shared: Service, mailbox: Mailbox) -> None:
    client = shared.client()
    answer = client.wait(client.submit("send_email", SEED).job.job_id, timeout=20)
    assert state_name(answer.state) == "SUCCEEDED"
    (message,) = cast(list[email.message.Message], mailbox.messages)
    assert message["To"] == "test@example.com"
    assert message["Subject"] == "Hello"
    assert str(message.get_payload()).splitlines() == ["A line.", "Another."]
    assert from_value(answer.result) == {"message_id": message["Message-ID"]}


def test_bad_payload_is_refused_and_not_stored(shared: Service) -> None:
    client = shared.client()
    client.wait(client.submit("demo.echo").job.job_id, timeout=20)
    before = shared.count()
    with pytest.raises(CallFailed) as caught:
        client.submit("send_email", {"recipient_email": "nobody", "subject": "s"})
    assert (caught.value.code, caught.value.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert {v.field for v in caught.value.violations} == {"payload.recipient_email", "payload.body"}
    assert shared.count() == before


def test_run_watch_events_and_result_tell_the_same(shared: Service) -> None:
    client = shared.client()
    messages = list(client.run("demo.sleep", {"seconds": 0.9, "steps": 3}))
    result = messages.pop()
    ran = cast(list[JobEvent], messages)
    job_id = ran[0].job_id
    assert names(ran) == ["SUBMITTED", "STARTED", *["PROGRESS"] * 3, "SUCCEEDED"]
    assert [event.sequence for event in ran] == [1, 2, 3, 4, 5, 6]
    assert [event.progress.current for event in ran[2:5]] == [1, 2, 3]
    assert isinstance(result, GetResultResponse)
    assert from_value(result.result) == {"seconds": 0.9, "steps": 3}
    assert client.result(job_id) == result
    assert list(client.watch(job_id)) == ran
    assert list(client.watch(job_id, after_sequence=4)) == ran[4:]
    assert list(client.watch(job_id, after_sequence=6)) == []
    assert list(client.events(job_id, page_size=2)) == ran
    job = client.get(job_id)
    assert (job.attempt, job.last_sequence, job.progress.current) == (1, 6, 3)
    with pytest.raises(CallFailed) as caught:
        list(client.watch(job_id, after_sequence=7))
    assert caught.value.reason == "SEQUENCE_OUT_OF_RANGE"


def test_cancel_kills_what_runs(shared: Service, tmp_path: Path) -> None:
    client = shared.client()
    path = tmp_path / "pid"
    job_id = client.submit("test.spin", {"path": str(path)}).job.job_id
    pid = int(until(lambda: path.exists() and path.read_text(), 20, "the handler runs"))
    assert psutil.pid_exists(pid)
    assert client.cancel(job_id, "enough of it").cancel_requested
    answer = client.wait(job_id, timeout=20)
    assert state_name(answer.state) == "CANCELLED"
    assert (answer.error.type, answer.error.message) == ("CANCELLED", "enough of it")
    assert not psutil.pid_exists(pid)
    assert shared.history(job_id) == ["SUBMITTED", "STARTED", "CANCEL_REQUESTED", "CANCELLED"]
    assert state_name(client.cancel(job_id).state) == "CANCELLED"


def test_a_cancel_does_not_wait_for_a_heartbeat(service: Service) -> None:
    service.start(lease="1h", heartbeat="25m")
    client = service.client()
    job_id = client.submit("demo.sleep", {"seconds": 600}).job.job_id
    until(lambda: client.get(job_id).attempt, 20, "it runs")
    client.cancel(job_id)
    assert state_name(client.wait(job_id, timeout=20).state) == "CANCELLED"


def test_waiting_job_is_cancelled_at_once(shared: Service) -> None:
    client = shared.client()
    job_id = client.submit("demo.echo", delay=3600).job.job_id
    assert state_name(client.cancel(job_id).state) == "CANCELLED"
    assert shared.history(job_id) == ["SUBMITTED", "CANCELLED"]


def test_timeout_kills_what_runs(shared: Service, tmp_path: Path) -> None:
    client = shared.client()
    path = tmp_path / "pid"
    options = {"timeout": 1, "max_attempts": 2, "retry_policy": QUICK_RETRY}
    job_id = client.submit("test.spin", {"path": str(path)}, **options).job.job_id  # type: ignore[arg-type]
    answer = client.wait(job_id, timeout=30)
    assert (state_name(answer.state), answer.error.type) == ("FAILED", "TIMEOUT")
    assert not psutil.pid_exists(int(path.read_text()))
    assert shared.history(job_id).count("ATTEMPT_FAILED") == 2


def test_retries_wait_and_then_succeed(shared: Service) -> None:
    client = shared.client()
    submitted = client.submit("demo.fail", {"times": 2}, retry_policy=QUICK_RETRY).job
    events = list(client.watch(submitted.job_id))
    again = ["STARTED", "ATTEMPT_FAILED", "QUEUED"]
    assert names(events) == ["SUBMITTED", *again, *again, "STARTED", "SUCCEEDED"]
    assert from_value(client.result(submitted.job_id).result) == {"attempt": 3}
    for failed, queued in itertools.pairwise(events):
        if event_name(failed.type) == "ATTEMPT_FAILED":
            due, moved = failed.next_attempt_time, queued.event_time
            assert failed.event_time.ToNanoseconds() < due.ToNanoseconds()
            late = (moved.ToNanoseconds() - due.ToNanoseconds()) / 1e9
            assert 0 <= late <= START_LATE_SECONDS_MAX


def test_exhausted_job_is_failed_and_on_the_dead_letter_exchange(shared: Service) -> None:
    client = shared.client()
    options = {"max_attempts": 2, "retry_policy": QUICK_RETRY}
    job_id = client.submit("demo.fail", {"times": 9}, **options).job.job_id  # type: ignore[arg-type]
    events = list(client.watch(job_id))
    assert names(events[-2:]) == ["ATTEMPT_FAILED", "FAILED"]
    assert events[-1].error.type == "DemoError"
    assert dead_messages(shared, job_id) == [
        {
            "v": 1,
            "job_id": job_id,
            "job_type": "demo.fail",
            "queue": "default",
            "attempt": 2,
            "error_type": "DemoError",
        }
    ]


def test_job_that_kills_its_process_three_times_fails(shared: Service) -> None:
    client = shared.client()
    job_id = client.submit("demo.crash", retry_policy=QUICK_RETRY, max_attempts=50).job.job_id
    answer = client.wait(job_id, timeout=40)
    assert (state_name(answer.state), answer.error.type) == ("FAILED", "WORKER_LOST")
    assert shared.history(job_id).count("ATTEMPT_FAILED") == 3
    assert shared.workers[0].running
    (message,) = dead_messages(shared, job_id)
    assert isinstance(message, dict)
    assert message["error_type"] == "WORKER_LOST"


@pytest.mark.parametrize("when", ["delay", "schedule_time"])
def test_scheduled_job_starts_when_due(shared: Service, when: str) -> None:
    client = shared.client()
    if when == "delay":
        job = client.submit("demo.echo", delay=1.5).job
    else:
        due = datetime.now(UTC) + timedelta(seconds=1.5)
        job = client.submit("demo.echo", schedule_time=due).job
    assert state_name(job.state) == "SCHEDULED"
    events = list(client.watch(job.job_id))
    assert names(events) == ["SUBMITTED", "QUEUED", "STARTED", "SUCCEEDED"]
    due_seconds = job.schedule_time.ToNanoseconds() / 1e9
    started_seconds = events[2].event_time.ToNanoseconds() / 1e9
    assert 0 <= started_seconds - due_seconds <= START_LATE_SECONDS_MAX


def test_job_that_expires_never_starts(shared: Service) -> None:
    client = shared.client()
    job_id = client.submit("demo.echo", delay=3600, ttl=0.5).job.job_id
    answer = client.wait(job_id, timeout=20)
    assert (state_name(answer.state), answer.error.type) == ("FAILED", "EXPIRED")
    assert shared.history(job_id) == ["SUBMITTED", "FAILED"]
    (message,) = dead_messages(shared, job_id)
    assert isinstance(message, dict)
    assert (message["attempt"], message["error_type"]) == (0, "EXPIRED")


def test_one_key_is_one_job(shared: Service) -> None:
    clients = [shared.client() for _ in range(4)]
    key = str(uuid.uuid4())

    def submit(number: int) -> tuple[str, bool]:
        client = clients[number % len(clients)]
        answer = client.submit("demo.echo", {"n": 1}, idempotency_key=key)
        return answer.job.job_id, answer.already_existed

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(submit, range(100)))
    assert len({job_id for job_id, _ in answers}) == 1
    assert [existed for _, existed in answers].count(False) == 1
    with pytest.raises(CallFailed) as caught:
        clients[0].submit("demo.echo", {"n": 2}, idempotency_key=key)
    assert (caught.value.code, caught.value.reason) == ("ALREADY_EXISTS", "IDEMPOTENCY_KEY_REUSED")
    assert caught.value.metadata == {"job_id": answers[0][0]}


def test_poison_is_put_away_and_others_go_on(shared: Service) -> None:
    client = shared.client()
    unreadable = [
        b"",
        b"x" * 1_000_000,
        pickle.dumps({"v": 1}),
        b"[" * 100_000,
        b"[1]",
        b'{"v": 1, "job_id": "me"}',
        json.dumps({"v": 2, "job_id": str(uuid.uuid4())}).encode(),
        json.dumps({"v": 1, "job_id": str(uuid.uuid4()).upper()}).encode(),
    ]
    unknown = json.dumps({"v": 1, "job_id": str(uuid.uuid4())}).encode()
    between = []
    for body in (*unreadable, unknown):
        shared.broker.put(body)
        between.append(client.submit("demo.echo").job.job_id)
    for job_id in between:
        assert state_name(client.wait(job_id, timeout=20).state) == "SUCCEEDED"
    assert sorted(shared.broker.take("jobs.poison")) == sorted(unreadable)


def test_duplicate_messages_change_nothing(shared: Service, tmp_path: Path) -> None:
    client = shared.client()
    gate = tmp_path / "gate"
    running = client.submit("test.gate", {"path": str(gate)}).job.job_id
    scheduled = client.submit("demo.echo", delay=3600).job.job_id
    ended = [client.submit("demo.echo").job.job_id for _ in range(10)]
    for job_id in ended:
        client.wait(job_id, timeout=20)
    until(lambda: "STARTED" in shared.history(running), 20, "the gated job runs")
    everyone = [running, scheduled, *ended]
    before = {job_id: shared.history(job_id) for job_id in everyone}
    messages = everyone * 10
    random.shuffle(messages)
    for job_id in messages:
        shared.broker.put(json.dumps({"v": 1, "job_id": job_id}).encode())
    # Of the same priority, so behind all of them.
    client.wait(client.submit("demo.echo").job.job_id, timeout=20)
    assert {job_id: shared.history(job_id) for job_id in everyone} == before
    gate.with_suffix(".1").touch()
    assert state_name(client.wait(running, timeout=20).state) == "SUCCEEDED"
    assert shared.history(running).count("STARTED") == 1
    client.cancel(scheduled)


def test_messages_lost_without_trace_are_sent_again(service: Service) -> None:
    service.server()
    client = service.client()
    ids = [client.submit("demo.echo").job.job_id for _ in range(10)]
    until(lambda: service.owed() == 0, 20, "all are published")
    assert service.broker.purge() == len(ids)
    # As if a minute had passed.
    aged = sa.update(jobs).values(dispatch_time=jobs.c.dispatch_time - timedelta(seconds=61))
    service.database.write(lambda tx: tx.execute(aged))
    service.worker()
    service.wait_ended(len(ids), 20)
    service.wait_idle()
    service.check(ids, jobs_min=len(ids))


def test_priority_orders_a_standing_backlog(service: Service) -> None:
    service.server()
    client = service.client()
    priorities = [number % 10 for number in range(40)]
    random.shuffle(priorities)
    by_id = {client.submit("demo.echo", priority=p).job.job_id: p for p in priorities}
    until(lambda: service.broker.depth() == len(by_id), 20, "all are published")
    service.worker(concurrency="1")
    service.wait_ended(len(by_id), 30)
    # Those of one claim start at once, by whatever order.
    started = [(e.event_time, -by_id[e.job_id]) for e in service.events(STARTED)]
    assert [-priority for _, priority in sorted(started)] == sorted(priorities, reverse=True)
    service.wait_idle()
    service.check(by_id, jobs_min=len(by_id))


def test_unknown_type_waits_for_a_worker_that_has_it(service: Service) -> None:
    service.start()
    client = service.client()
    ids = [client.submit("test.tell", {"text": "hello"}).job.job_id for _ in range(5)]
    known = client.submit("demo.echo").job.job_id
    assert state_name(client.wait(known, timeout=20).state) == "SUCCEEDED"
    until(lambda: service.count(jobs.c.held) == len(ids), 20, "the unknown ones are held")
    assert service.count(jobs.c.state == JobState.QUEUED) == len(ids)
    service.worker(handlers="worker.handlers,tests.harness.handlers")
    for job_id in ids:
        assert state_name(client.wait(job_id, timeout=20).state) == "SUCCEEDED"
        assert service.history(job_id).count("STARTED") == 1
    service.wait_idle()
    service.check([*ids, known], jobs_min=len(ids) + 1)


def test_nothing_secret_is_logged(shared: Service, mailbox: Mailbox) -> None:
    client = shared.client()
    canary = f"canary{uuid.uuid4().hex}"
    mail = {"recipient_email": f"{canary}@example.com", "subject": canary, "body": canary}
    ids = [
        client.submit("demo.echo", {canary: canary}, labels={"a": canary}).job.job_id,
        client.submit("demo.echo", canary.encode(), content_type="text/plain").job.job_id,
        client.submit("test.tell", {"text": canary}).job.job_id,
        client.submit("test.tell", {"text": canary, "fail": True}, max_attempts=1).job.job_id,
        client.submit("send_email", mail).job.job_id,
    ]
    for refused in ({"recipient_email": canary}, {canary: canary}):
        with pytest.raises(CallFailed):
            client.submit("send_email", refused)
    ended = [client.wait(job_id, timeout=20) for job_id in ids]
    assert all(is_terminal(answer.state) for answer in ended)
    assert canary in ended[2].result.struct_value.fields["text"].string_value
    assert canary in ended[3].error.message
    assert len(mailbox.messages) == 1
    text = shared.log_text()
    assert all(job_id in text for job_id in ids)
    assert canary not in text
    for line in text.splitlines():
        json.loads(line)
