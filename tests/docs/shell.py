"""Where the virtual environment's commands are."""

from __future__ import annotations

import sys
from pathlib import Path

BIN = Path(sys.executable).parent
