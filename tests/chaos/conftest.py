"""Processes and brokers that die in the middle of the work."""

from tests.harness.fixtures import brittle_broker, brittle_service, brittle_vhosts, service

__all__ = ["brittle_broker", "brittle_service", "brittle_vhosts", "service"]
