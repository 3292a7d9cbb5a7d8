"""PauseQueue, ResumeQueue, UpdateQueue, and what becomes of the jobs."""

from __future__ import annotations

from itertools import pairwise

from tests.conformance.callers import Json
from tests.conformance.scenarios import scenario
from tests.conformance.scenarios.care import assert_one_at_a_time
from tests.conformance.scene import Scene, moment, span, state

BAD_NAMES = ("", "A", "a b", "a" * 51)


def _listed(scene: Scene, name: str) -> Json:
    queues = scene.pages("ListQueues", "queues", page_size=1000)
    (found,) = (queue for queue in queues if queue["name"] == name)
    return found


def _sleeps(scene: Scene, queue: str, count: int, seconds: float) -> list[str]:
    request = {"job_type": "demo.sleep", "payload": {"seconds": seconds}, "queue": queue}
    answers = scene.ok("SubmitJobs", requests=[request] * count)["responses"]
    return [answer["job"]["job_id"] for answer in answers]


@scenario()
def naming_a_queue_makes_it_known(scene: Scene) -> None:
    names = [f"{scene.tag}.{number}" for number in range(3)]
    paused = scene.ok("PauseQueue", queue=names[0])["queue"]
    resumed = scene.ok("ResumeQueue", queue=names[1])["queue"]
    limited = scene.ok("UpdateQueue", queue=names[2], max_running=5, update_mask="maxRunning")
    assert paused == {"name": names[0], "paused": True}
    assert resumed == {"name": names[1]}
    assert limited["queue"] == {"name": names[2], "max_running": 5}
    for queue in (paused, resumed, limited["queue"]):
        assert _listed(scene, queue["name"]) == queue
    assert scene.ok("PauseQueue", queue=names[0])["queue"] == paused
    assert scene.ok("ResumeQueue", queue=names[0])["queue"] == {"name": names[0]}


@scenario(needs="queue")
def a_paused_queue_accepts_and_starts_nothing(scene: Scene) -> None:
    with scene.queue() as queue:
        running = _sleeps(scene, queue, 1, 0.6)[0]
        scene.started(running)
        paused = scene.ok("PauseQueue", queue=queue)["queue"]
        assert paused["paused"] is True
        job_id = scene.submit("demo.echo", queue=queue)["job_id"]
        scene.succeeded(running)  # goes on
        answer = scene.ok("GetResult", job_id=job_id, wait="1s")
        assert state(answer) == "QUEUED"
        known = _listed(scene, queue)
        assert (known["paused"], known["queued_count"]) == (True, 1)
        resumed = scene.ok("ResumeQueue", queue=queue)["queue"]
        assert "paused" not in resumed
        scene.succeeded(job_id)


@scenario(needs="queue")
def a_queue_limits_what_runs(scene: Scene) -> None:
    with scene.queue() as queue:
        limited = scene.ok("UpdateQueue", queue=queue, max_running=1, update_mask="maxRunning")
        assert limited["queue"]["max_running"] == 1
        ids = _sleeps(scene, queue, 4, 0.2)
        for job_id in ids:
            scene.succeeded(job_id)
        assert_one_at_a_time([scene.get(job_id) for job_id in ids])


@scenario(needs="queue")
def a_limit_that_is_lifted_lets_all_go(scene: Scene) -> None:
    """Named in the mask and unset: no limit."""
    with scene.queue() as queue:
        scene.ok("UpdateQueue", queue=queue, max_running=1, update_mask="maxRunning")
        running = _sleeps(scene, queue, 1, 600)[0]
        scene.started(running)
        held = scene.submit("demo.echo", queue=queue)["job_id"]
        assert state(scene.ok("GetResult", job_id=held, wait="0.5s")) == "QUEUED"
        lifted = scene.ok("UpdateQueue", queue=queue, update_mask="maxRunning")["queue"]
        assert "max_running" not in lifted
        scene.succeeded(held)
        assert state(scene.get(running)) == "RUNNING"


@scenario(needs="queue")
def a_queue_limits_how_often_jobs_start(scene: Scene) -> None:
    with scene.queue() as queue:
        rate = {"max_starts": 2, "period": "1s"}
        limited = scene.ok("UpdateQueue", queue=queue, rate_limit=rate, update_mask="rateLimit")
        assert limited["queue"]["rate_limit"]["max_starts"] == 2
        assert span(limited["queue"]["rate_limit"]["period"]).total_seconds() == 1
        request = {"job_type": "demo.echo", "queue": queue}
        answers = scene.ok("SubmitJobs", requests=[request] * 5)["responses"]
        ids = [answer["job"]["job_id"] for answer in answers]
        for job_id in ids:
            scene.succeeded(job_id)
        starts = sorted(moment(scene.get(job_id)["start_time"]) for job_id in ids)
        for before, after in pairwise(starts[::2]):
            assert (after - before).total_seconds() >= 0.9, starts
        lifted = scene.ok("UpdateQueue", queue=queue, update_mask="rateLimit")["queue"]
        assert "rate_limit" not in lifted


@scenario()
def a_mask_changes_nothing_else(scene: Scene) -> None:
    name = scene.tag
    rate = {"max_starts": 3, "period": "60s"}
    both: Json = {"queue": name, "max_running": 4, "rate_limit": rate}
    made = scene.ok("UpdateQueue", **both, update_mask="maxRunning,rateLimit")["queue"]
    assert (made["max_running"], made["rate_limit"]["max_starts"]) == (4, 3)
    changed = scene.ok("UpdateQueue", queue=name, max_running=9, update_mask="maxRunning")["queue"]
    assert changed == {**made, "max_running": 9}
    cleared = scene.ok("UpdateQueue", queue=name, update_mask="maxRunning,rateLimit")["queue"]
    assert cleared == {"name": name}


@scenario()
def a_queue_names_its_bad_fields(scene: Scene) -> None:
    for name in BAD_NAMES:
        scene.invalid("queue", "PauseQueue", queue=name)
        scene.invalid("queue", "ResumeQueue", queue=name)
        scene.invalid("queue", "UpdateQueue", queue=name, update_mask="maxRunning")
    name = scene.tag
    scene.invalid("update_mask", "UpdateQueue", queue=name, max_running=1)
    for path in ("paused", "colour", "maxRunning,name"):
        scene.invalid("update_mask", "UpdateQueue", queue=name, update_mask=path)
    scene.invalid(
        "max_running", "UpdateQueue", queue=name, max_running=-1, update_mask="maxRunning"
    )
    bad: list[tuple[str, Json]] = [
        ("rate_limit.max_starts", {"max_starts": 0, "period": "1s"}),
        ("rate_limit.max_starts", {"max_starts": -1, "period": "1s"}),
        ("rate_limit.period", {"max_starts": 1, "period": "0s"}),
        ("rate_limit.period", {"max_starts": 1, "period": "-1s"}),
        ("rate_limit.period", {"max_starts": 1}),
    ]
    for field, rate in bad:
        scene.invalid(field, "UpdateQueue", queue=name, rate_limit=rate, update_mask="rateLimit")
