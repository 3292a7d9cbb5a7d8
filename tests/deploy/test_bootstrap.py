"""scripts/host/bootstrap, with fakes of all that changes a machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.host import FAKES, SCRIPTS, Host

COMMANDS = ("apt-get", "apt-cache", "systemctl", "useradd", "usermod", "chown", "id")
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHx1 deploy"
ARGUMENTS = {
    "--host": "jobs.example.com",
    "--registry": "registry.example.com/jobsvc",
    "--deploy-key": KEY,
}


@pytest.fixture
def machine(host: Host, tmp_path: Path) -> Host:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in COMMANDS:
        (programs / name).symlink_to(FAKES / "system")
    make_nproc(programs, 1)
    for name in ("UNITS", "APT_CONF", "DEPLOY_HOME"):
        (tmp_path / name).mkdir()
        host.environment[name] = str(tmp_path / name)
    host.environment["PATH"] = f"{programs}:{FAKES}:/usr/local/bin:/usr/bin:/bin"
    (host.etc / "stack.env").unlink()
    return host


def make_nproc(programs: Path, cores: int) -> None:
    program = programs / "nproc"
    program.write_text(f"#!/bin/sh\necho {cores}\n")
    program.chmod(0o755)


def bootstrap(machine: Host, **changed: str) -> int:
    words = [word for pair in (ARGUMENTS | changed).items() for word in pair if word]
    done = machine.run(SCRIPTS / "host" / "bootstrap", *words)
    return done.returncode


def files(directory: Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in directory.rglob("*") if path.is_file()}


def test_it_makes_a_host_ready_for_a_deploy(machine: Host, tmp_path: Path) -> None:
    assert bootstrap(machine) == 0

    calls = machine.calls()
    assert any(
        line.startswith("apt-get -qq install") and "docker.io docker-buildx" in line
        for line in calls
    )
    assert "usermod --append --groups docker deploy" in calls
    assert "systemctl enable --now jobsvc-backup.timer jobsvc-backup-check.timer" in calls
    keys = (tmp_path / "DEPLOY_HOME/.ssh/authorized_keys").read_text()
    assert keys == f"restrict {KEY}\n"
    environment = (machine.etc / "stack.env").read_text()
    assert "JOBSVC_HOST=jobs.example.com\n" in environment
    assert f"JOBSVC_SECRETS={machine.secrets}\n" in environment
    assert "JOBSVC_PROCESSES=1\nJOBSVC_SERVER_MEMORY=512m\n" in environment
    assert (machine.secrets / "database_url").exists()
    units = files(tmp_path / "UNITS")
    assert len(units) == 4
    assert not any("@" in text for text in units.values())
    assert machine.deploy("v1").returncode == 0


@pytest.mark.parametrize(("cores", "processes"), [(2, 2), (4, 4), (32, 4)])
def test_the_server_gets_a_process_a_core_and_memory_for_them(
    machine: Host, tmp_path: Path, cores: int, processes: int
) -> None:
    make_nproc(tmp_path / "programs", cores)
    assert bootstrap(machine) == 0
    environment = (machine.etc / "stack.env").read_text()
    assert f"JOBSVC_PROCESSES={processes}\n" in environment
    assert f"JOBSVC_SERVER_MEMORY={256 + 256 * processes}m\n" in environment


def test_running_it_again_changes_no_secret_and_no_setting(machine: Host) -> None:
    bootstrap(machine)
    (machine.etc / "stack.env").write_text("JOBSVC_HOST=changed.example.com\n")
    before = files(machine.etc)
    machine.calls()

    assert bootstrap(machine) == 0

    assert files(machine.etc) == before
    assert not any(line.startswith("useradd") for line in machine.calls())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--host", ""),
        ("--host", "a|b"),
        ("--registry", "$(id)"),
        ("--deploy-key", "/root/.ssh/id_ed25519.pub"),
        ("--deploy-key", ""),
    ],
)
def test_it_changes_nothing_where_it_is_told_nonsense(
    machine: Host, option: str, value: str
) -> None:
    assert bootstrap(machine, **{option: value}) == 1
    assert [line for line in machine.calls() if not line.startswith("id ")] == []
