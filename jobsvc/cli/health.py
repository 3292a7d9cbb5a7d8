"""The health of a process by its probes over HTTP.

Containers ask every few seconds, so that this imports next to nothing: with the rest of the command
line a question costs half a second of CPU.
"""

from __future__ import annotations

import http.client
from contextlib import closing

HEALTH_SECONDS_MAX = 3.0
SERVING = "SERVING"


class BadURL(ValueError):
    """Not of the form http://HOST:PORT/PATH."""


def ask(url: str) -> str:
    """`SERVING`, or what is in the way. A URL without a path is asked for /livez. Raises BadURL."""
    scheme, separator, rest = url.partition("://")
    authority, _, path = rest.partition("/")
    if not separator or scheme not in {"http", "https"}:
        raise BadURL("not an http:// or https:// URL")
    try:
        if scheme == "http":
            connection = http.client.HTTPConnection(authority, timeout=HEALTH_SECONDS_MAX)
        else:
            connection = http.client.HTTPSConnection(authority, timeout=HEALTH_SECONDS_MAX)
        with closing(connection):
            connection.request("GET", f"/{path or 'livez'}")
            answer = connection.getresponse()
    except http.client.InvalidURL as error:
        raise BadURL(str(error)) from None
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    return SERVING if answer.status == 200 else f"{answer.status} {answer.reason}"
