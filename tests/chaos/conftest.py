"""Processes and brokers that die in the middle of the work."""

from tests.harness.fixtures import service

__all__ = ["service"]
