"""Clients in processes of their own: `python -m scripts.benchmarks.clients ORDER`."""
