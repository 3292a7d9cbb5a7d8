"""The commands for jobs: what they send, print and exit with, where stdout is no terminal."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct, Value

from generated.jobsvc.v1 import job_pb2
from generated.jobsvc.v1.job_pb2 import Blob
from generated.jobsvc.v1.job_service_pb2 import (
    CancelJobResponse,
    ExplainJobResponse,
    GetJobResponse,
    GetResultResponse,
    ListJobEventsResponse,
    RunJobResponse,
    SubmitJobResponse,
)
from tests.harness.wait import until
from tests.unit.cli.conftest import Refusal, Run, Script
from tests.unit.cli.examples import ENDS, JOB_ID, history, job, result, stream

UNKNOWN = Refusal(grpc.StatusCode.NOT_FOUND, "JOB_UNKNOWN", f"no job {JOB_ID}")


@pytest.fixture
def submitted(script: Script) -> Script:
    script.answers["SubmitJob"] = SubmitJobResponse(job=job())
    return script


def test_submit_prints_the_id_alone(submitted: Script, jobsvc: Run) -> None:
    ended = jobsvc(
        "submit", "send_email", '{"to": "a", "n": 9007199254740992}', "--queue", "q",
        "--priority", "9", "--delay", "5m", "--key", "k", "--label", "a=b", "--label", "c=d=e",
    )  # fmt: skip
    assert (ended.code, ended.out, ended.err) == (0, JOB_ID + "\n", "")
    (request,) = submitted.requests
    assert request.job_type == "send_email"
    assert dict(request.payload) == {"to": "a", "n": 2**53}
    assert (request.queue, request.priority, request.delay.seconds) == ("q", 9, 300)
    assert request.idempotency_key == "k"
    assert dict(request.labels) == {"a": "b", "c": "d=e"}


def test_submit_without_a_payload_sends_an_empty_object(submitted: Script, jobsvc: Run) -> None:
    assert jobsvc("submit", "t").code == 0
    (request,) = submitted.requests
    assert request.WhichOneof("input") == "payload"
    assert request.payload == Struct()
    assert not request.HasField("delay")


def test_submit_can_print_the_job(submitted: Script, jobsvc: Run) -> None:
    ended = jobsvc("submit", "t", "--output", "json")
    assert ended.json["job_id"] == JOB_ID
    assert ended.json["state"] == "JOB_STATE_QUEUED"
    assert len(ended.lines) == 1


def test_a_payload_comes_from_a_file(submitted: Script, jobsvc: Run, tmp_path: Path) -> None:
    path = tmp_path / "payload.json"
    path.write_text('{"ä": [1, null, true, 0.5]}')
    assert jobsvc("submit", "t", f"@{path}").code == 0
    assert json.loads(path.read_text()) == {
        key: list(value) for key, value in submitted.requests[0].payload.items()
    }


@pytest.mark.parametrize("end", ENDS)
def test_submit_can_wait(submitted: Script, jobsvc: Run, end: str) -> None:
    submitted.answers["GetResult"] = result(end)
    ended = jobsvc("submit", "t", "--wait")
    assert ended.code == ENDS[end][2]
    assert ended.err.splitlines()[0] == JOB_ID
    if end == "SUCCEEDED":
        assert ended.out == "42\n"
        assert ended.err == JOB_ID + "\n"
    else:
        assert ended.out == ""
        assert ended.err.splitlines()[1:] == [f"{end} Oops: why\\nnot"]


@pytest.mark.parametrize("end", ENDS)
def test_submit_can_follow(submitted: Script, jobsvc: Run, end: str) -> None:
    submitted.answers["WatchJob"] = stream(end)
    ended = jobsvc("submit", "t", "--watch")
    assert ended.code == ENDS[end][2]
    assert ended.lines[0] == JOB_ID
    assert [line.split()[1:3] for line in ended.lines[1:]] == [
        ["1", "SUBMITTED"],
        ["2", "STARTED"],
        ["3", "PROGRESS"],
        ["4", "LOG"],
        ["5", end],
    ]
    assert ended.lines[4].endswith("INFO two\\nlines \\u001b[31m")
    assert ended.lines[3].endswith("1/4 step")


def test_submit_can_follow_in_json(submitted: Script, jobsvc: Run) -> None:
    submitted.answers["WatchJob"] = stream()
    ended = jobsvc("submit", "t", "--watch", "--output", "json")
    assert [json.loads(line)["sequence"] for line in ended.lines] == ["1", "2", "3", "4", "5"]
    assert ended.err == JOB_ID + "\n"


@pytest.mark.parametrize("end", ENDS)
def test_run_prints_events_and_the_result(script: Script, jobsvc: Run, end: str) -> None:
    messages = [RunJobResponse(event=event) for event in history(end)]
    script.answers["RunJob"] = [*messages, RunJobResponse(result=result(end))]
    ended = jobsvc("run", "t", '{"a": 1}')
    assert ended.code == ENDS[end][2]
    lines = [json.loads(line) for line in ended.lines]
    assert [line.get("sequence") for line in lines] == ["1", "2", "3", "4", "5", None]
    assert lines[-1]["state"] == f"JOB_STATE_{end}"
    assert ended.err == JOB_ID + "\n"
    (request,) = script.requests
    assert dict(request.request.payload) == {"a": 1}

    ended = jobsvc("run", "t", "--output", "table")
    assert ended.code == ENDS[end][2]
    assert len(ended.lines) == (6 if end == "SUCCEEDED" else 5)
    assert ended.lines[-1] == "42" or end != "SUCCEEDED"


def test_get(script: Script, jobsvc: Run) -> None:
    found = job(labels={"a": "b"}, last_sequence=7)
    found.payload["text"] = "x\ny\x1b"
    script.answers["GetJob"] = GetJobResponse(job=found)
    ended = jobsvc("get", JOB_ID)
    assert ended.code == 0
    assert len(ended.lines) == 1
    assert ended.json == {
        "job_id": JOB_ID,
        "job_type": "t",
        "state": "JOB_STATE_QUEUED",
        "payload": {"text": "x\ny\x1b"},
        "labels": {"a": "b"},
        "last_sequence": "7",
    }
    ended = jobsvc("get", JOB_ID, "--output", "table")
    fields = dict(line.split(maxsplit=1) for line in ended.lines)
    assert fields["state"] == "QUEUED"
    assert fields["job_id"] == JOB_ID
    assert ended.out.replace("\n", "").isprintable()


@pytest.mark.parametrize("end", ENDS)
def test_watch(script: Script, jobsvc: Run, end: str) -> None:
    script.answers["WatchJob"] = stream(end)
    ended = jobsvc("watch", JOB_ID)
    assert ended.code == ENDS[end][2]
    assert [json.loads(line)["sequence"] for line in ended.lines] == ["1", "2", "3", "4", "5"]
    ended = jobsvc("watch", JOB_ID, "--output", "table")
    assert ended.code == ENDS[end][2]
    assert ended.lines[-1].split()[1:3] == ["5", end]


@pytest.mark.parametrize("end", ENDS)
def test_watch_of_what_was_seen_still_knows_the_end(script: Script, jobsvc: Run, end: str) -> None:
    script.answers["WatchJob"] = []
    script.answers["GetResult"] = result(end)
    ended = jobsvc("watch", JOB_ID, "--after-sequence", "5")
    assert (ended.code, ended.out) == (ENDS[end][2], "")
    assert script.requests[0].after_sequence == 5


def test_events(script: Script, jobsvc: Run) -> None:
    script.answers["ListJobEvents"] = ListJobEventsResponse(events=history("FAILED"))
    ended = jobsvc("events", JOB_ID, "--after-sequence", "0")
    assert ended.code == 0
    assert [json.loads(line)["sequence"] for line in ended.lines] == ["1", "2", "3", "4", "5"]
    ended = jobsvc("events", JOB_ID, "--output", "table")
    assert len(ended.lines) == 5
    assert ended.lines[-1].endswith("Oops: why")


@pytest.mark.parametrize("end", ENDS)
def test_result(script: Script, jobsvc: Run, end: str) -> None:
    script.answers["GetResult"] = result(end)
    ended = jobsvc("result", JOB_ID, "--wait", "2s")
    assert ended.code == ENDS[end][2]
    assert ended.json["state"] == f"JOB_STATE_{end}"
    assert script.requests[0].wait.ToTimedelta().total_seconds() == pytest.approx(2, abs=0.1)


def test_result_of_a_job_that_has_not_ended(script: Script, jobsvc: Run) -> None:
    running = GetResultResponse(job_id=JOB_ID, state=job_pb2.JOB_STATE_RUNNING)
    script.answers["GetResult"] = running
    ended = jobsvc("result", JOB_ID, "--output", "table")
    assert (ended.code, ended.out) == (0, "")
    assert ended.err == f"job {JOB_ID} is RUNNING\n"


def test_a_wait_that_ran_out_has_an_exit_code_of_its_own(script: Script, jobsvc: Run) -> None:
    script.answers["GetResult"] = GetResultResponse(job_id=JOB_ID, state=job_pb2.JOB_STATE_RUNNING)
    ended = jobsvc("result", JOB_ID, "--wait", "1s")
    assert (ended.code, ended.json["state"]) == (5, "JOB_STATE_RUNNING")
    assert jobsvc("result", JOB_ID).code == 0


@pytest.mark.parametrize("command", ["run", "submit --watch", "submit --wait", "watch"])
def test_whoever_waits_is_told_why_nothing_happens(
    submitted: Script, jobsvc: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("jobsvc.cli.waiting.SILENCE_SECONDS", 0.01)
    said = io.StringIO()
    monkeypatch.setattr("sys.stderr", said)
    why = "waits: NO_WORKER: no live worker knows the type t\n"

    def once_told(*messages: Any) -> Iterator[Any]:
        until(lambda: why in said.getvalue(), 20, "the reason")
        yield from messages

    first, *rest = history()
    submitted.answers["ExplainJob"] = ExplainJobResponse(
        reason=job_pb2.WAIT_REASON_NO_WORKER, message="no live worker knows the type t"
    )
    submitted.answers["RunJob"] = chain(
        [RunJobResponse(event=first)],
        once_told(
            *[RunJobResponse(event=event) for event in rest], RunJobResponse(result=result())
        ),
    )
    submitted.answers["WatchJob"] = chain(stream()[:2], once_told(*stream()[2:]))
    submitted.answers["GetResult"] = lambda: next(once_told(result()))
    assert jobsvc(*command.split(), "t").code == 0
    assert said.getvalue().count(why) == 1


def test_result_of_every_kind(script: Script, jobsvc: Run) -> None:
    value = Value()
    value.struct_value["a"] = [1, "ü", None]
    script.answers["GetResult"] = result(value=value)
    assert jobsvc("result", JOB_ID, "--output", "table").out == '{"a": [1, "ü", null]}\n'
    script.answers["GetResult"] = GetResultResponse(
        state=job_pb2.JOB_STATE_SUCCEEDED, result_blob=Blob(content_type="x/y", data=b"z")
    )
    ended = jobsvc("result", JOB_ID, "--output", "table")
    assert ended.json == {"content_type": "x/y", "data": "eg=="}


def test_cancel(script: Script, jobsvc: Run) -> None:
    script.answers["CancelJob"] = CancelJobResponse(job=job(cancel_requested=True))
    ended = jobsvc("cancel", JOB_ID, "--reason", "wrong file")
    assert ended.code == 0
    assert ended.json["cancel_requested"] is True
    assert script.requests[0].reason == "wrong file"


@pytest.mark.parametrize(
    ("rpc", "words"),
    [
        ("SubmitJob", ["submit", "t"]),
        ("RunJob", ["run", "t"]),
        ("GetJob", ["get", JOB_ID]),
        ("WatchJob", ["watch", JOB_ID]),
        ("ListJobEvents", ["events", JOB_ID]),
        ("GetResult", ["result", JOB_ID]),
        ("CancelJob", ["cancel", JOB_ID]),
    ],
)
def test_no_is_exit_code_4_and_one_line(
    script: Script, jobsvc: Run, rpc: str, words: list[str]
) -> None:
    script.answers[rpc] = UNKNOWN
    ended = jobsvc(*words)
    assert (ended.code, ended.out) == (4, "")
    assert ended.err == f"NOT_FOUND JOB_UNKNOWN: no job {JOB_ID}\n"


def test_an_address_where_nobody_answers(
    script: Script, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobsvc.cli.options.CALL_SECONDS_MAX", 0.5)
    ended = run("get", JOB_ID, "--address", "127.0.0.1:1")
    assert (ended.code, ended.out) == (4, "")
    assert ended.err.startswith("UNAVAILABLE: ")
    assert ended.err.count("\n") == 1


def test_the_token(script: Script, jobsvc: Run, tmp_path: Path) -> None:
    script.answers["GetJob"] = GetJobResponse(job=job())
    assert jobsvc("get", JOB_ID).code == 0
    assert "authorization" not in script.metadata
    assert jobsvc("get", JOB_ID, JOBSVC_TOKEN="one").code == 0
    assert script.metadata["authorization"] == "Bearer one"
    path = tmp_path / "token"
    path.write_text("two\n")
    assert jobsvc("get", JOB_ID, "--token-file", str(path)).code == 0
    assert script.metadata["authorization"] == "Bearer two"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["submit", "t", '{"a": }'], "line 1 column 7"),
        (["submit", "t", ""], "line 1 column 1"),
        (["submit", "t", "[1]"], "a JSON object"),
        (["submit", "t", '{"a": NaN}'], "NaN is no JSON value"),
        (["submit", "t", '{"a": 1e999}'], "too large"),
        (["submit", "t", '{"a": 1, "a": 2}'], 'the key "a" is there twice'),
        (["submit", "t", '{"a": 9007199254740993}'], "as a string"),
        (["submit", "t", '{"a": -9007199254740993}'], "as a string"),
        (["submit", "t", '{"a": ' + "9" * 5000 + "}"], "as a string"),
        (["submit", "t", '{"a": "\\ud800"}'], "surrogates"),
        (["submit", "t", '{"a":' * 40 + "1" + "}" * 40], "32 levels"),
        (["submit", "t", '{"a":' * 5000 + "1" + "}" * 5000], "deep"),
        (["submit", "t", "@/no/such/file"], "No such file"),
        (["run", "t", "{"], "line 1 column 2"),
        (["run", "t", '{"a": "\\ud800"}'], "surrogates"),
        (["submit", "t", "--delay", "5"], "'5' is not a span"),
        (["submit", "t", "--label", "x"], "'x' is not of the form k=v"),
        (["submit", "t", "--label", "x=1", "--label", "x=2"], "twice"),
        (["submit", "t", "--priority", "high"], "--priority"),
        (["submit", "t", "--priority", "99999999999"], "range"),
        (["submit", "t", "--wait", "--watch"], "not both"),
        (["submit"], "TYPE"),
        (["result", JOB_ID, "--wait", "long"], "not a span"),
        (["get", JOB_ID, "--token-file", "/no/such/file"], "No such file"),
        (["get", JOB_ID, "--tls-ca", "/no/such/file"], "No such file"),
        (["get", JOB_ID, "--client-cert", "x"], "go together"),
        (["get", JOB_ID, "--tls-server-name", "x"], "there is no TLS"),
        (["get", JOB_ID, "--output", "xml"], "xml"),
        (["get", "\udcff"], "not UTF-8"),
        (["dance"], "dance"),
        (["list", "--created-after", "99999999h"], "leads out of the years"),
        (["list", "--created-after", "0001-01-01T00:00:00+23:00"], "leads out of the years"),
        (["update", JOB_ID, "--schedule-time", "99999999h"], "leads out of the years"),
        (["submit", "t", "--delay", "99999999999h"], "10,000 years"),
        (["result", JOB_ID, "--wait", "9" * 400 + "h"], "10,000 years"),
        (["update", JOB_ID, "--priority", "99999999999"], "range"),
        (["watch", JOB_ID, "--after-sequence", "9" * 20], "range"),
        (["retry", "--state", "failed", "--max-count", "99999999999"], "range"),
        (["queues", "update", "q", "--max-running", "99999999999"], "range"),
        (["queues", "update", "q", "--rate-limit", "9" * 20 + "/5m"], "range"),
    ],
    ids=range(40),
)
def test_wrong_usage_is_exit_code_2(jobsvc: Run, words: list[str], message: str) -> None:
    ended = jobsvc(*words)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err
    assert "Traceback" not in ended.err


def test_a_file_that_is_not_utf8(jobsvc: Run, tmp_path: Path) -> None:
    path = tmp_path / "payload.json"
    path.write_bytes(b'{"a": "\xff"}')
    ended = jobsvc("submit", "t", f"@{path}")
    assert ended.code == 2
    assert "not UTF-8 at byte 7" in ended.err


def test_a_bad_setting_is_exit_code_2(jobsvc: Run) -> None:
    ended = jobsvc("get", JOB_ID, JOBSVC_INSECURE="perhaps")
    assert ended.code == 2
    first, second = ended.err.splitlines()
    assert first == "bad settings:"
    assert second.startswith("  JOBSVC_INSECURE: ")
