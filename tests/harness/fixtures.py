"""Fixtures for the tests that start processes; their conftest imports them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.service import Service


@pytest.fixture
def service(database_url: str, broker_url: str, tmp_path: Path) -> Iterator[Service]:
    """On a database and a vhost of its own; nothing is started yet."""
    made = Service(database_url, broker_url, tmp_path)
    yield made
    made.close()
