"""WatchJob and WatchJobs: nothing lost, nothing twice, from wherever one stood."""

from __future__ import annotations

from tests.conformance.callers import Json, Stream
from tests.conformance.scenarios import scenario
from tests.conformance.scene import (
    NO_BACKOFF,
    UNSERVED,
    Scene,
    event_type,
    events_of,
    forgeries,
    nobody,
    types,
)

INTERVALS = ("0s", "0.999999999s", "50.000000001s", "-1s")


def _until(stream: Stream, count: int) -> list[Json]:
    """Messages up to the one with the `count`th event."""
    found: list[Json] = []
    seen = 0
    while seen < count:
        message = stream.take()
        seen += "event" in message
        found.append(message)
    return found


@scenario()
def a_watch_replays_from_wherever_one_stood(scene: Scene) -> None:
    """Of a job that has ended: what follows, then OK, at once where nothing does."""
    job_id = scene.run("demo.fail", payload={"times": 1}, retry_policy=NO_BACKOFF)
    events = scene.history(job_id)
    for after in range(len(events) + 1):
        with scene.stream("WatchJob", job_id=job_id, after_sequence=after) as stream:
            assert events_of(stream) == events[after:]
            assert stream.reply.code == "OK", stream.reply


@scenario()
def a_watch_follows_until_the_end(scene: Scene) -> None:
    job_id = scene.submit()["job_id"]
    with scene.stream("WatchJob", job_id=job_id) as stream:
        first = stream.take()["event"]
        assert (event_type(first), first["sequence"]) == ("SUBMITTED", "1")
        scene.cancel(job_id)
        assert types(events_of(stream)) == ["CANCELLED"]
        assert stream.reply.code == "OK", stream.reply


@scenario()
def watchers_of_one_job_see_the_same(scene: Scene) -> None:
    """One joins late, one left and came back."""
    payload = {"seconds": 0.8, "steps": 4}
    job_id = scene.submit("demo.sleep", payload=payload)["job_id"]
    with scene.stream("WatchJob", job_id=job_id) as stream:
        begun = [message["event"] for message in _until(stream, 2) if "event" in message]
    after = int(begun[-1]["sequence"])
    with scene.stream("WatchJob", job_id=job_id, after_sequence=after) as stream:
        resumed = events_of(stream)
        assert stream.reply.code == "OK", stream.reply
    assert begun + resumed == scene.history(job_id)
    assert "PROGRESS" in types(resumed)


@scenario()
def a_heartbeat_comes_at_once_where_nothing_does(scene: Scene) -> None:
    job_id = scene.submit()["job_id"]
    with scene.stream("WatchJob", job_id=job_id, after_sequence=1) as stream:
        heartbeat = stream.take()["heartbeat"]
    assert heartbeat["last_sequence"] == "1"
    assert heartbeat["time"]


@scenario()
def heartbeats_come_as_often_as_asked(scene: Scene) -> None:
    job_id = scene.submit()["job_id"]
    with scene.stream("WatchJob", job_id=job_id, heartbeat_interval="1s") as stream:
        messages = [stream.take() for _ in range(3)]
    assert ["heartbeat" in message for message in messages] == [False, True, True]


@scenario()
def a_watch_names_what_is_wrong_with_it(scene: Scene) -> None:
    job_id = scene.submit()["job_id"]
    for text in INTERVALS:
        scene.invalid("heartbeat_interval", "WatchJob", job_id=job_id, heartbeat_interval=text)
    scene.invalid("after_sequence", "WatchJob", job_id=job_id, after_sequence=-1)
    reply = scene.refused(
        "OUT_OF_RANGE", "SEQUENCE_OUT_OF_RANGE", "WatchJob", job_id=job_id, after_sequence=2
    )
    assert reply.metadata == {"oldest_sequence": "1", "last_sequence": "1"}
    scene.refused("NOT_FOUND", "JOB_UNKNOWN", "WatchJob", job_id=nobody())


@scenario()
def a_watch_of_a_deleted_job_is_not_found(scene: Scene) -> None:
    job_id = scene.submit()["job_id"]
    scene.cancel(job_id)
    scene.ok("DeleteJob", job_id=job_id)
    for after in (0, 2):
        scene.refused("NOT_FOUND", "JOB_UNKNOWN", "WatchJob", job_id=job_id, after_sequence=after)


# Of many jobs.


def _places(messages: list[Json]) -> list[tuple[str, int]]:
    """Job and sequence of each event."""
    events = [message["event"] for message in messages if "event" in message]
    return [(event["job_id"], int(event["sequence"])) for event in events]


@scenario()
def a_watch_of_many_begins_now(scene: Scene) -> None:
    """With a heartbeat, so that there is a token."""
    own = {"labels": {"run": scene.tag}}
    before = scene.submit(**own)["job_id"]
    with scene.stream("WatchJobs", filter=own) as stream:
        first = stream.take()
        assert first["heartbeat"].get("last_sequence", "0") == "0"
        assert first["heartbeat"]["time"]
        assert first["resume_token"]
        other = scene.submit(labels={"run": "another"})["job_id"]
        scene.cancel(other)
        after = scene.submit(**own)["job_id"]
        scene.cancel(before)
        assert sorted(_places(_until(stream, 2))) == sorted([(after, 1), (before, 2)])


@scenario()
def a_watch_of_many_resumes_where_it_stood(scene: Scene) -> None:
    """From every token that it was given: none lost, none twice."""
    own = {"labels": {"run": scene.tag}}
    with scene.stream("WatchJobs", filter=own) as stream:
        messages = [stream.take()]
        ids = [scene.submit(**own)["job_id"] for _ in range(2)]
        messages += _until(stream, 2)
    for job_id in ids:  # while nobody watches
        scene.cancel(job_id)
    token = messages[-1]["resume_token"]
    with scene.stream("WatchJobs", filter=own, resume_token=token) as stream:
        messages += _until(stream, 2)
    places = _places(messages)
    assert sorted(places) == sorted((job_id, sequence) for job_id in ids for sequence in (1, 2))
    assert all(message["resume_token"] for message in messages)
    seen = 0
    for message in messages:
        seen += "event" in message
        rest = len(places) - seen
        with scene.stream("WatchJobs", filter=own, resume_token=message["resume_token"]) as stream:
            assert sorted(_places(_until(stream, rest))) == sorted(places[seen:])


@scenario()
def a_watch_of_many_tells_each_history_in_order(scene: Scene) -> None:
    own = {"labels": {"run": scene.tag}}
    with scene.stream("WatchJobs", filter=own) as stream:
        stream.take()
        requests = [{"job_type": "demo.echo", **own} for _ in range(6)]
        answers = scene.ok("SubmitJobs", requests=requests)["responses"]
        ids = {answer["job"]["job_id"] for answer in answers}
        places = _places(_until(stream, 18))
    for job_id in ids:
        assert [sequence for each, sequence in places if each == job_id] == [1, 2, 3]


@scenario()
def states_and_error_types_are_matched_by_the_event(scene: Scene) -> None:
    """All else by the job. A token moves past what the filter hides."""
    labels = {"run": scene.tag}
    by_state = {"labels": labels, "states": ["JOB_STATE_CANCELLED", "JOB_STATE_RUNNING"]}
    by_error = {"labels": labels, "error_types": ["CANCELLED"]}
    with (
        scene.stream("WatchJobs", filter=by_state) as states,
        scene.stream("WatchJobs", filter=by_error, heartbeat_interval="1s") as errors,
    ):
        states.take()
        errors.take()
        echoed = scene.run(labels=labels)
        waiting = scene.submit(labels=labels)["job_id"]
        scene.cancel(waiting)
        assert sorted(_places(_until(states, 2))) == sorted([(echoed, 2), (waiting, 2)])
        told = _until(errors, 1)
        assert _places(told) == [(waiting, 2)]
    token = told[-1]["resume_token"]
    last = scene.submit(labels=labels)["job_id"]
    with scene.stream("WatchJobs", filter={"labels": labels}, resume_token=token) as stream:
        assert _places(_until(stream, 1)) == [(last, 1)]


@scenario()
def the_jobs_of_a_watch_are_chosen_by_each_filter(scene: Scene) -> None:
    labels = {"run": scene.tag}
    chosen = {
        "job_types": [scene.idle],
        "queue": UNSERVED,
        "labels": labels,
        "idempotency_key": scene.tag,
    }
    with scene.stream("WatchJobs", filter=chosen) as stream:
        stream.take()
        scene.submit(labels=labels, queue=UNSERVED)
        scene.submit(labels=labels, idempotency_key=f"{scene.tag} other", queue=UNSERVED)
        match = {"labels": labels, "queue": UNSERVED, "idempotency_key": scene.tag}
        job_id = scene.submit(**match)["job_id"]
        assert _places(_until(stream, 1)) == [(job_id, 1)]


@scenario()
def a_watch_of_many_names_what_is_wrong_with_it(scene: Scene) -> None:
    for text in INTERVALS:
        scene.invalid("heartbeat_interval", "WatchJobs", heartbeat_interval=text)
    with scene.stream("WatchJobs", filter={"labels": {"run": scene.tag}}) as stream:
        token = stream.take()["resume_token"]
    for forged in forgeries(token):
        scene.invalid("resume_token", "WatchJobs", resume_token=forged)
    for unknown in (0, 99):
        reply = scene.refused(
            "INVALID_ARGUMENT", "INVALID_FIELD", "WatchJobs", filter={"states": [unknown]}
        )
        assert reply.fields[0].startswith("filter.states"), reply.fields
