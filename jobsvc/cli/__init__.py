"""The `jobsvc` command."""

import os
import sys

# gRPC reads it when it is imported, and else writes lines of its own to stderr, of each handshake
# that fails.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


def main() -> None:
    if sys.argv[1:3] == ["healthcheck", "--url"] and len(sys.argv) == 4:
        _healthcheck(sys.argv[3])
    from jobsvc.cli.app import main

    main()


def _healthcheck(url: str) -> None:
    """As the command of that name, without importing the others; what it cannot do is theirs."""
    from jobsvc.cli import health

    try:
        found = health.ask(url)
    except health.BadURL:
        return
    sys.stderr.write(f"{found}\n")
    sys.exit(0 if found == health.SERVING else 1)
