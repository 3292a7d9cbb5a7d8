"""Does what the one argument orders, an Order as JSON."""

from __future__ import annotations

import json
import sys
from importlib import import_module

from scripts.benchmarks.orders import Order

if __name__ == "__main__":
    order = Order(**json.loads(sys.argv[1]))
    import_module(f"scripts.benchmarks.clients.{order.side}").main(order)
