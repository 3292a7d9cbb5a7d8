"""The command line of scripts/bench."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from scripts.benchmarks import report
from scripts.benchmarks.nodes import Nodes
from scripts.benchmarks.orders import POLL_SECONDS
from scripts.benchmarks.peers.sides import PGBOSS, PgBoss
from scripts.benchmarks.results import Results
from scripts.benchmarks.sections import FULL, MAIN, PEERS, QUICK, Section, Stage
from scripts.benchmarks.sides import CLIENTS, WORKER_PROCESSES, Echo, Jobsvc, Side
from scripts.benchmarks.stories import STORIES

ROUNDS = 3
SECTIONS: dict[str, Section] = {**MAIN, **STORIES}
SIDES: dict[str, type[Side]] = {side.name.lower(): side for side in (Jobsvc, *PEERS, Echo)}
NOTES = f"""\
PostgreSQL with fsync. A worker has {WORKER_PROCESSES} processes. {CLIENTS} clients, but 1 where
one job comes after another. CPU in microseconds a job, an event or a page.
Celery: results in the database, publisher confirms; unconfirmed: its default, which waits for no
broker. Procrastinate and awa keep no results, pg-boss one for all jobs of a batch. All of them are
asked every {POLL_SECONDS * 1000:g} ms whether a job has ended; jobsvc tells it."""
PACKAGES = ("grpcio", "kombu", "celery", "procrastinate", "awa-pg")


def main() -> None:
    arguments = _parsed()
    rounds = arguments.rounds or (1 if arguments.quick else ROUNDS)
    results = Results()
    for turn in range(rounds):
        with Nodes(arguments.server_processes) as nodes:
            stage = Stage(
                nodes,
                QUICK if arguments.quick else FULL,
                turn,
                results,
                lambda side: side.name.lower() in arguments.sides,
            )
            for name in arguments.only:
                SECTIONS[name].run(name, stage)
                text = _report(turn + 1, arguments.server_processes, results)
                _keep(arguments.output, text, results)
    print(text)
    if results.failures:
        sys.exit("\n".join(["failed:", *results.failures]))


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it runs")
    parser.add_argument(
        "--only",
        type=_choice(SECTIONS),
        default=list(SECTIONS),
        help=f"sections, with commas between, of {','.join(SECTIONS)} (default: all)",
    )
    parser.add_argument(
        "--sides",
        type=_choice(SIDES),
        default=list(SIDES),
        help=f"of {','.join(SIDES)} (default: all)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        help=f"default: {ROUNDS}, or 1 with --quick; growth and pressure have one",
    )
    parser.add_argument(
        "--server-processes", type=int, default=1, metavar="N", help="of jobsvc server (default: 1)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("bench-results"),
        metavar="DIR",
        help="for the report, all values and the plots (default: bench-results)",
    )
    return parser.parse_args()


def _choice(known: Mapping[str, object]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = text.lower().split(",")
        if unknown := set(chosen) - known.keys():
            raise argparse.ArgumentTypeError(f"no such: {', '.join(sorted(unknown))}")
        return chosen

    return parse


def _report(rounds: int, server_processes: int, results: Results) -> str:
    """As far as the run has come."""
    conditions = _conditions(rounds, server_processes)
    return "\n\n".join([conditions, report.render(results), report.render_aims(results)])


def _conditions(rounds: int, server_processes: int) -> str:
    load, python = os.getloadavg()[0], platform.python_version()
    lines = [
        f"{os.cpu_count()} cores, load {load:.1f} at the end, Python {python}, {_versions()}.",
        f"Median of {rounds} rounds (lowest-highest), {server_processes} server processes.",
        NOTES,
    ]
    lines += [
        f"Not measured: {side.name}, for lack of {missing}."
        for side in PEERS
        if (missing := side.missing())
    ]
    return "\n".join(lines)


def _versions() -> str:
    versions = []
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    if not PgBoss.missing():
        package = json.loads((PGBOSS / "package.json").read_text())
        versions.append(f"pg-boss {package['dependencies']['pg-boss']}")
    return ", ".join(versions)


def _keep(directory: Path, text: str, results: Results) -> None:
    from scripts.benchmarks import plots  # loads what takes a second

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.txt").write_text(text + "\n")
    (directory / "results.json").write_text(json.dumps(results.as_json()))
    plots.draw(results, directory)


if __name__ == "__main__":
    main()
