from __future__ import annotations

import threading
from collections.abc import Callable
from unittest.mock import Mock

import pytest
from structlog.testing import capture_logs

from jobsvc import telemetry
from jobsvc.bootstrap import worker
from jobsvc.settings import load


@pytest.mark.parametrize("consuming", [False, True])
def test_a_worker_that_is_stopped_before_it_consumed_was_never_ready(
    consuming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("Database", "Broker", "Outbox", "schema", "serve_probes", "tracing"):
        monkeypatch.setattr(worker, name, Mock())
    monkeypatch.setattr(telemetry, "configure", Mock())
    stop: list[Callable[[], None]] = []
    monkeypatch.setattr(worker, "on_stop", stop.append)

    def wait_consuming(_: float) -> bool:
        if not consuming:
            stop[0]()
        return consuming

    made = Mock(wait_consuming=wait_consuming, worker_id="w1")
    made.stop.side_effect = lambda _: None
    monkeypatch.setattr(worker, "Worker", Mock(return_value=made))
    waited = Mock(side_effect=lambda *_: stop[0]())
    monkeypatch.setattr(threading.Event, "wait", waited)
    settings = load({}, log_format="json")
    with capture_logs() as logs:
        assert worker.run(settings) == 0
    ready = [] if not consuming else ["ready"]
    assert [log["event"] for log in logs] == [*ready, "stopping"]
