"""Page tokens: where a list goes on, bound to what is listed."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from google.protobuf.message import Message

from jobsvc.errors import InvalidRequest, Violation
from jobsvc.rpc.signing import Signer

T = TypeVar("T")
RepeatedComposite = Any  # of messages; protobuf's own types cannot be had at run time

PAGE_SIZE = 50
PAGE_SIZE_MAX = 1_000
PAGE_BYTES_MAX = 3 * 1024 * 1024

# So many messages are made within a few milliseconds, whatever they are.
FEW = 30

# What may differ between the pages of one list.
_FREE = ("page_token", "page_size", "view")


class Pages:
    def __init__(self, signer: Signer) -> None:
        self._signer = signer

    def after(self, request: Message) -> str:
        """The key behind which this page begins; empty for the first. Raises InvalidRequest."""
        token: str = request.page_token  # type: ignore[attr-defined]
        if not token:
            return ""
        try:
            return self._signer.open(_purpose(request), token).decode()
        except ValueError:
            what = "must be the next_page_token of the page before, with the same filter"
            raise InvalidRequest([Violation("page_token", what)]) from None

    def token(self, request: Message, last: str) -> str:
        """For the page that follows the one that ended with the key `last`."""
        return self._signer.seal(_purpose(request), last.encode())


def page_size(asked: int) -> int:
    return min(asked, PAGE_SIZE_MAX) or PAGE_SIZE


def fill(place: RepeatedComposite, messages: Iterable[Message], size: int) -> bool:
    """Puts up to `size` messages where a page has them, and no more bytes than a page may have but
    one message at least. Answers whether some are left."""
    page_bytes = 0
    for message in messages:
        page_bytes += message.ByteSize()
        if len(place) == size or (place and page_bytes > PAGE_BYTES_MAX):
            return True
        place.append(message)
    return False


async def beside(count: int, make: Callable[..., T], *arguments: object) -> T:
    """What `make` makes of so many things: of many, beside the event loop."""
    if count <= FEW:
        return make(*arguments)
    return await asyncio.to_thread(make, *arguments)


def _purpose(request: Message) -> str:
    bound = type(request)()
    bound.CopyFrom(request)
    for field in _FREE:
        if field in bound.DESCRIPTOR.fields_by_name:
            bound.ClearField(field)
    digest = hashlib.sha256(bound.SerializeToString(deterministic=True)).hexdigest()
    return f"{bound.DESCRIPTOR.full_name} {digest}"
