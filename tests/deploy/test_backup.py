"""scripts/host/backup and restore, on private PostgreSQL nodes that stand in for the container."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from jobsvc.store import migrating, schema
from jobsvc.store.database import Database
from jobsvc.store.tables import job_events, jobs
from tests.checker import check
from tests.deploy.host import SCRIPTS, Host
from tests.services import PostgresNode, machine_bin, wheel_bin
from tests.store.house import DONE, FATAL, RETRYABLE, House

JOBS = 16


class Cluster:
    """A node with the two roles and the schema, as the stack has them."""

    def __init__(self, node: PostgresNode, secrets: Path) -> None:
        self._node = node
        self.environment = {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(node.port),
            "PATH": f"{machine_bin() or wheel_bin()}:{os.environ['PATH']}",
            "SECRETS": str(secrets),
        }
        command = ["createdb", "--username=postgres", "jobsvc"]
        for run in (command, [str(SCRIPTS / "stack" / "postgres-roles")]):
            subprocess.run(run, env=os.environ | self.environment, check=True, timeout=30)
        migrator = Database(self._url("jobsvc_migrate"))
        migrating.migrate(migrator)
        migrator.close()

    def _url(self, user: str) -> str:
        return f"postgresql+psycopg2://{user}@127.0.0.1:{self._node.port}/jobsvc"

    @contextmanager
    def database(self) -> Iterator[Database]:
        """As servers and workers see it: by the role that may change no table."""
        made = Database(self._url("jobsvc"))
        try:
            yield made
        finally:
            made.close()


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("secrets")
    subprocess.run(
        [SCRIPTS / "stack-secrets", directory], check=True, timeout=30, capture_output=True
    )
    return directory


@pytest.fixture(scope="module")
def used(secrets: Path) -> Iterator[Cluster]:
    """With jobs in every state."""
    with PostgresNode(machine_bin() or wheel_bin()) as node:
        cluster = Cluster(node, secrets)
        with cluster.database() as database:
            house = House(database)
            for ending in (DONE, FATAL, RETRYABLE):
                for _ in range(JOBS // 4):
                    house.finish(house.start(), ending)
            for _ in range(JOBS // 4):
                house.cancel(house.submit())
            house.start()
            house.submit()
        yield cluster


@pytest.fixture
def fresh(secrets: Path) -> Iterator[Cluster]:
    with PostgresNode(machine_bin() or wheel_bin()) as node:
        yield Cluster(node, secrets)


def at(host: Host, cluster: Cluster) -> Host:
    """The host, its PostgreSQL container being that cluster."""
    (host.fake / "postgres").touch()
    fakes = Path(__file__).parent / "fakes"
    host.environment |= cluster.environment
    host.environment["PATH"] = f"{fakes}:{cluster.environment['PATH']}"
    return host


def back_up(host: Host) -> Path:
    done = host.host_script("backup")
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def rows(database: Database) -> tuple[list[sa.Row[tuple[object, ...]]], ...]:
    with database.engine.connect() as connection:
        by_job = (job_events.c.job_id, job_events.c.sequence)
        return (
            list(connection.execute(sa.select(jobs).order_by(jobs.c.id))),
            list(connection.execute(sa.select(job_events).order_by(*by_job))),
        )


def test_a_fresh_cluster_gets_every_job_and_event_of_a_backup(
    deployed: Host, used: Cluster, fresh: Cluster
) -> None:
    file = back_up(at(deployed, used))
    with used.database() as database:
        saved = rows(database)
    deployed.calls()

    done = at(deployed, fresh).host_script("restore", "--yes", str(file))

    assert done.returncode == 0, done.stderr
    with fresh.database() as database:
        assert rows(database) == saved
        check(database, jobs_min=JOBS)
        # It goes on from there, by the same role, as another incarnation.
        schema.require(database)
        with used.database() as original:
            assert database.read(schema.identity) != original.read(schema.identity)
        house = House(database)
        begin = house.page_after(None).end
        claimed = house.start()
        assert house.finish(claimed, DONE)
        check(database, jobs_min=JOBS + 1)
        # The numbers of transactions have begun anew, and what is new still comes last.
        page = house.page_after(begin)
        found = [(each.event.job_id, each.event.sequence) for each in page.events]
        assert found == [(claimed.job_id, n) for n in (1, 2, 3)]
        assert page.events[0].position[0] > max(event.x for event in saved[1])
    steps = [line.partition(" compose ")[2] for line in deployed.calls()]
    stop = steps.index("stop server worker")
    start = steps.index("up --detach --no-deps --no-build --wait --wait-timeout 120 server worker")
    assert stop < steps.index("run --rm --no-deps -T migrate") < start


def test_a_backup_is_checked_beside_the_database_which_stays(deployed: Host, used: Cluster) -> None:
    file = back_up(at(deployed, used))
    with used.database() as database:
        before = rows(database)

    done = deployed.host_script("restore", "--check", str(file))

    assert done.returncode == 0, done.stderr
    assert f"{JOBS + 2} jobs" in done.stderr
    assert not any("stop" in line for line in deployed.calls())
    with used.database() as database:
        assert rows(database) == before


def test_a_backup_that_lost_an_event_is_refused(deployed: Host, fresh: Cluster) -> None:
    with fresh.database() as database:
        house = House(database)
        house.finish(house.start(), DONE)
        with database.engine.begin() as connection:
            connection.execute(sa.delete(job_events).where(job_events.c.sequence == 2))
    file = back_up(at(deployed, fresh))

    for how in ("--check", "--yes"):
        done = deployed.host_script("restore", how, str(file))
        assert done.returncode == 1
        assert "1 jobs of" in done.stderr
    assert not any("stop" in line for line in deployed.calls())


def test_a_damaged_file_is_refused_before_anything_is_touched(
    deployed: Host, used: Cluster
) -> None:
    file = back_up(at(deployed, used))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    deployed.calls()

    done = deployed.host_script("restore", "--yes", str(file))

    assert done.returncode == 1
    assert "not what was backed up" in done.stderr
    assert deployed.calls() == []


def test_a_dump_that_fails_leaves_no_file(deployed: Host, used: Cluster) -> None:
    at(deployed, used).fail("* pg_dump *")

    assert deployed.host_script("backup").returncode != 0
    assert list(deployed.backups.iterdir()) == []


def test_a_backup_goes_to_the_bucket_and_old_ones_go(deployed: Host, used: Cluster) -> None:
    deployed.settings(BACKUP_BUCKET="backups", BACKUP_DAYS="3")
    deployed.backups.mkdir()
    old, young, other = (
        deployed.backups / name for name in ("jobsvc-a.dump", "jobsvc-b.dump", "letters")
    )
    for path, days in ((old, 5), (young, 2), (other, 5)):
        path.touch()
        age = path.stat().st_mtime - days * 86_400
        os.utime(path, (age, age))

    file = back_up(at(deployed, used))

    assert (deployed.fake / "bucket" / file.name).read_bytes() == file.read_bytes()
    assert (deployed.fake / "bucket" / f"{file.name}.sha256").exists()
    assert (old.exists(), young.exists(), other.exists()) == (False, True, True)


@pytest.mark.parametrize("arguments", [(), ("--yes",), ("file",), ("--yes", "nowhere.dump")])
def test_a_restore_says_what_it_needs(deployed: Host, arguments: tuple[str, ...]) -> None:
    assert deployed.host_script("restore", *arguments).returncode == 1
    assert deployed.calls() == []
