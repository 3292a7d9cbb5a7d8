from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from jobsvc.services import pacing
from jobsvc.services.pacing import Pace


class Clocks:
    """Of the wall and of the process; whoever sleeps moves the former."""

    def __init__(self) -> None:
        self.now = self.used = 0.0
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def work(self, seconds: float, of: float) -> None:
        self.now += seconds
        self.used += of


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    made = Clocks()
    clock = SimpleNamespace(monotonic=lambda: made.now, process_time=lambda: made.used)
    monkeypatch.setattr(pacing, "time", clock)
    monkeypatch.setattr(pacing, "asyncio", SimpleNamespace(sleep=made.sleep, Lock=asyncio.Lock))
    return made


@pytest.mark.parametrize(
    ("elapsed", "used", "pause"),
    [
        (1.0, 0.0, 0.0),
        (0.04, 0.04, 0.04),  # as long as it worked
        (0.04, 0.03, 0.02),
        (0.04, 0.01, 0.0),  # it idled enough meanwhile
        (5.0, 5.0, 0.1),  # it goes on however busy the process is
    ],
)
async def test_a_pause_is_in_proportion_to_the_work(
    clocks: Clocks, elapsed: float, used: float, pause: float
) -> None:
    pace = Pace(0.5, 0.1)
    await pace.turn()
    clocks.work(elapsed, used)
    await pace.turn()
    assert clocks.slept == [0.0, pytest.approx(pause)]


async def test_all_share_the_turns(clocks: Clocks) -> None:
    pace = Pace(0.5, 0.1)
    clocks.work(0.04, 0.04)

    async def run() -> None:
        await pace.turn()
        clocks.work(0.02, 0.02)

    await asyncio.gather(run(), run())
    assert clocks.slept == [pytest.approx(0.04), pytest.approx(0.02)]
