"""ExplainJob: each reason, where it is the first that holds."""

from __future__ import annotations

from tests.conformance.callers import Json
from tests.conformance.scenarios import scenario
from tests.conformance.scene import LONG_BACKOFF, UNSERVED, Scene, state

LONG = {"seconds": 600}
SLOTS_MAX = 64


def _explained(scene: Scene, job_id: str) -> Json:
    answer = scene.ok("ExplainJob", job_id=job_id)
    assert answer["message"], answer
    assert all(isinstance(fact, str) for fact in answer.get("facts", {}).values())
    return answer


def _because(scene: Scene, job_id: str, where: str, reason: str) -> None:
    """Waits for the reason, since what holds a job is felt when a worker comes to it."""

    def holds() -> bool:
        answer = _explained(scene, job_id)
        return (state(answer), answer["reason"]) == (where, f"WAIT_REASON_{reason}")

    scene.until(f"{where} because of {reason}, and not {_explained(scene, job_id)}", holds)


@scenario()
def a_job_has_ended_or_runs(scene: Scene) -> None:
    _because(scene, scene.run(), "SUCCEEDED", "ENDED")
    cancelled = scene.submit()["job_id"]
    scene.cancel(cancelled)
    _because(scene, cancelled, "CANCELLED", "ENDED")
    running = scene.submit("demo.sleep", payload=LONG)["job_id"]
    scene.started(running)
    _because(scene, running, "RUNNING", "RUNNING")


@scenario()
def a_job_is_not_due(scene: Scene) -> None:
    """Which is told before that no worker has its type."""
    _because(scene, scene.submit(delay="3600s")["job_id"], "SCHEDULED", "NOT_DUE")
    echo = scene.submit("demo.echo", delay="3600s")["job_id"]
    _because(scene, echo, "SCHEDULED", "NOT_DUE")


@scenario()
def a_job_waits_for_its_next_attempt(scene: Scene) -> None:
    job_id = scene.submit("demo.fail", retry_policy=LONG_BACKOFF)["job_id"]
    scene.happened(job_id, "ATTEMPT_FAILED")
    _because(scene, job_id, "RETRYING", "RETRY_BACKOFF")


@scenario()
def a_job_has_no_worker(scene: Scene) -> None:
    """For its type, or for its queue."""
    _because(scene, scene.submit()["job_id"], "QUEUED", "NO_WORKER")
    elsewhere = scene.submit("demo.echo", queue=UNSERVED)["job_id"]
    _because(scene, elsewhere, "QUEUED", "NO_WORKER")


@scenario()
def a_job_is_in_a_paused_queue(scene: Scene) -> None:
    """Which is told before that no worker serves it."""
    scene.ok("PauseQueue", queue=scene.tag)
    job_id = scene.submit("demo.echo", queue=scene.tag)["job_id"]
    _because(scene, job_id, "QUEUED", "QUEUE_PAUSED")
    scene.ok("ResumeQueue", queue=scene.tag)
    _because(scene, job_id, "QUEUED", "NO_WORKER")


@scenario(needs="queue")
def a_job_is_held_by_its_queue(scene: Scene) -> None:
    """By how many run, which is told before how often they start; then by that."""
    with scene.queue() as queue:
        sleep: Json = {"payload": LONG, "queue": queue}
        scene.ok("UpdateQueue", queue=queue, max_running=1, update_mask="maxRunning")
        running = scene.submit("demo.sleep", **sleep)["job_id"]
        scene.started(running)
        held = scene.submit("demo.echo", queue=queue)["job_id"]
        _because(scene, held, "QUEUED", "QUEUE_LIMIT")
        scene.ok("PauseQueue", queue=queue)
        _because(scene, held, "QUEUED", "QUEUE_PAUSED")


@scenario(needs="queue")
def a_job_is_held_by_a_rate(scene: Scene) -> None:
    with scene.queue() as queue:
        rate = {"max_starts": 1, "period": "600s"}
        scene.ok("UpdateQueue", queue=queue, rate_limit=rate, update_mask="rateLimit")
        scene.run("demo.echo", queue=queue)
        held = scene.submit("demo.echo", queue=queue)["job_id"]
        _because(scene, held, "QUEUED", "RATE_LIMIT")


@scenario()
def a_job_is_held_by_its_key(scene: Scene) -> None:
    concurrency = {"key": scene.tag, "max_running": 1}
    running = scene.submit("demo.sleep", payload=LONG, concurrency=concurrency)["job_id"]
    scene.started(running)
    held = scene.submit("demo.echo", concurrency=concurrency)["job_id"]
    _because(scene, held, "QUEUED", "CONCURRENCY_LIMIT")


@scenario(needs="queue", alone=True)
def a_job_is_behind_others(scene: Scene) -> None:
    """Every slot of the workers that serve its queue is taken, and another one goes first."""
    with scene.queue() as queue:
        workers = scene.pages("ListWorkers", "workers", page_size=1000)
        slots = sum(worker["concurrency"] for worker in workers if queue in worker["queues"])
        assert 0 < slots <= SLOTS_MAX, f"{slots} slots cannot be filled for a moment"
        request = {"job_type": "demo.sleep", "payload": LONG, "queue": queue, "priority": 9}
        answers = scene.ok("SubmitJobs", requests=[request] * (slots + 1))["responses"]

        def running() -> bool:
            own = {"queue": queue, "states": ["JOB_STATE_RUNNING"]}
            jobs = scene.pages("ListJobs", "jobs", filter=own, page_size=1000)
            return len(jobs) >= int(slots)

        scene.until("all slots are taken", running)
        behind = scene.submit("demo.echo", queue=queue)["job_id"]
        _because(scene, behind, "QUEUED", "BEHIND_OTHERS")
        scene.cancel(behind)
        for answer in reversed(answers):
            scene.cancel(answer["job"]["job_id"])
        for answer in answers:
            scene.ended(answer["job"]["job_id"])
