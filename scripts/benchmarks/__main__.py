"""The command line of scripts/bench."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections import defaultdict
from importlib.metadata import version

from scripts.benchmarks import report
from scripts.benchmarks.load import CELERY_POLL_SECONDS
from scripts.benchmarks.sections import FULL, QUICK, SECTIONS, Effort, measure
from scripts.benchmarks.sides import CLIENTS, WORKER_PROCESSES, Nodes

ROUNDS = 3

Values = defaultdict[str, defaultdict[str, list[float]]]


class Results:
    """Of all rounds so far."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.values: Values = defaultdict(lambda: defaultdict(list))
        self.cpu: defaultdict[str, Values] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(list))
        )

    def add_round(self, sections: list[str], effort: Effort, turn: int) -> None:
        """On new nodes. `turn` decides who goes first: nobody always has the younger ones."""
        with Nodes() as nodes:
            for name in sections:
                sides = SECTIONS[name][1]
                first = turn % len(sides)
                for side in (*sides[first:], *sides[:first]):
                    what = f"round {turn + 1}: {name}, {side.name}"
                    print(what, file=sys.stderr, flush=True)
                    try:
                        found = measure(name, side, nodes, effort)
                    except AssertionError as error:  # what was measured before is worth showing
                        self.failures.append(f"{what}: {error}")
                        continue
                    for key, value in found.values.items():
                        self.values[key][side.name].append(value)
                    for phase, parts in found.cpu.items():
                        for part, micros in parts.items():
                            self.cpu[phase][side.name][part].append(micros)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it runs")
    parser.add_argument("--only", help=f"of {','.join(SECTIONS)}: these, with commas between")
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS}, or 1 with --quick")
    arguments = parser.parse_args()
    sections = arguments.only.split(",") if arguments.only else list(SECTIONS)
    if unknown := set(sections) - SECTIONS.keys():
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    rounds = arguments.rounds or (1 if arguments.quick else ROUNDS)
    results = Results()
    for turn in range(rounds):
        results.add_round(sections, QUICK if arguments.quick else FULL, turn)
    print(_conditions(rounds), report.render(results.values), sep="\n\n")
    if results.cpu:
        print("", report.render_cpu(results.cpu), sep="\n")
    if results.failures:
        sys.exit("\n".join(["failed:", *results.failures]))


def _conditions(rounds: int) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("celery", "grpcio", "kombu"))
    return (
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end, "
        f"Python {platform.python_version()}, {versions}.\n"
        f"Median of {rounds} rounds (lowest-highest); {WORKER_PROCESSES} worker processes, "
        f"{CLIENTS} client processes at 64 in flight and in bulk; PostgreSQL with fsync.\n"
        "Celery: publisher confirms; unconfirmed: its default, which waits for no broker. Its "
        f"results are asked for every {CELERY_POLL_SECONDS * 1000:g} ms (default: 500)."
    )


if __name__ == "__main__":
    main()
