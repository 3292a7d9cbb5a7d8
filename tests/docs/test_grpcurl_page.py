"""Every command of docs/grpcurl.md is run, in order, and answers what the page shows."""

from __future__ import annotations

import doctest
import re
from collections.abc import Iterator

import pytest

from tests.docs.conftest import start_dev
from tests.docs.shell import SECONDS_MAX, Command, commands, run
from tests.harness.process import ROOT
from tests.services import free_port

pytestmark = pytest.mark.timeout(SECONDS_MAX + 30)

PAGE = (ROOT / "docs/grpcurl.md").read_text()
SECTIONS = list(dict.fromkeys(command.section for command in commands(PAGE)))
# What differs each time.
VARIABLE = [
    (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID"),
    (r"\d{4}-\d\d-\d\dT[0-9:.]+Z", "TIME"),
    (r'"(worker_id|trace_id|host|version|etag|\w+_token)": "[^"]*"', r'"\1": "…"'),
    (r',\s*"ready_message_count": \d+', ""),  # of jobs that have gone, for a while
    (r'"(pid|concurrency)": \d+', r'"\1": …'),
]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Command]]:
    """The whole page, as it went on a service of its own."""
    directory = tmp_path_factory.mktemp("page")
    process = start_dev(directory)
    addresses = {
        "JOBSVC": str(process.wait_ready()["address"]),
        "LOCKED": f"127.0.0.1:{free_port()}",
    }
    typed = commands(PAGE)
    for name, address in addresses.items():
        (assignment,) = [command for command in typed if command.text.startswith(f"{name}=")]
        assignment.text = f"{name}={address}"
    try:
        run(typed, directory, {"JOBSVC_METRICS_LISTEN": ""})
        yield typed
    finally:
        process.close()


@pytest.mark.parametrize("section", SECTIONS)
def test_section(session: list[Command], section: str) -> None:
    wrong = [
        f"$ {command.text}\n{command.output}--- the page shows\n{command.shown}"
        for command in session
        if command.section == section and not _agrees(command)
    ]
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


def _agrees(command: Command) -> bool:
    """`...` in what is shown stands for anything, and spaces for any."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    shown, output = _normal(command.shown), _normal(command.output)
    return doctest.OutputChecker().check_output(shown, output, flags)


def _normal(text: str) -> str:
    for pattern, name in VARIABLE:
        text = re.sub(pattern, name, text)
    return text
