"""Metrics of several processes as those of one."""

from __future__ import annotations

from typing import Any

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from jobsvc import metrics
from jobsvc.bootstrap import merging
from jobsvc.bootstrap.merging import Snapshot


class Process:
    """What one process counts and measures."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        keep: Any = {"registry": self.registry}
        self.events = Counter("events", "Of it.", ["kind"], **keep)
        self.seconds = Histogram("seconds", "Of it.", buckets=(1, 5), **keep)
        self.watchers = Gauge("jobsvc_watchers", "Sum.", **keep)
        self.oldest = Gauge("jobsvc_oldest_queued_age_seconds", "Max.", ["queue"], **keep)
        self.broker = Gauge("jobsvc_broker_up", "Min.", **keep)

    def told(self) -> Snapshot:
        return merging.snapshot(self.registry)


def page(*told: Snapshot) -> dict[str, float]:
    """Each sample of what Prometheus is shown."""

    class Page:
        def collect(self) -> Any:
            return merging.families(merging.merge(told))

    registry = CollectorRegistry()
    registry.register(Page())
    lines = generate_latest(registry).decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(number) for name, number in pairs}


def two() -> tuple[Process, Process]:
    one, other = Process(), Process()
    one.events.labels("a").inc(2)
    other.events.labels("a").inc(3)
    other.events.labels("b").inc()
    one.seconds.observe(0.5)
    other.seconds.observe(3)
    other.seconds.observe(9)
    for process, number in ((one, 1), (other, 2)):
        process.watchers.set(number)
        process.oldest.labels("default").set(number)
    one.broker.set(1)
    return one, other


def test_each_kind_is_merged_in_its_way() -> None:
    one, other = two()
    found = page(one.told(), other.told())
    assert found['events_total{kind="a"}'] == 5
    assert found['events_total{kind="b"}'] == 1
    buckets = [found[f'seconds_bucket{{le="{bound}"}}'] for bound in ("1.0", "5.0", "+Inf")]
    assert buckets == [1, 2, 3]
    assert (found["seconds_count"], found["seconds_sum"]) == (3, 12.5)
    assert found["jobsvc_watchers"] == 3
    assert found['jobsvc_oldest_queued_age_seconds{queue="default"}'] == 2
    assert found["jobsvc_broker_up"] == 0
    created = [
        value
        for process in (one, other)
        for name, value in page(process.told()).items()
        if name == "seconds_created"
    ]
    assert found["seconds_created"] == min(created)


def test_one_alone_is_shown_as_it_is() -> None:
    one, _ = two()
    lines = generate_latest(one.registry).decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert page(one.told()) == {name: float(number) for name, number in pairs}


def test_of_who_has_ended_the_counts_stay() -> None:
    one, other = two()
    found = page(one.told(), merging.counted(other.told()))
    assert found['events_total{kind="a"}'] == 5
    assert found["seconds_count"] == 3
    assert found["jobsvc_watchers"] == 1
    assert found["jobsvc_broker_up"] == 1


def test_every_gauge_of_ours_has_a_known_way() -> None:
    """A new gauge is to be thought about: it is told for all, or what each has adds up."""
    summed = {
        *("jobsvc_running", "jobsvc_watchers", "jobsvc_fleet_watchers"),
        *("jobsvc_database_connections_in_use", "jobsvc_database_calls_waiting"),
    }
    gauges = {
        family.name
        for family in REGISTRY.collect()
        if family.type == "gauge" and family.name.startswith("jobsvc_")
    }
    ours = {name for name in metrics.LARGEST | metrics.SMALLEST if name.startswith("jobsvc_")}
    assert gauges == summed | ours
    assert not summed & ours
