"""Two services, each on a database of its own, that were given the same vhost."""

from __future__ import annotations

from pathlib import Path

from tests.harness.service import Service
from tests.harness.wait import until
from tests.services import fresh_database

SAID = "give each a vhost of its own"


def test_both_say_so(service: Service, postgres_url: str, tmp_path: Path) -> None:
    with fresh_database(postgres_url) as database:
        (tmp_path / "other").mkdir()
        other = Service(database, service.broker.url, tmp_path / "other")
        try:
            for each in (service, other):
                each.start(1, 0)
            for each in (service, other):
                until(lambda each=each: SAID in each.log_text(), 20, "it says so")  # type: ignore[misc]
        finally:
            other.close()
