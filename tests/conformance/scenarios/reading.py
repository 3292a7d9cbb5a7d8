"""GetJob, GetResult, ListJobEvents, ListJobs."""

from __future__ import annotations

from datetime import timedelta

from tests.conformance.callers import Json
from tests.conformance.scenarios import scenario
from tests.conformance.scene import (
    LONG_BACKOFF,
    NO_BACKOFF,
    UNSERVED,
    Scene,
    forgeries,
    moment,
    nobody,
    now,
    state,
    timestamp,
    types,
)

ALMOST_MIB = 1024 * 1024 - 200


# One job.


@scenario()
def a_job_that_runs_tells_of_it(scene: Scene) -> None:
    job_id = scene.submit("demo.sleep", payload={"seconds": 60}, delay="0s")["job_id"]
    scene.started(job_id)
    job = scene.get(job_id)
    assert state(job) == "RUNNING"
    assert job["attempt"] == 1
    assert job["worker_id"]
    assert moment(job["start_time"]) >= moment(job["create_time"])
    assert not job.keys() & {"finish_time", "purge_time", "next_attempt_time", "error"}
    assert job["payload"] == {"seconds": 60}


@scenario()
def an_unknown_job_is_not_found(scene: Scene) -> None:
    """The message says so where it may have been purged."""
    recent, old = nobody(), nobody(now() - timedelta(days=400))
    reply = scene.refused("NOT_FOUND", "JOB_UNKNOWN", "GetJob", job_id=recent)
    assert reply.detail("ResourceInfo")["resource_name"] == recent
    assert "purged" not in reply.message
    reply = scene.refused("NOT_FOUND", "JOB_UNKNOWN", "GetJob", job_id=old)
    assert "purged" in reply.message
    for rpc in ("GetResult", "ListJobEvents", "WatchJob"):
        scene.refused("NOT_FOUND", "JOB_UNKNOWN", rpc, job_id=recent)


@scenario()
def a_job_id_has_one_form(scene: Scene) -> None:
    job_id = scene.submit()["job_id"]
    other = job_id.upper()
    for form in ("", "x", job_id.replace("-", ""), f"{{{job_id}}}", f" {job_id}", f"{job_id}\n"):
        scene.invalid("job_id", "GetJob", job_id=form)
    for rpc in ("GetJob", "GetResult", "ListJobEvents", "WatchJob"):
        scene.invalid("job_id", rpc, job_id=other)


# Results.


@scenario()
def a_result_that_is_not_there_is_no_error(scene: Scene) -> None:
    job_id = scene.submit()["job_id"]
    for request in ({}, {"wait": "0s"}, {"wait": "0.2s"}):
        answer = scene.ok("GetResult", job_id=job_id, **request)
        assert answer == {"job_id": job_id, "state": "JOB_STATE_QUEUED"}


@scenario()
def waiting_for_a_result_ends_with_the_job(scene: Scene) -> None:
    job_id = scene.submit("demo.sleep", payload={"seconds": 0.4, "steps": 2})["job_id"]
    answer = scene.ok("GetResult", job_id=job_id, wait="50s")
    assert answer["result"] == {"seconds": 0.4, "steps": 2}
    assert scene.ok("GetResult", job_id=job_id) == answer


@scenario()
def a_wait_has_its_bounds(scene: Scene) -> None:
    job_id = scene.submit()["job_id"]
    for text in ("-0.000000001s", "50.000000001s"):
        scene.invalid("wait", "GetResult", job_id=job_id, wait=text)


@scenario()
def the_result_of_a_job_that_failed_is_its_error(scene: Scene) -> None:
    job_id = scene.run("demo.fail", max_attempts=1)
    answer = scene.ok("GetResult", job_id=job_id)
    assert state(answer) == "FAILED"
    assert answer["error"]["type"] == "DemoError"
    assert answer["error"]["message"] == "attempt 1 of 1 that fail"
    assert not answer.keys() & {"result", "result_blob"}


# Events.


@scenario()
def the_history_is_read_page_by_page(scene: Scene) -> None:
    job_id = scene.run("demo.fail", payload={"times": 1}, retry_policy=NO_BACKOFF)
    events = scene.history(job_id)
    assert len(events) == 6
    found: list[Json] = []
    after = 0
    while True:
        page = scene.ok("ListJobEvents", job_id=job_id, after_sequence=after, page_size=4)
        assert len(page["events"]) <= 4
        found += page["events"]
        after = int(page.get("next_after_sequence", 0))
        if not after:
            break
        assert after == int(found[-1]["sequence"])
    assert found == events
    assert scene.ok("ListJobEvents", job_id=job_id, after_sequence=6) == {}
    whole = scene.ok("ListJobEvents", job_id=job_id, page_size=100_000)
    assert whole == {"events": events}


@scenario()
def an_event_tells_what_happened(scene: Scene) -> None:
    job_id = scene.run()
    job = scene.get(job_id)
    submitted, started, succeeded = scene.history(job_id)
    assert {event["job_id"] for event in (submitted, started, succeeded)} == {job_id}
    assert moment(submitted["event_time"]) == moment(job["create_time"])
    assert moment(started["event_time"]) == moment(job["start_time"])
    assert moment(succeeded["event_time"]) == moment(job["finish_time"])
    assert submitted["actor"]
    assert "actor" not in started
    assert not submitted.keys() & {"worker_id", "attempt"}
    assert started["worker_id"] == succeeded["worker_id"] == job["worker_id"]
    assert job["last_sequence"] == "3"


@scenario()
def a_place_in_the_history_must_be_in_it(scene: Scene) -> None:
    job_id = scene.submit()["job_id"]
    scene.invalid("after_sequence", "ListJobEvents", job_id=job_id, after_sequence=-1)
    scene.invalid("page_size", "ListJobEvents", job_id=job_id, page_size=-1)
    reply = scene.refused(
        "OUT_OF_RANGE", "SEQUENCE_OUT_OF_RANGE", "ListJobEvents", job_id=job_id, after_sequence=2
    )
    assert reply.metadata == {"oldest_sequence": "1", "last_sequence": "1"}


# Lists.


def _listed(scene: Scene, **filters: object) -> list[str]:
    """The ids of the scene's own jobs that the filter matches."""
    own = {"labels": {"run": scene.tag}, **filters}
    return [job["job_id"] for job in scene.pages("ListJobs", "jobs", filter=own)]


@scenario()
def the_newest_come_first(scene: Scene) -> None:
    labels = {"run": scene.tag}
    ids = [scene.submit(labels=labels)["job_id"] for _ in range(4)]
    assert _listed(scene) == ids[::-1]


@scenario()
def a_list_is_read_page_by_page(scene: Scene) -> None:
    """A page may be short, even empty; only an empty token ends the list."""
    requests = [{"job_type": scene.idle, "labels": {"run": scene.tag}} for _ in range(5)]
    answers = scene.ok("SubmitJobs", requests=requests)["responses"]
    ids = [answer["job"]["job_id"] for answer in answers]
    own = {"labels": {"run": scene.tag}}
    paged = scene.pages("ListJobs", "jobs", filter=own, page_size=2)
    assert sorted(job["job_id"] for job in paged) == sorted(ids)
    first = scene.ok("ListJobs", filter=own, page_size=2)
    assert len(first.get("jobs", ())) <= 2
    token = first["next_page_token"]
    late = scene.submit(labels={"run": scene.tag})["job_id"]
    rest = scene.pages("ListJobs", "jobs", filter=own, page_size=1000)
    assert late in [job["job_id"] for job in rest]
    second = scene.ok("ListJobs", filter=own, page_size=2, page_token=token)
    seen = [job["job_id"] for page in (first, second) for job in page.get("jobs", ())]
    assert len(set(seen)) == len(seen)
    assert late not in seen
    scene.ok("ListJobs", filter=own, page_size=100_000)
    scene.invalid("page_size", "ListJobs", filter=own, page_size=-1)


@scenario()
def a_page_token_is_bound_to_its_filter(scene: Scene) -> None:
    requests = [{"job_type": scene.idle, "labels": {"run": scene.tag}} for _ in range(3)]
    scene.ok("SubmitJobs", requests=requests)
    own = {"labels": {"run": scene.tag}}
    token = scene.ok("ListJobs", filter=own, page_size=1)["next_page_token"]
    other = {"labels": {"run": scene.tag}, "job_types": [scene.idle]}
    scene.invalid("page_token", "ListJobs", filter=other, page_size=1, page_token=token)
    scene.invalid("page_token", "ListJobs", page_size=1, page_token=token)
    for forged in forgeries(token):
        scene.invalid("page_token", "ListJobs", filter=own, page_size=1, page_token=forged)


@scenario()
def each_filter_chooses(scene: Scene) -> None:
    labels = {"run": scene.tag}
    waiting = scene.submit(labels={**labels, "a": "1", "b": "2"}, queue=UNSERVED)["job_id"]
    later = scene.submit(labels={**labels, "a": "1"}, delay="3600s")["job_id"]
    keyed = scene.submit(labels={**labels, "b": "2"}, idempotency_key=scene.tag)["job_id"]
    scene.cancel(keyed)
    failed = scene.run("demo.fail", payload={"retryable": False}, labels=labels)
    echoed = scene.run(labels=labels)
    everything = [echoed, failed, keyed, later, waiting]
    assert _listed(scene) == everything
    assert _listed(scene, states=["JOB_STATE_QUEUED"]) == [waiting]
    states = ["JOB_STATE_SCHEDULED", "JOB_STATE_SUCCEEDED"]
    assert _listed(scene, states=states) == [echoed, later]
    assert _listed(scene, job_types=[scene.idle]) == [keyed, later, waiting]
    assert _listed(scene, job_types=["demo.echo", "demo.fail"]) == [echoed, failed]
    assert _listed(scene, queue=UNSERVED) == [waiting]
    assert _listed(scene, labels={**labels, "a": "1"}) == [later, waiting]
    assert _listed(scene, labels={**labels, "a": "1", "b": "2"}) == [waiting]
    assert _listed(scene, labels={**labels, "a": "2"}) == []
    assert _listed(scene, error_types=["Abort"]) == [failed]
    assert _listed(scene, error_types=["CANCELLED", "Abort"]) == [failed, keyed]
    assert _listed(scene, idempotency_key=scene.tag) == [keyed]
    assert _listed(scene, job_types=["demo.fail"], states=["JOB_STATE_SUCCEEDED"]) == []
    without_label = scene.pages("ListJobs", "jobs", filter={"idempotency_key": scene.tag})
    assert [job["job_id"] for job in without_label] == [keyed]


@scenario()
def times_choose_from_and_until(scene: Scene) -> None:
    """`_after` is inclusive, `_before` exclusive."""
    labels = {"run": scene.tag}
    ids = [scene.submit(labels=labels)["job_id"] for _ in range(3)]
    first, second = (scene.cancel(job_id) for job_id in ids[:2])
    created = timestamp(moment(second["create_time"]))
    assert _listed(scene, create_time_after=created) == [ids[2], ids[1]]
    assert _listed(scene, create_time_before=created) == [ids[0]]
    finished = timestamp(moment(second["finish_time"]))
    assert _listed(scene, finish_time_after=finished) == [ids[1]]
    assert _listed(scene, finish_time_before=finished) == [ids[0]]
    both = {"finish_time_after": timestamp(moment(first["finish_time"]))}
    assert _listed(scene, **both, finish_time_before=finished) == [ids[0]]


@scenario()
def a_list_has_two_views(scene: Scene) -> None:
    own = {"labels": {"run": scene.tag}}
    payload = {"times": 1}
    job_id = scene.run("demo.fail", **own, payload=payload, max_attempts=1)
    full: Json = scene.get(job_id)
    assert full["error"]["traceback"]
    assert scene.pages("ListJobs", "jobs", filter=own, view="JOB_VIEW_FULL") == [full]
    del full["payload"]
    del full["error"]["traceback"]
    assert scene.pages("ListJobs", "jobs", filter=own, view="JOB_VIEW_BASIC") == [full]
    assert scene.pages("ListJobs", "jobs", filter=own) == [full]


@scenario()
def a_page_ends_at_three_mib(scene: Scene) -> None:
    own = {"labels": {"run": scene.tag}}
    payload = {"pad": "x" * ALMOST_MIB}
    ids = [scene.submit(**own, payload=payload)["job_id"] for _ in range(4)]
    page = scene.ok("ListJobs", filter=own, view="JOB_VIEW_FULL")
    assert len(page["jobs"]) < 4
    assert page["next_page_token"]
    listed = scene.pages("ListJobs", "jobs", filter=own, view="JOB_VIEW_FULL")
    assert [job["job_id"] for job in listed] == ids[::-1]
    assert all(job["payload"] == payload for job in listed)


@scenario()
def a_filter_names_known_states(scene: Scene) -> None:
    for unknown in (0, 99):
        reply = scene.refused(
            "INVALID_ARGUMENT", "INVALID_FIELD", "ListJobs", filter={"states": [2, unknown]}
        )
        assert len(reply.fields) == 1, reply.fields
        assert reply.fields[0].startswith("filter.states"), reply.fields


@scenario()
def a_job_that_waits_again_tells_of_its_failure(scene: Scene) -> None:
    own = {"labels": {"run": scene.tag}}
    job_id = scene.submit("demo.fail", **own, retry_policy=LONG_BACKOFF)["job_id"]
    scene.happened(job_id, "ATTEMPT_FAILED")
    assert _listed(scene, states=["JOB_STATE_RETRYING"], error_types=["DemoError"]) == [job_id]
    (job,) = scene.pages("ListJobs", "jobs", filter=own)
    assert job["next_attempt_time"]
    assert types(scene.history(job_id))[-1] == "ATTEMPT_FAILED"
