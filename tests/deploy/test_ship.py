"""scripts/ship, against an ssh that runs on this machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.deploy.host import ROOT, SCRIPTS, Host

TARGET = "deploy@jobs.example.com"


@pytest.fixture(autouse=True)
def keys(host: Host, tmp_path: Path) -> None:
    for name in ("SSH_KEY", "SSH_KNOWN_HOSTS"):
        (tmp_path / name).write_text("given\n")
        host.environment[name] = str(tmp_path / name)


def test_it_puts_the_files_of_the_commit_on_the_host_and_deploys_there(host: Host) -> None:
    done = host.run(SCRIPTS / "ship", TARGET, "deploy", "abc123")

    assert done.returncode == 0, done.stderr
    assert host.running == "abc123"
    release = host.home / "releases" / "abc123"
    names = ("docker-compose.prod.yml", "scripts/host/deploy", "scripts/stack/postgres-start")
    for name in names:
        committed = subprocess.run(
            ["git", "show", f"HEAD:{name}"], cwd=ROOT, capture_output=True, check=True
        ).stdout
        assert (release / name).read_bytes() == committed
    assert not (release / "jobsvc").exists()


def test_it_talks_to_the_host_of_the_pinned_key_alone(host: Host) -> None:
    host.run(SCRIPTS / "ship", TARGET, "deploy", "abc123")

    calls = [line for line in host.calls() if line.startswith("ssh ")]
    assert len(calls) == 2
    for call in calls:
        assert "-o StrictHostKeyChecking=yes" in call
        assert f"-o UserKnownHostsFile={host.environment['SSH_KNOWN_HOSTS']}" in call
        assert "-o BatchMode=yes" in call


def test_it_fails_where_the_deploy_fails(deployed: Host) -> None:
    deployed.fail("abc123 * client run *")

    assert deployed.run(SCRIPTS / "ship", TARGET, "deploy", "abc123").returncode == 1
    assert deployed.running == "v1"


def test_it_fails_where_the_host_cannot_be_reached(deployed: Host) -> None:
    (deployed.fake / "unreachable").touch()

    assert deployed.run(SCRIPTS / "ship", TARGET, "deploy", "abc123").returncode != 0
    assert not (deployed.home / "releases" / "abc123").exists()


def test_it_rolls_back_on_the_host(deployed: Host) -> None:
    deployed.deploy("v2")

    assert deployed.run(SCRIPTS / "ship", TARGET, "rollback", "v1").returncode == 0
    assert deployed.running == "v1"


@pytest.mark.parametrize(
    "arguments",
    [
        ("jobs.example.com", "deploy", "v1"),
        ("-oProxyCommand=id@h", "deploy", "v1"),
        (TARGET, "deploy", "$(id)"),
        (TARGET, "deploy", "../v1"),
        (TARGET, "destroy", "v1"),
        (TARGET, "deploy"),
    ],
)
def test_it_refuses_what_it_does_not_know(deployed: Host, arguments: tuple[str, ...]) -> None:
    assert deployed.run(SCRIPTS / "ship", *arguments).returncode == 1
    assert deployed.calls() == []


@pytest.mark.parametrize("name", ["SSH_KEY", "SSH_KNOWN_HOSTS"])
def test_it_needs_both_keys(host: Host, name: str) -> None:
    Path(host.environment[name]).write_text("")

    assert host.run(SCRIPTS / "ship", TARGET, "deploy", "abc123").returncode == 1
    assert host.calls() == []


def test_images_of_one_commit_have_one_base_by_digest(host: Host) -> None:
    done = host.run(SCRIPTS / "images", "registry.example.com/jobsvc", "abc123")

    assert done.returncode == 0, done.stderr
    builds = [line for line in host.calls() if " buildx build " in line]
    for target, build in zip(("migrate", "worker", "server"), builds, strict=True):
        assert f"--target {target} --tag registry.example.com/jobsvc/{target}:abc123" in build
        assert "PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:0000" in build
        assert "--provenance mode=max --sbom true" in build


def test_images_stop_at_the_first_that_cannot_be_built(host: Host) -> None:
    host.fail("* --target worker *")

    assert host.run(SCRIPTS / "images", "registry.example.com/jobsvc", "abc123").returncode == 1
    assert not any("--target server" in line for line in host.calls())
