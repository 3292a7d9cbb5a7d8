"""The `jobsvc` command."""

from jobsvc.cli.app import main

__all__ = ["main"]
