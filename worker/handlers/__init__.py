"""The handlers that come with the service; importing this package registers the standard ones."""

from worker.handlers import standard

__all__ = ["standard"]
