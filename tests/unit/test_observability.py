"""What watches the service asks for metrics that there are, and is written about."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

import jobsvc.metrics  # noqa: F401 - registers them

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "scripts/stack/alerts.yml"
DASHBOARD = ROOT / "scripts/stack/grafana/jobsvc.json"
GUIDE = (ROOT / "docs/operate.md").read_text()


def served() -> set[str]:
    """The names of all metrics of ours, without the endings that samples of some have."""
    return {m.name for m in REGISTRY.collect() if m.name.startswith("jobsvc_")}


@pytest.mark.parametrize("path", [ALERTS, DASHBOARD], ids=lambda path: path.name)
def test_every_metric_that_is_asked_for_is_served(path: Path) -> None:
    asked = set(re.findall(r"\bjobsvc_[a-z_]+", path.read_text()))
    assert len(asked) > 5
    assert {re.sub(r"_(total|bucket|count|sum)$", "", name) for name in asked} <= served()


def test_every_metric_is_explained() -> None:
    assert {name for name in served() if f"`{name}" not in GUIDE} == set()


def test_every_alert_is_explained() -> None:
    alerts = re.findall(r"- alert: (\w+)", ALERTS.read_text())
    assert alerts
    assert [name for name in alerts if f"| `{name}` |" not in GUIDE] == []


def test_every_panel_has_a_place_of_its_own() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    places = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(places) == len(set(places))
    assert {x for x, _ in places} == set(range(24))
