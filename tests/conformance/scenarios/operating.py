"""ListQueues, ListWorkers, ListJobTypes, ListFailureGroups."""

from __future__ import annotations

from datetime import timedelta

from tests.conformance.callers import Json
from tests.conformance.scenarios import scenario
from tests.conformance.scene import Scene, forgeries, moment, now, span

LONG = {"seconds": 600}
LISTS = {
    "ListJobTypes": "job_types",
    "ListQueues": "queues",
    "ListWorkers": "workers",
    "ListFailureGroups": "failure_groups",
}


@scenario()
def job_types_say_what_can_be_submitted(scene: Scene) -> None:
    found = {each["name"]: each for each in scene.pages("ListJobTypes", "job_types")}
    assert {"demo.echo", "demo.sleep", "demo.fail", "send_email"} <= found.keys()
    assert scene.idle not in found
    sleep = found["demo.sleep"]
    assert sleep["description"].startswith("Sleeps, telling its progress")
    assert sleep["payload_schema"]["properties"].keys() == {"seconds", "steps"}
    assert sleep["queue"] == "default"
    assert sleep["max_attempts"] == 10
    assert span(sleep["timeout"]) == timedelta(minutes=30)
    assert sleep["live_worker_count"] >= 1


@scenario()
def queues_count_their_jobs(scene: Scene) -> None:
    for request in ({}, {}, {"delay": "3600s"}):
        scene.submit("demo.echo", queue=scene.tag, **request)

    def listed() -> dict[str, Json]:
        queues = {each["name"]: each for each in scene.pages("ListQueues", "queues")}
        return queues if scene.tag in queues else {}

    queues = scene.until("the queue is listed", listed)
    own = queues[scene.tag]
    assert (own["queued_count"], own["scheduled_count"]) == (2, 1)
    assert not own.keys() & {"running_count", "retrying_count", "live_worker_count", "paused"}
    assert timedelta() <= span(own["oldest_queued_age"]) < timedelta(minutes=1)
    assert queues["default"]["live_worker_count"] >= 1


@scenario(needs="queue")
def a_served_queue_counts_what_runs(scene: Scene) -> None:
    with scene.queue() as queue:
        running = scene.submit("demo.sleep", payload=LONG, queue=queue)["job_id"]
        policy = {"initial_backoff": "3600s"}
        retrying = scene.submit("demo.fail", queue=queue, retry_policy=policy)["job_id"]
        scene.started(running)
        scene.happened(retrying, "ATTEMPT_FAILED")
        (own,) = (each for each in scene.pages("ListQueues", "queues") if each["name"] == queue)
        assert (own["running_count"], own["retrying_count"]) == (1, 1)
        assert own["live_worker_count"] >= 1
        assert not own.keys() & {"queued_count", "scheduled_count", "oldest_queued_age"}


@scenario()
def workers_say_what_they_do(scene: Scene) -> None:
    job_id = scene.submit("demo.sleep", payload=LONG)["job_id"]
    scene.started(job_id)
    mine = scene.get(job_id)["worker_id"]

    def shown() -> Json:
        for worker in scene.pages("ListWorkers", "workers"):
            if worker["worker_id"] == mine and job_id in worker.get("running_job_ids", ()):
                return worker
        return {}

    worker = scene.until("the worker is shown with its job", shown)
    assert worker["host"]
    assert worker["version"]
    assert worker["pid"] > 0
    assert worker["concurrency"] >= 1
    assert "default" in worker["queues"]
    assert {"demo.echo", "demo.sleep"} <= set(worker["job_types"])
    started, claimed, beaten = (
        moment(worker[name]) for name in ("start_time", "last_claim_time", "last_heartbeat_time")
    )
    assert started <= claimed
    assert started <= beaten
    assert now() - beaten < timedelta(minutes=2)


@scenario()
def failures_are_grouped(scene: Scene) -> None:
    labels = {"run": scene.tag}
    final = {"payload": {"retryable": False}, "labels": labels}
    aborted = {scene.run("demo.fail", **final) for _ in range(2)}
    exhausted = scene.run("demo.fail", labels=labels, max_attempts=1)
    own = {"filter": {"labels": labels}}
    most, fewer = scene.pages("ListFailureGroups", "failure_groups", **own)
    assert (most["job_type"], most["error_type"], most["job_count"]) == ("demo.fail", "Abort", 2)
    assert set(most["sample_job_ids"]) == aborted
    assert moment(most["first_time"]) <= moment(most["last_time"]) <= now() + timedelta(minutes=1)
    assert (fewer["error_type"], fewer["job_count"]) == ("DemoError", 1)
    assert fewer["sample_job_ids"] == [exhausted]
    assert scene.pages("ListFailureGroups", "failure_groups", **own, page_size=1) == [most, fewer]
    token = scene.ok("ListFailureGroups", **own, page_size=1)["next_page_token"]
    other = {"labels": labels, "job_types": ["demo.fail"]}
    scene.invalid("page_token", "ListFailureGroups", filter=other, page_token=token)
    for forged in forgeries(token):
        scene.invalid("page_token", "ListFailureGroups", **own, page_token=forged)


@scenario()
def every_list_has_pages(scene: Scene) -> None:
    scene.run("demo.fail", payload={"retryable": False})
    for rpc, member in LISTS.items():
        scene.invalid("page_size", rpc, page_size=-1)
        scene.invalid("page_token", rpc, page_token="x")
        one = scene.ok(rpc, page_size=1)
        assert len(one.get(member, ())) <= 1
        scene.ok(rpc, page_size=100_000)
    names = [each["name"] for each in scene.pages("ListJobTypes", "job_types", page_size=2)]
    assert len(set(names)) == len(names)
    assert "demo.echo" in names
