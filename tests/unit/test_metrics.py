"""Children of metrics are looked up once, and are bounded in number."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
from prometheus_client import REGISTRY

from jobsvc import metrics
from jobsvc.core.model import Step
from jobsvc.core.states import EventType, JobState


@pytest.fixture(autouse=True)
def _no_kinds_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_kinds", set())
    monkeypatch.setattr(metrics, "_step_children", {})
    monkeypatch.setattr(metrics, "_kind_children", {})


def submitted(job_type: str) -> Step:
    return Step(EventType.SUBMITTED, JobState.QUEUED, job_type, "metrics-test")


def counted(job_type: str, queue: str = "metrics-test") -> float:
    labels = {"event": "SUBMITTED", "state": "QUEUED", "job_type": job_type, "queue": queue}
    return REGISTRY.get_sample_value("jobsvc_job_events_total", labels) or 0.0


def test_a_step_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = Mock(wraps=metrics.STEPS.labels)
    monkeypatch.setattr(metrics.STEPS, "labels", labels)
    metrics.count_steps({submitted("once"): 2, submitted("twice"): 1})
    metrics.count_steps({submitted("once"): 3})
    assert (counted("once"), counted("twice")) == (5.0, 1.0)
    assert labels.call_count == 2


def test_histograms_of_one_kind_are_told_apart() -> None:
    wait = metrics.kind_child(metrics.WAIT, "apart", "default")
    assert wait is metrics.kind_child(metrics.WAIT, "apart", "default")
    assert wait is metrics.WAIT.labels("apart", "default")
    assert metrics.kind_child(metrics.RUN, "apart", "default") is metrics.RUN.labels(
        "apart", "default"
    )


def test_kinds_beyond_the_bound_are_counted_as_one_and_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "KINDS_MAX", 1)
    before = counted("other", "other")
    other = metrics.WAIT.labels("other", "other")
    for number in range(4):
        metrics.count_steps({submitted(f"bound{number}"): 1})
        child = metrics.kind_child(metrics.WAIT, f"bound{number}", "metrics-test")
        assert (child is other) == (number > 0)
    assert counted("other", "other") == before + 3
    assert len(metrics._step_children) == len(metrics._kind_children) == 1
