"""Finds the scenarios, runs them side by side, and tells how each ended."""

from __future__ import annotations

import queue
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules

from tests.conformance import scenarios
from tests.conformance.callers import Caller, PythonCaller
from tests.conformance.scene import METHODS, Scene

THREADS = 8
# A worker of the service under test is to serve some queues of such a name.
QUEUE_PREFIX = "conformance."


@dataclass(frozen=True, slots=True)
class Scenario:
    """`needs`: what not every service has: `queue`, one that is served and nobody else's;
    `tokens`, one of each scope; `open`, that there are none. `alone`: it takes the workers for
    itself, for a moment."""

    name: str
    play: Callable[[Scene], None]
    needs: str
    alone: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """`failure`: the traceback, empty if there is none. `skipped`: why it was not played."""

    name: str
    seconds: float = 0.0
    failure: str = ""
    skipped: str = ""


@dataclass(frozen=True, slots=True)
class Home:
    """A service under test. `tokens`: by scope, empty if it has none; `queues`: see Scene."""

    address: str
    tokens: Mapping[str, str]
    queues: tuple[str, ...]

    def lacks(self, scenario: Scenario) -> str:
        """What the scenario needs and this has not."""
        match scenario.needs:
            case "queue" if not self.queues:
                return f"no worker serves a queue whose name begins with {QUEUE_PREFIX}"
            case "tokens" if not {"admin", "submit", "read", "cancel"} <= self.tokens.keys():
                return "not a token of each scope"
            case "open" if self.tokens:
                return "the service has tokens"
        return ""


def load() -> list[Scenario]:
    """Every scenario, by module and in the order of the source."""
    found = []
    for info in iter_modules(scenarios.__path__):
        module = import_module(f"{scenarios.__name__}.{info.name}")
        for name, value in vars(module).items():
            if callable(value) and getattr(value, "__module__", "") == module.__name__:
                marks = getattr(value, scenarios.MARKS, None)
                if marks is not None:
                    found.append(Scenario(f"{info.name}.{name}", value, **marks))
    return found


def run(caller: Caller, home: Home, chosen: Iterable[Scenario]) -> Iterator[Outcome]:
    """Plays them, as they come to an end; those that are to be alone come last."""
    queues: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in home.queues:
        queues.put(name)
    cleaner = PythonCaller(home.address)

    def play(scenario: Scenario) -> Outcome:
        if lack := home.lacks(scenario):
            return Outcome(scenario.name, skipped=lack)
        scene = Scene(caller, home.tokens, queues)
        start = time.monotonic()
        failure = ""
        try:
            with _cleaned(scene, cleaner):
                scenario.play(scene)
        except Exception:  # noqa: BLE001 - all that a scenario can end with is its outcome
            failure = traceback.format_exc()
        return Outcome(scenario.name, time.monotonic() - start, failure)

    chosen = list(chosen)
    together = [each for each in chosen if not each.alone]
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(play, together)
    yield from map(play, (each for each in chosen if each.alone))
    cleaner.close()


@contextmanager
def _cleaned(scene: Scene, cleaner: Caller) -> Iterator[None]:
    """Leaves nothing active behind."""
    try:
        yield
    finally:
        admin = scene.tokens.get("admin")
        for job_id in scene.job_ids:
            cleaner.call(METHODS["CancelJob"][0], {"job_id": job_id}, admin)
        for schedule_id in scene.schedule_ids:
            cleaner.call(METHODS["DeleteSchedule"][0], {"schedule_id": schedule_id}, admin)


def look(address: str, tokens: Mapping[str, str]) -> Home:
    """The service at an address, with the queues for scenarios that its live workers serve. Raises
    RuntimeError where none answers."""
    caller = PythonCaller(address)
    try:
        health = caller.call("grpc.health.v1.Health/Check", {})
        if health.code != "OK":
            raise RuntimeError(f"no service at {address}: {health.code} {health.message}")
        request = {"page_size": 1000}
        reply = caller.call(METHODS["ListWorkers"][0], request, tokens.get("admin"))
    finally:
        caller.close()
    served = {name for worker in reply.body.get("workers", ()) for name in worker["queues"]}
    return Home(address, tokens, tuple(sorted(n for n in served if n.startswith(QUEUE_PREFIX))))
