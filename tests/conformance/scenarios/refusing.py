"""Errors, and who may."""

from __future__ import annotations

from collections.abc import Mapping

from tests.conformance.scenarios import scenario
from tests.conformance.scene import METHODS, Scene, check_error, nobody, state

# The scopes that a call needs, all of them; what is not here needs `admin`.
NEEDED: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(("SubmitJob", "SubmitJobs", "UpdateJob", "RetryJob"), frozenset({"submit"})),
    "RunJob": frozenset({"submit", "read"}),
    **dict.fromkeys(
        ("GetJob", "GetResult", "ListJobs", "ListJobEvents", "ListJobTypes", "ExplainJob"),
        frozenset({"read"}),
    ),
    **dict.fromkeys(("WatchJob", "WatchJobs"), frozenset({"read"})),
    "CancelJob": frozenset({"cancel"}),
}
# So that a call that is allowed does nothing, and ends.
HARMLESS: Mapping[str, dict[str, object]] = {
    "ListJobs": {"page_size": -1},
    "WatchJobs": {"resume_token": "x"},
    "ListJobTypes": {"page_size": -1},
    "ListQueues": {"page_size": -1},
    "ListWorkers": {"page_size": -1},
    "ListSchedules": {"page_size": -1},
    "ListFailureGroups": {"page_size": -1},
}


@scenario()
def every_call_is_answered(scene: Scene) -> None:
    """Nothing is UNIMPLEMENTED; an empty request is told what it lacks."""
    for rpc in METHODS:
        reply = scene.call(rpc, **HARMLESS.get(rpc, {}))
        check_error(reply, reply.code, reply.reason, rpc)
        assert reply.code in {"INVALID_ARGUMENT", "NOT_FOUND"}, f"{rpc}: {reply}"


@scenario(needs="open")
def without_tokens_everybody_is_anonymous(scene: Scene) -> None:
    job_id = scene.submit()["job_id"]
    scene.cancel(job_id)
    actors = [event["actor"] for event in scene.history(job_id)]
    assert actors == ["anonymous", "anonymous"]


@scenario(needs="tokens")
def a_token_allows_what_its_scope_says(scene: Scene) -> None:
    """And nothing else; which is told before anything of the request."""
    for rpc in METHODS:
        for scope in ("submit", "read", "cancel"):
            reply = scene.call_with(scene.tokens[scope], rpc, **HARMLESS.get(rpc, {}))
            if NEEDED.get(rpc, frozenset({"admin"})) <= {scope}:
                assert reply.code in {"INVALID_ARGUMENT", "NOT_FOUND"}, f"{rpc}, {scope}: {reply}"
            else:
                check_error(reply, "PERMISSION_DENIED", "SCOPE_MISSING", f"{rpc}, {scope}")


@scenario(needs="tokens")
def nobody_may_do_anything_without_a_token(scene: Scene) -> None:
    for rpc in METHODS:
        reply = scene.call_with(None, rpc)
        check_error(reply, "UNAUTHENTICATED", "UNAUTHENTICATED", rpc)
    reply = scene.call_with("not-a-token", "GetJob", job_id=nobody())
    check_error(reply, "UNAUTHENTICATED", "UNAUTHENTICATED", "GetJob")


@scenario(needs="tokens")
def existence_is_not_told_to_those_who_may_not_read(scene: Scene) -> None:
    job_id = scene.submit()["job_id"]
    for each in (job_id, nobody()):
        reply = scene.call_with(scene.tokens["submit"], "GetJob", job_id=each)
        check_error(reply, "PERMISSION_DENIED", "SCOPE_MISSING", "GetJob")


@scenario(needs="tokens")
def a_token_is_the_actor(scene: Scene) -> None:
    submitted = scene.call_with(scene.tokens["submit"], "SubmitJob", job_type=scene.idle)
    assert submitted.code == "OK", submitted
    job_id = submitted.body["job"]["job_id"]
    cancelled = scene.call_with(scene.tokens["cancel"], "CancelJob", job_id=job_id)
    assert state(cancelled.body["job"]) == "CANCELLED"
    first, second = (event["actor"] for event in scene.history(job_id))
    assert "anonymous" not in {first, second}
    assert first != second
