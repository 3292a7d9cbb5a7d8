"""The command line of scripts/abuse."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.attacks.attacks import ATTACKS
from scripts.attacks.victim import Beside, Victim
from scripts.benchmarks.programs import Program, python

HOLD_SECONDS = 20.0
AFTER_SECONDS = 5.0
HEAD = ("attack", "MiB before", "peak", "held", "after", "p99 ms", "longest ms", "failed", "")


def main() -> None:
    arguments = _parsed()
    print(_line(HEAD))
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as directory:
            print(_line(_attacked(name, Path(directory), arguments.hold)), flush=True)


def _attacked(name: str, directory: Path, hold_seconds: float) -> list[str]:
    """On a fresh server: what an earlier attack has left behind would hide what this one takes."""
    with Victim(directory) as victim:
        target = victim.target()
        before = victim.memory
        attacker = Program(
            directory / "attacker.log", python("scripts.attacks.attacker"), piped=True
        )
        with Beside(victim, target["waiting_job_id"]) as beside:
            attacker.stdin.write(json.dumps({"attack": name, "target": target}) + "\n")
            attacker.stdin.flush()
            attacker.read_line()
            time.sleep(hold_seconds)
            held = victim.memory
            attacker.stdin.write("\n")
            attacker.stdin.flush()
            ended = json.loads(attacker.read_line())
            attacker.close()
            time.sleep(AFTER_SECONDS)
            after = victim.memory
        numbers = (before, beside.peak, held, after, beside.p99_milliseconds)
        return [
            name,
            *(f"{number:.0f}" for number in (*numbers, beside.longest_milliseconds)),
            str(beside.failures),
            ", ".join(f"{count} {how}" for how, count in ended.items()),
        ]


def _line(cells: Sequence[str]) -> str:
    first, *numbers, last = cells
    return f"{first:<22}" + "".join(f"{cell:>12}" for cell in numbers) + f"  {last}"


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/abuse", description=__doc__)
    parser.add_argument(
        "--only",
        type=_attacks,
        default=list(ATTACKS),
        help=f"attacks, with commas between, of {','.join(ATTACKS)} (default: all)",
    )
    parser.add_argument(
        "--hold",
        type=float,
        default=HOLD_SECONDS,
        metavar="SECONDS",
        help=f"how long each lasts (default: {HOLD_SECONDS:g})",
    )
    return parser.parse_args()


def _attacks(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := set(chosen) - ATTACKS.keys():
        raise argparse.ArgumentTypeError(f"no such: {', '.join(sorted(unknown))}")
    return chosen


if __name__ == "__main__":
    main()
