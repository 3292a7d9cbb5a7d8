"""A running `jobsvc dev` for what the pages in docs/ say."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Process
from tests.harness.process import ROOT
from tests.harness.service import SETTINGS


def start_dev(directory: Path, listen: str = "127.0.0.1:0") -> Process:
    """The caller's to close."""
    arguments = ["dev", "--data-dir", str(directory / "data"), "--listen", listen]
    return Process("dev", arguments, SETTINGS, directory)


@pytest.fixture(scope="session")
def dev_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a service that tests share, each minding its own jobs."""
    process = start_dev(tmp_path_factory.mktemp("dev"))
    try:
        yield process.wait_ready()["address"]
    finally:
        process.close()


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what scripts/protoset makes."""
    directory = tmp_path_factory.mktemp("released")
    subprocess.run([ROOT / "scripts/protoset", directory], check=True)
    return directory
