"""What loads in a child process beside the handlers, and runs them; knows no store, no broker."""
