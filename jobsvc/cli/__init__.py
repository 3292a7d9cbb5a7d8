"""The `jobsvc` command."""

import os

# gRPC reads it when it is imported, and else writes lines of its own to stderr, of each handshake
# that fails.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from jobsvc.cli.app import main

__all__ = ["main"]
