"""jobsvc: a durable job service over gRPC with a gap-free, resumable status stream."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("jobsvc")
except PackageNotFoundError:  # run from a tree that was never installed
    __version__ = "0+uninstalled"
