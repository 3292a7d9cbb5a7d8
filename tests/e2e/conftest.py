"""The whole service as a stranger sees it: real processes, real gRPC."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.handlers import Message as MessageHandler

from tests.harness import Service
from tests.harness.fixtures import brittle_broker, brittle_service, brittle_vhosts, service
from tests.services import (
    PostgresNode,
    free_port,
    fresh_database,
    machine_bin,
    vhost_url,
    wheel_bin,
)

__all__ = ["brittle_broker", "brittle_service", "brittle_vhosts", "service"]

HANDLERS = "worker.handlers,worker.handlers.demo,tests.harness.handlers"


class Mailbox(MessageHandler):  # type: ignore[misc]  # aiosmtpd has no types
    """What the mail server was given."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[object] = []

    def handle_message(self, message: object) -> None:
        self.messages.append(message)


@pytest.fixture(scope="session")
def mail_server() -> Iterator[tuple[str, Mailbox]]:
    """The URL of an SMTP server, and what it got."""
    mailbox = Mailbox()
    controller = Controller(mailbox, hostname="127.0.0.1", port=free_port())
    controller.start()
    yield f"smtp://127.0.0.1:{controller.port}", mailbox
    controller.stop()


@pytest.fixture
def mailbox(mail_server: tuple[str, Mailbox]) -> Mailbox:
    mail_server[1].messages.clear()
    return mail_server[1]


@pytest.fixture
def own_database() -> Iterator[PostgresNode]:
    """A database to kill."""
    with PostgresNode(machine_bin() or wheel_bin()) as node:
        yield node


@pytest.fixture(scope="session")
def standing(
    postgres_url: str,
    rabbitmq_url: str,
    unused_vhosts: Iterator[str],
    mail_server: tuple[str, Mailbox],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Service]:
    """A server and a worker for all tests that break neither; they log all there is to log."""
    with fresh_database(postgres_url) as database_url:
        made = Service(
            database_url,
            vhost_url(rabbitmq_url, next(unused_vhosts)),
            tmp_path_factory.mktemp("standing"),
            handlers=HANDLERS,
            smtp_url=mail_server[0],
            log_level="debug",
        )
        try:
            made.start()
            yield made
        finally:
            made.close()


@pytest.fixture
def shared(standing: Service) -> Iterator[Service]:
    """The standing service; in the end all its jobs have ended, and every history is legal."""
    before = standing.count()
    yield standing
    standing.wait_ended(before + 1, 20)
    standing.wait_idle()
    standing.check((), jobs_min=before + 1)
