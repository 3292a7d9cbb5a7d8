"""jobsvc: a durable job service over gRPC with a gap-free, resumable status stream."""

from __future__ import annotations


def __getattr__(name: str) -> str:
    """`__version__`, looked up when asked for: handlers' processes, which never ask, would pay for
    the modules that know it."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("jobsvc")
    except PackageNotFoundError:  # run from a tree that was never installed
        return "0+uninstalled"
