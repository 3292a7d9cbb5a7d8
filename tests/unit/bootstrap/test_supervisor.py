"""Starting, replacing, asking and ending children, with children that serve nothing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from jobsvc import metrics
from jobsvc.bootstrap import merging, supervisor
from jobsvc.bootstrap.supervisor import Supervisor, Survey
from jobsvc.errors import CannotStart

COMMAND = (sys.executable, str(Path(__file__).parent / "fake_child.py"))
SECONDS_MAX = 20


class Trial:
    """A supervisor of fake children."""

    def __init__(self, directory: Path, count: int, *does: str) -> None:
        settings = json.dumps({"directory": str(directory), "do": does}).encode()
        self.supervisor = Supervisor(count, settings, COMMAND)
        self.announced = 0

    @property
    def pids(self) -> set[int]:
        """Of the children that serve."""
        return {child.pid for child in self.supervisor._children if child.serves}

    def announce(self) -> None:
        self.announced += 1

    async def run(self) -> None:
        async with asyncio.timeout(SECONDS_MAX):
            await self.supervisor.run(self.announce)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Trial]:
        """Meanwhile, once all are ready; stopped then."""
        run = asyncio.create_task(self.run())
        try:
            await self.until(lambda: self.announced == 1)
            yield self
            self.supervisor.stop()
            await run
        finally:
            run.cancel()
            await asyncio.wait([run])

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(SECONDS_MAX):
            while not condition():  # noqa: ASYNC110 - no event tells of all of these
                await asyncio.sleep(0.01)

    async def until_ready(self) -> None:
        async with asyncio.timeout(SECONDS_MAX):
            while not (await self.supervisor.survey()).ready:
                pass


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(supervisor, "ANSWER_SECONDS_MAX", 0.5)


def asked(survey: Survey) -> float:
    return merging.value(merging.merge(survey.told), "asked") or 0.0


def lost() -> float:
    return float(metrics.PROCESSES_LOST._value.get())


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def turns(directory: Path) -> int:
    """How many children there have been."""
    return len(list(directory.iterdir()))


async def test_all_are_started_told_of_once_and_ended(tmp_path: Path) -> None:
    async with Trial(tmp_path, 3, "serves").running() as trial:
        pids = trial.pids
        assert len(pids) == 3
        survey = await trial.supervisor.survey()
        assert (survey.live, survey.ready) == (True, True)
    assert trial.announced == 1
    assert trial.supervisor.drained
    assert all(map(is_gone, pids))


async def test_why_a_child_cannot_start_ends_the_start(tmp_path: Path) -> None:
    trial = Trial(tmp_path, 3, "hangs", "refuses", "serves")
    with pytest.raises(CannotStart, match=r"^the schema is older$"):
        await trial.run()
    assert trial.announced == 0
    assert all(is_gone(child.pid) for child in trial.supervisor._children)


async def test_a_child_that_dies_at_the_start_ends_it(tmp_path: Path) -> None:
    trial = Trial(tmp_path, 2, "crashes")
    with pytest.raises(CannotStart, match="ended at its start: exit code 3"):
        await trial.run()


async def test_a_dead_child_is_replaced(tmp_path: Path) -> None:
    before = lost()
    async with Trial(tmp_path, 2, "serves").running() as trial:
        first = trial.pids
        os.kill(min(first), signal.SIGKILL)
        await trial.until(lambda: len(trial.pids - first) == 1 and len(trial.pids) == 2)
        assert max(first) in trial.pids
    assert trial.announced == 1
    assert trial.supervisor.drained
    assert lost() == before + 1


async def test_a_replacement_that_cannot_start_is_tried_again(tmp_path: Path) -> None:
    async with Trial(tmp_path, 2, "serves", "serves", "refuses", "crashes", "serves").running() as (
        trial
    ):
        first = trial.pids
        os.kill(min(first), signal.SIGKILL)
        await trial.until(lambda: len(trial.pids - first) == 1 and len(trial.pids) == 2)


async def test_no_room_for_another_process_is_waited_out(tmp_path: Path) -> None:
    async with Trial(tmp_path, 2, "serves").running() as trial:
        trial.supervisor._command = ("/nowhere",)
        first = trial.pids
        with capture_logs() as records:
            os.kill(min(first), signal.SIGKILL)
            refused = "cannot start a process"
            await trial.until(lambda: any(record["event"] == refused for record in records))
        trial.supervisor._command = COMMAND
        await trial.until(lambda: len(trial.pids - first) == 1 and len(trial.pids) == 2)


async def test_no_room_for_the_first_ends_the_start(tmp_path: Path) -> None:
    trial = Trial(tmp_path, 2, "serves")
    trial.supervisor._command = ("/nowhere",)
    with pytest.raises(CannotStart, match="cannot start a process: No such file"):
        await trial.run()


async def test_who_is_being_replaced_is_not_missed(tmp_path: Path) -> None:
    async with Trial(tmp_path, 2, "serves", "serves", "hangs").running() as trial:
        os.kill(min(trial.pids), signal.SIGKILL)
        await trial.until(lambda: len(trial.pids) == 1)
        survey = await trial.supervisor.survey()
        assert (survey.live, survey.ready) == (True, True)
        os.kill(min(trial.pids), signal.SIGKILL)
        await trial.until(lambda: not trial.pids)
        survey = await trial.supervisor.survey()
        assert (survey.live, survey.ready) == (True, False)


async def test_what_a_dead_child_counted_stays_counted(tmp_path: Path) -> None:
    async with Trial(tmp_path, 2, "serves").running() as trial:
        for _ in range(3):
            survey = await trial.supervisor.survey()
        assert asked(survey) == 6
        first = trial.pids
        os.kill(min(first), signal.SIGKILL)
        await trial.until(lambda: len(trial.pids - first) == 1 and len(trial.pids) == 2)
        assert asked(await trial.supervisor.survey()) == 3 + 4 + 1


async def test_one_that_does_not_serve_fails_its_share(tmp_path: Path) -> None:
    async with Trial(tmp_path, 2, "serves", "is away").running() as trial:
        survey = await trial.supervisor.survey()
        assert (survey.live, survey.ready) == (True, False)


async def test_one_that_says_nothing_is_not_alive(tmp_path: Path) -> None:
    async with Trial(tmp_path, 2, "serves").running() as trial:
        frozen = min(trial.pids)
        assert asked(await trial.supervisor.survey()) == 2
        os.kill(frozen, signal.SIGSTOP)
        survey = await trial.supervisor.survey()
        assert (survey.live, survey.ready, asked(survey)) == (False, False, 3)
        os.kill(frozen, signal.SIGCONT)
        await trial.until_ready()


async def test_who_dies_while_it_is_asked_is_being_replaced(tmp_path: Path) -> None:
    async with Trial(tmp_path, 2, "serves", "serves", "hangs").running() as trial:
        dying = min(trial.pids)
        os.kill(dying, signal.SIGSTOP)
        asking = asyncio.create_task(trial.supervisor.survey())
        await asyncio.sleep(0)  # it has asked
        os.kill(dying, signal.SIGKILL)
        survey = await asking
        assert (survey.live, survey.ready) == (True, True)


async def test_a_stop_before_all_are_ready_is_a_stop(tmp_path: Path) -> None:
    trial = Trial(tmp_path, 2, "serves", "hangs")
    run = asyncio.create_task(trial.run())
    await trial.until(lambda: len(trial.pids) == 1)
    trial.supervisor.stop()
    await run
    assert trial.announced == 0
    assert trial.supervisor.drained


async def test_who_does_not_end_well_is_told_of(tmp_path: Path) -> None:
    async with Trial(tmp_path, 2, "serves", "ends badly").running() as trial:
        pass
    assert not trial.supervisor.drained


async def test_a_stop_cuts_a_pause_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "PAUSE_SECONDS", 1000.0)
    async with Trial(tmp_path, 2, "serves").running() as trial:
        os.kill(min(trial.pids), signal.SIGKILL)
        await trial.until(lambda: len(trial.pids) == 1)
        await trial.until(lambda: len(trial.supervisor._children) == 1)
    assert turns(tmp_path) == 2


def test_pauses_grow_while_children_do_not_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "PAUSE_SECONDS", 1.0)
    pauses = [0.0]
    for _ in range(7):
        pauses.append(supervisor._next_pause(pauses[-1], lived=1.0))
    assert pauses == [0, 1, 2, 4, 8, 16, 30, 30]
    assert supervisor._next_pause(30, lived=31.0) == 0


def test_a_file_of_the_working_directory_takes_no_modules_place(tmp_path: Path) -> None:
    for name in ("jobsvc", "queue", "token", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')")
    ended = subprocess.run(
        supervisor.COMMAND, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert "the wrong one" not in ended.stderr
    assert "jobsvc/bootstrap/child.py" in ended.stderr  # ours, which misses its arguments
