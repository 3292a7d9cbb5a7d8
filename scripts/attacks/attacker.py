"""The process that attacks: it is told what as JSON, says `holding` when all has begun, hangs up
when its input is closed, and says what became of its calls."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter

from scripts.attacks.attacks import ATTACKS, Target


async def main() -> None:
    order = json.loads(sys.stdin.readline())
    target = Target(**order["target"])
    await ATTACKS[order["attack"]](target)
    print("holding", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    ended: Counter[str] = Counter(target.notes)
    for wire in target.wires:
        ended += wire.ended
    ended["open to the end"] = sum(wire.open_streams for wire in target.wires)
    for wire in target.wires:
        wire.hang_up()
    print(json.dumps(+ended), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
