"""Scenarios that hold any address of the service against its contract, by three clients."""
