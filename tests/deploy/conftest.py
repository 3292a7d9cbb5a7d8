"""Hosts for the tests of scripts/host."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.host import Host


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """With the files of two releases, and nothing deployed."""
    made = Host(tmp_path)
    made.release("v1")
    made.release("v2")
    return made


@pytest.fixture
def deployed(host: Host) -> Host:
    """Runs v1."""
    done = host.deploy("v1")
    assert done.returncode == 0, done.stderr
    host.calls()
    return host
