"""scripts/host/deploy and rollback, step by step and with every step failing."""

from __future__ import annotations

import fcntl

import pytest

from tests.deploy.host import Host

MIGRATE = "run --rm --no-deps -T migrate"
HEALTH = "run --rm --no-deps -T client healthcheck"
ECHO = "run --rm --no-deps -T client run demo.echo"


def steps(host: Host) -> list[str]:
    """The calls of Compose, without what is said in all of them."""
    return [line.replace(" compose", "", 1) for line in host.calls() if " compose " in line]


def test_the_first_deploy_takes_every_step_in_order(host: Host) -> None:
    done = host.deploy("v1")

    assert done.returncode == 0, done.stderr
    assert steps(host) == [
        "v1 pull --quiet migrate server worker",
        "v1 up --detach --no-build --wait --wait-timeout 180 postgres rabbitmq",
        f"v1 {MIGRATE}",
        "v1 up --detach --no-deps --no-build --wait --wait-timeout 120 server worker",
        f"v1 {HEALTH}",
        f'v1 {ECHO} {{"release": "v1"}} --output json',
    ]
    assert (host.link("current"), host.link("previous")) == ("v1", None)


def test_a_second_deploy_remembers_the_one_before(deployed: Host) -> None:
    assert deployed.deploy("v2").returncode == 0
    assert (deployed.running, deployed.link("current"), deployed.link("previous")) == (
        "v2",
        "v2",
        "v1",
    )


def test_a_deploy_of_what_runs_keeps_the_way_back(deployed: Host) -> None:
    deployed.deploy("v2")

    assert deployed.deploy("v2").returncode == 0
    assert (deployed.link("current"), deployed.link("previous")) == ("v2", "v1")


@pytest.mark.parametrize("step", ["up * rabbitmq", MIGRATE, "up * worker", HEALTH, f"{ECHO} *"])
def test_where_a_step_fails_the_old_release_runs_again(deployed: Host, step: str) -> None:
    deployed.fail(f"v2 compose {step}")

    done = deployed.deploy("v2")

    assert done.returncode == 1
    assert "v1 runs again; v2 did not pass" in done.stderr
    assert deployed.running == "v1"
    assert (deployed.link("current"), deployed.link("previous")) == ("v1", None)
    assert steps(deployed)[-3:] == [
        "v1 up --detach --no-deps --no-build --wait --wait-timeout 120 server worker",
        f"v1 {HEALTH}",
        f'v1 {ECHO} {{"release": "v1"}} --output json',
    ]


def test_a_release_that_cannot_be_pulled_touches_nothing(deployed: Host) -> None:
    deployed.fail("v2 compose pull *")

    done = deployed.deploy("v2")

    assert done.returncode == 1
    assert "what ran runs on" in done.stderr
    assert steps(deployed) == ["v2 pull --quiet migrate server worker"]
    assert deployed.link("current") == "v1"


def test_where_the_old_release_fails_too_it_says_so_loudly(deployed: Host) -> None:
    deployed.fail("* client healthcheck")

    done = deployed.deploy("v2")

    assert done.returncode == 2
    assert "NOTHING MAY BE SERVING" in done.stderr


def test_a_first_deploy_that_fails_leaves_no_release_to_go_back_to(host: Host) -> None:
    host.fail("* client run *")

    done = host.deploy("v1")

    assert done.returncode == 1
    assert "there was no release before it" in done.stderr
    assert host.link("current") is None


def test_it_logs_in_to_ecr_with_the_role_of_the_machine(host: Host) -> None:
    registry = "123456789012.dkr.ecr.eu-central-1.amazonaws.com"
    host.settings(JOBSVC_REGISTRY=f"{registry}/jobsvc")

    assert host.deploy("v1").returncode == 0
    assert sorted(host.calls()[:2]) == [  # two ends of a pipe
        "aws ecr get-login-password --region eu-central-1",
        f"v1 login --username AWS --password-stdin {registry}",
    ]
    assert (host.fake / "login").read_text() == "password-of-the-registry"


def test_two_deploys_do_not_mix(deployed: Host) -> None:
    with (deployed.home / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = deployed.deploy("v2")

    assert done.returncode == 1
    assert "under way" in done.stderr
    assert deployed.calls() == []


@pytest.mark.parametrize("tag", ["", "../v1", "-v1", "v1;id", "v3"])
def test_it_refuses_what_is_no_release_here(deployed: Host, tag: str) -> None:
    assert deployed.deploy(tag).returncode == 1
    assert deployed.calls() == []
    assert deployed.link("current") == "v1"


def test_it_keeps_the_newest_releases_and_the_two_in_use(host: Host) -> None:
    host.deploy("v1")
    for number in range(3, 12):
        host.release(f"v{number}")
    host.deploy("v2")

    kept = {path.name for path in (host.home / "releases").iterdir()}
    assert {"v1", "v2"} <= kept
    assert len(kept) <= 6


def test_rollback_goes_back_and_forth(deployed: Host) -> None:
    deployed.deploy("v2")
    deployed.calls()

    assert deployed.host_script("rollback").returncode == 0
    assert (deployed.running, deployed.link("current"), deployed.link("previous")) == (
        "v1",
        "v1",
        "v2",
    )
    assert not any("migrate" in step and " run " in step for step in steps(deployed))

    assert deployed.host_script("rollback", "v2").returncode == 0
    assert deployed.running == "v2"


@pytest.mark.parametrize("step", ["v1 compose pull *", "v1 compose up *", "v1 * client run *"])
def test_a_rollback_that_fails_leaves_the_current_release(deployed: Host, step: str) -> None:
    deployed.deploy("v2")
    deployed.fail(step)

    done = deployed.host_script("rollback")

    assert done.returncode == 1
    assert (deployed.running, deployed.link("current")) == ("v2", "v2")


def test_rollback_says_where_there_is_nothing_to_go_back_to(deployed: Host) -> None:
    done = deployed.host_script("rollback")

    assert done.returncode == 1
    assert "there is no release before this one" in done.stderr
    assert deployed.calls() == []
