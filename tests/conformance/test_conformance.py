"""Each scenario, against each home, through each client.

All scenarios of one home and client are played at once, side by side, when the first of them is
asked for; each test then looks up how its own one ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from tests.conformance.callers import CALLERS, install
from tests.conformance.runner import Home, Outcome, Scenario, load, run

PASS_SECONDS_MAX = 600  # a pass takes seconds, but for one on a machine without any to spare
# By home: the need that it does not meet, by design.
HOMES: Mapping[str, str] = {"postgresql": "open", "dev": "tokens"}
CASES = [
    pytest.param(home, client, scenario, id=f"{home}-{client}-{scenario.name}")
    for home, lacks in HOMES.items()
    for client in CALLERS
    for scenario in load()
    if scenario.needs != lacks
]

Play = Callable[[str, str], Mapping[str, Outcome]]


@pytest.fixture(scope="session")
def node_client() -> None:
    install()


@pytest.fixture(scope="session")
def play(request: pytest.FixtureRequest) -> Play:
    """Plays what was chosen of a home and a client, once; the outcomes by name."""
    played: dict[tuple[str, str], Mapping[str, Outcome]] = {}

    def outcomes(home_name: str, client: str) -> Mapping[str, Outcome]:
        if (home_name, client) not in played:
            if client == "node":
                request.getfixturevalue("node_client")
            home: Home = request.getfixturevalue(f"{home_name}_home")
            caller = CALLERS[client](home.address)
            chosen = _chosen(request.session.items, home_name, client)
            try:
                found = {outcome.name: outcome for outcome in run(caller, home, chosen)}
            finally:
                caller.close()
            played[home_name, client] = found
        return played[home_name, client]

    return outcomes


def _chosen(items: list[pytest.Item], home: str, client: str) -> list[Scenario]:
    """The scenarios that this run of pytest is to tell of."""
    found: list[Scenario] = []
    for item in items:
        if isinstance(item, pytest.Function) and item.originalname == "test_scenario":
            params = item.callspec.params
            if (params["home"], params["client"]) == (home, client):
                scenario = params["scenario"]
                assert isinstance(scenario, Scenario)
                found.append(scenario)
    return found


@pytest.mark.timeout(PASS_SECONDS_MAX)
@pytest.mark.parametrize(("home", "client", "scenario"), CASES)
def test_scenario(home: str, client: str, scenario: Scenario, play: Play) -> None:
    outcome = play(home, client)[scenario.name]
    assert not outcome.skipped, outcome.skipped
    assert not outcome.failure, outcome.failure
