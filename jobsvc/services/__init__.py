"""Use cases: what a caller or a timer sets off, over the store and the broker. No gRPC in here."""
