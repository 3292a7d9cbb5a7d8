"""The law of a job's life and its value types; the standard library only."""
