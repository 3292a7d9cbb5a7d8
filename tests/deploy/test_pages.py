"""What docs/ tell operators to type, and scripts/dev, do what they are there for."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.deploy.host import ROOT, Host


def first_block(page: str) -> str:
    found = re.search(r"```sh\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def test_the_abbreviation_follows_a_deploy(deployed: Host, tmp_path: Path) -> None:
    """Also in a shell that was there before it."""
    shell = first_block("operate.md").replace("/opt/jobsvc", str(deployed.home))
    shell += f"stack ps\nln -sfn releases/v9 {deployed.home}/current\nstack ps\n"
    script = tmp_path / "shell"
    script.write_text(f"#!/usr/bin/env bash\nset -eu\n{shell}")
    script.chmod(0o755)
    deployed.calls()
    done = deployed.run(script)
    assert done.returncode == 0, done.stderr
    assert deployed.calls() == ["v1 compose ps", "v9 compose ps"]


def test_the_pages_forward_no_port_with_the_key_of_deploys() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert not re.search(r"ssh -L[^`]*deploy@", page.read_text()), page.name


def test_the_pages_install_no_package_of_somebody_else() -> None:
    """The name on the package index is not this project's."""
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        assert not re.search(r"pip install ['\"]?jobsvc\b", page.read_text()), page.name


def test_a_worker_of_ones_own_takes_the_place_of_ours() -> None:
    compose: list[str | Path] = [Path(sys.executable).with_name("docker-compose"), "--env-file"]
    compose += [ROOT / "scripts/host/stack.env.template", "-f", ROOT / "docker-compose.yml"]
    compose += ["-f", ROOT / "docker-compose.prod.yml", "config", "--images"]
    environ = os.environ | {"JOBSVC_REGISTRY": "r/jobsvc", "JOBSVC_TAG": "v1"}

    def images(**changed: str) -> set[str]:
        done = subprocess.run(
            compose, env=environ | changed, text=True, capture_output=True, check=True
        )
        return {image for image in done.stdout.split() if image.endswith(":v1")}

    ours = {"r/jobsvc/migrate:v1", "r/jobsvc/server:v1"}
    assert images() == ours | {"r/jobsvc/worker:v1"}
    assert images(JOBSVC_WORKER_IMAGE="r/shop") == ours | {"r/shop:v1"}


def test_dev_leaves_relative_paths_to_where_its_caller_stands(tmp_path: Path) -> None:
    copy, here = tmp_path / "copy", tmp_path / "here"
    programs = copy / ".venv/bin"
    for directory in (programs, copy / "scripts", here):
        directory.mkdir(parents=True)
    for name in ("dev", "lib.sh"):
        shutil.copy(ROOT / "scripts" / name, copy / "scripts" / name)
    (programs / "python").symlink_to(sys.executable)
    (programs / "jobsvc").write_text('#!/bin/sh\necho "$PWD $PYTHONPATH $*"\n')
    (programs / "jobsvc").chmod(0o755)
    lock = b"nothing\n"
    for name in ("requirements.lock", "pyproject.toml"):
        (copy / name).write_bytes(lock)
    # As ensure_venv leaves it, so that nothing is installed here.
    stamp = copy / ".venv/requirements.lock.installed"
    stamp.write_text(hashlib.sha256(2 * lock).hexdigest() + "\n")
    done = subprocess.run(
        [copy / "scripts/dev", "--handlers", "shop"],
        cwd=here,
        env=os.environ | {"PYTHONPATH": "."},
        text=True,
        capture_output=True,
        check=True,
    )
    assert done.stdout == f"{here} . dev --data-dir {copy}/.jobsvc --handlers shop\n"
