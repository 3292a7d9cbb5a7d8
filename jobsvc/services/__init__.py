"""The use cases. They know no transport: rpc calls them, and they raise jobsvc.errors."""
