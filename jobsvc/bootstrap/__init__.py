"""Composition roots: each builds one kind of process from its settings and runs it to its end."""
