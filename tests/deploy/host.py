"""A host as scripts/host see it: directories of a test; docker, aws and ssh on PATH are fakes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAKES = Path(__file__).parent / "fakes"
SCRIPTS = ROOT / "scripts"
RUN_SECONDS_MAX = 30.0


class Host:
    def __init__(self, directory: Path) -> None:
        self.home = directory / "home"
        self.etc = directory / "etc"
        self.backups = directory / "backups"
        self.fake = directory / "fake"
        self.environment: dict[str, str] = {}
        for path in (self.home / "releases", self.etc, self.fake / "bucket"):
            path.mkdir(parents=True)
        (self.fake / "fail").touch()
        (self.fake / "log").touch()
        self.settings(JOBSVC_REGISTRY="registry.example.com/jobsvc")

    def settings(self, **values: str) -> None:
        """Writes stack.env anew."""
        self.secrets = self.etc / "secrets"
        values = {"JOBSVC_HOST": "jobs.example.com", "JOBSVC_SECRETS": str(self.secrets)} | values
        lines = [f"{name}={value}\n" for name, value in values.items()]
        (self.etc / "stack.env").write_text("".join(lines))

    def release(self, tag: str) -> None:
        """Its files, as scripts/ship would have put them there: those of this working copy."""
        directory = self.home / "releases" / tag
        directory.mkdir()
        for name in ("docker-compose.yml", "docker-compose.prod.yml", "scripts"):
            (directory / name).symlink_to(ROOT / name)

    def run(
        self, script: Path, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("JOBSVC_")}
        return subprocess.run(
            [script, *arguments],
            env={
                **inherited,
                "PATH": f"{FAKES}:{os.environ['PATH']}",
                "FAKE": str(self.fake),
                "JOBSVC_HOME": str(self.home),
                "JOBSVC_ETC": str(self.etc),
                "JOBSVC_BACKUPS": str(self.backups),
                **self.environment,
                **(environment or {}),
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS_MAX,
            check=False,
        )

    def host_script(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(SCRIPTS / "host" / name, *arguments)

    def deploy(self, tag: str) -> subprocess.CompletedProcess[str]:
        return self.host_script("deploy", tag)

    def fail(self, *patterns: str) -> None:
        """From now on docker fails at calls, "RELEASE ARGUMENTS", that match any pattern."""
        (self.fake / "fail").write_text("".join(f"{pattern}\n" for pattern in patterns))

    def calls(self) -> list[str]:
        """What docker, aws and ssh were asked since the last time, in order."""
        log = self.fake / "log"
        lines = log.read_text().splitlines()
        log.write_text("")
        return lines

    @property
    def running(self) -> str:
        """The release that servers and workers are of."""
        path = self.fake / "running"
        return path.read_text() if path.exists() else ""

    def link(self, name: str) -> str | None:
        path = self.home / name
        return path.readlink().name if path.is_symlink() else None
