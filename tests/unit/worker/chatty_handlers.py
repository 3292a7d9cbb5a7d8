"""Handlers that print and log in every way there is."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from typing import Any

from worker import job

logger = logging.getLogger(__name__)


@job("t.chat")
def chat(payload: dict[str, Any]) -> None:
    """Tells `text`."""
    text = payload["text"]
    print(f"{text} printed\nand more")
    print(f"{text} 10 %\r{text} 20 %\r{text} unended", end="", flush=True)
    sys.stdout.buffer.write(f"\n{text} bytes \N{SNOWMAN}\n".encode() + b"\xff\n")
    print(f"{text} stderr", file=sys.stderr)
    logger.debug("%s debug", text)
    logger.info("%s logged", text, extra={"order": text, "token": "t0ken", "level": "mine"})
    try:
        raise KeyError(text)
    except KeyError:
        logger.exception("%s raised", text)
    warnings.warn(f"{text} warned", stacklevel=1)
    print(f"{text} last", end="")


@job("t.chat_threaded")
def chat_threaded(payload: dict[str, Any]) -> None:
    """Tells `text` from a thread of its own."""
    thread = threading.Thread(target=print, args=(payload["text"], "in a thread"))
    thread.start()
    thread.join()


@job("t.long")
def long(payload: dict[str, Any]) -> None:
    """A line of 40,000 characters."""
    print("x" * 40_000)


@job("t.quiet")
def quiet(payload: dict[str, Any]) -> None:
    """Says nothing."""


print("loading")


@job("t.secrets")
def secrets(payload: dict[str, Any]) -> None:
    try:
        raise ValueError("postgresql://u:hunter2@h/d")
    except ValueError:
        logging.getLogger("library").exception("cannot reach %s", "amqp://u:hunter2@h//")
