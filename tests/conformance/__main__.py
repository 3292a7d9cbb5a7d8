"""`python -m tests.conformance --address HOST:PORT --client python|node|grpcurl`: plays the
scenarios against a service, over plaintext; exits with 1 if one failed.

The workers of that service are to have the handlers `worker.handlers` and `worker.handlers.demo`,
and to serve `default` and some queues whose names begin with `conformance.`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.conformance.callers import CALLERS, install
from tests.conformance.runner import load, look, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--address", default="127.0.0.1:50051", metavar="HOST:PORT")
    parser.add_argument("--client", choices=CALLERS, default="python")
    parser.add_argument(
        "--token-file",
        type=Path,
        help="a token of the scope admin; or a line `SCOPE TOKEN` for each of admin, submit, "
        "read and cancel",
    )
    parser.add_argument("-k", dest="pattern", default="", help="only names that hold this")
    options = parser.parse_args()
    tokens = _tokens(options.token_file) if options.token_file else {}
    try:
        home = look(options.address, tokens)
        if options.client == "node":
            install()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    caller = CALLERS[options.client](options.address)
    chosen = [each for each in load() if options.pattern in each.name]
    failed = 0
    for outcome in run(caller, home, chosen):
        if outcome.skipped:
            print(f"skipped  {outcome.name}: {outcome.skipped}")
            continue
        print(f"{'FAILED' if outcome.failure else 'ok':7}  {outcome.name} {outcome.seconds:.2f} s")
        if outcome.failure:
            failed += 1
            print(outcome.failure)
    caller.close()
    print(f"{failed} of {len(chosen)} failed")
    return 1 if failed else 0


def _tokens(path: Path) -> dict[str, str]:
    """By scope."""
    lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    return {words[0] if len(words) > 1 else "admin": words[-1] for words in lines}


if __name__ == "__main__":
    sys.exit(main())
