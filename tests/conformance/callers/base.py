"""What a scenario calls the service through, whatever the language of the client.

Requests and answers are proto JSON with the field names of the .proto; errors are the decoded
google.rpc.Status of the trailers.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import google.rpc
import grpc

ROOT = Path(__file__).parents[3]
PROTOS = ROOT / "protos"
GOOGLE = Path(next(iter(google.rpc.__path__))).parents[1]  # has google/rpc/*.proto
# Far beyond what any scenario waits for: a call that takes so long has failed.
CALL_SECONDS_MAX = 40.0

Json = dict[str, Any]

CODES: Mapping[int, str] = {code.value[0]: code.name for code in grpc.StatusCode}
_capital = re.compile(r"(?<=[a-z])([A-Z])")


@dataclass(frozen=True)
class Reply:
    """How a call ended: `code` is the status code's name; `body` is the answer of a unary call
    that ended OK, else empty."""

    code: str
    message: str = ""
    details: Sequence[Json] = ()
    body: Json = field(default_factory=dict)

    @classmethod
    def of_status(cls, status: Json) -> Reply:
        """From a google.rpc.Status in proto JSON. Its own fields may be named in either way."""
        details = [_snake(detail) for detail in status.get("details", ())]
        return cls(CODES[status.get("code", 0)], status.get("message", ""), details)

    def detail(self, kind: str) -> Json:
        """The one detail that is a google.rpc.KIND; empty if there is none."""
        found = [each for each in self.details if each["@type"].endswith(f"/google.rpc.{kind}")]
        assert len(found) <= 1, f"{len(found)} times {kind}: {self}"
        return found[0] if found else {}

    @property
    def reason(self) -> str:
        return str(self.detail("ErrorInfo").get("reason", ""))

    @property
    def metadata(self) -> dict[str, str]:
        return dict(self.detail("ErrorInfo").get("metadata", {}))

    @property
    def fields(self) -> list[str]:
        """The paths that a BadRequest names."""
        violations = self.detail("BadRequest").get("field_violations", ())
        return [violation["field"] for violation in violations]


def _snake(detail: Json) -> Json:
    return {_capital.sub(lambda m: f"_{m[1].lower()}", key): value for key, value in detail.items()}


class Stream(ABC):
    """The messages of a server's stream, as they come. Leaving the `with` hangs up."""

    @abstractmethod
    def __next__(self) -> Json:
        """Waits for the next message; raises StopIteration once the stream has ended."""

    @abstractmethod
    def close(self) -> None:
        """Hangs up, if the stream has not ended."""

    @property
    @abstractmethod
    def reply(self) -> Reply:
        """How it ended; of a stream that has."""

    def take(self) -> Json:
        """The next message of a stream that must go on."""
        message = next(self, None)
        assert message is not None, f"the stream has ended: {self.reply}"
        return message

    def __iter__(self) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Caller(ABC):
    """One client on one address; may be shared by threads."""

    name: ClassVar[str]
    # As many calls at once as it can make without taking the machine for itself.
    crowd: ClassVar[int] = 100

    @abstractmethod
    def call(self, method: str, request: Json, token: str | None = None) -> Reply:
        """`method`: PACKAGE.SERVICE/METHOD."""

    @abstractmethod
    def stream(self, method: str, request: Json, token: str | None = None) -> Stream:
        """Opens a server's stream."""

    @abstractmethod
    def services(self) -> list[str]:
        """The names that server reflection lists."""

    @abstractmethod
    def close(self) -> None:
        """Ends whatever is still open."""
