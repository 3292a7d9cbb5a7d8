"""Who may call what: by default nobody, as soon as there are tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from jobsvc.errors import JobsvcError, ScopeMissing, Unauthenticated
from jobsvc.files import Followed
from jobsvc.tokens import ANONYMOUS, Token, Tokens, parse_tokens, read_tokens

FOLLOW_SECONDS = 0.5

_SUBMIT = frozenset({"submit"})
_READ = frozenset({"read"})
_CANCEL = frozenset({"cancel"})
_ADMIN = frozenset({"admin"})

# The scopes that a call needs, all of them. What is not here needs `admin`, which allows all.
NEEDED: Mapping[str, frozenset[str]] = {
    "JobService/SubmitJob": _SUBMIT,
    "JobService/SubmitJobs": _SUBMIT,
    "JobService/RunJob": _SUBMIT | _READ,
    "JobService/GetJob": _READ,
    "JobService/GetResult": _READ,
    "JobService/WatchJob": _READ,
    "JobService/ListJobEvents": _READ,
    "JobService/ListJobs": _READ,
    "JobService/WatchJobs": _READ,
    "JobService/CancelJob": _CANCEL,
    "JobService/RetryJob": _SUBMIT,
    "JobService/UpdateJob": _SUBMIT,
    "JobService/DeleteJob": _ADMIN,
    "JobService/ExplainJob": _READ,
    "JobService/ListJobTypes": _READ,
    "ScheduleService/CreateSchedule": _ADMIN,
    "ScheduleService/GetSchedule": _ADMIN,
    "ScheduleService/ListSchedules": _ADMIN,
    "ScheduleService/UpdateSchedule": _ADMIN,
    "ScheduleService/DeleteSchedule": _ADMIN,
    "ScheduleService/TriggerSchedule": _ADMIN,
    "AdminService/ListQueues": _ADMIN,
    "AdminService/PauseQueue": _ADMIN,
    "AdminService/ResumeQueue": _ADMIN,
    "AdminService/UpdateQueue": _ADMIN,
    "AdminService/ListWorkers": _ADMIN,
    "AdminService/CancelJobs": _ADMIN,
    "AdminService/RetryJobs": _ADMIN,
    "AdminService/DeleteJobs": _ADMIN,
    "AdminService/ListFailureGroups": _ADMIN,
}

# Unary calls that may last. They end as streams do when their token stops allowing them; others
# are over before that is known.
LASTING = frozenset(
    {
        "JobService/GetResult",
        *("AdminService/CancelJobs", "AdminService/RetryJobs", "AdminService/DeleteJobs"),
    }
)

# Of the call that the running task serves. Without a default: a call that was not admitted cannot
# be taken for somebody's.
admitted: ContextVar[Token] = ContextVar("admitted")

_EVERYBODY = Token(ANONYMOUS, b"", frozenset({"admin"}))


def follow_tokens(text: str, path: str) -> Followed[Tokens] | None:
    """The tokens of a text, or of a file as it changes, whichever is given; None where neither
    is. Raises ValueError."""
    if path:
        return Followed("tokens", [path], lambda: read_tokens(path))
    return Followed("tokens", [], lambda: parse_tokens(text)) if text else None


@dataclass(slots=True, eq=False)
class _Held:
    method: str
    token: Token
    limit: asyncio.Timeout
    refusal: JobsvcError | None = None


class Access:
    """For one event loop."""

    def __init__(self, tokens: Followed[Tokens] | None) -> None:
        """Without tokens everybody may do everything."""
        self._tokens = tokens
        self._held: set[_Held] = set()

    def admit(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> Token:
        """Who calls `method` (`JobService/GetJob`). Raises Unauthenticated and ScopeMissing."""
        if self._tokens is None:
            return _EVERYBODY
        text = _bearer([value for key, value in metadata if key == "authorization"])
        return _allowed(method, self._tokens.current.find(text))

    def check(self, method: str) -> None:
        """Raises what `admit` would raise now for the call of this task: its client may have taken
        its time to send the request."""
        if self._tokens is not None:
            _allowed(method, self._tokens.current.again(admitted.get()))

    @asynccontextmanager
    async def held(self, method: str) -> AsyncIterator[None]:
        """For a call that lasts: if its token stops allowing it, the block is cancelled and ends
        with what `admit` would raise now."""
        try:
            async with asyncio.timeout(None) as limit:
                held = _Held(method, admitted.get(), limit)
                self._held.add(held)
                try:
                    yield
                finally:
                    self._held.remove(held)
        except TimeoutError:
            if held.refusal is None:
                raise
            raise held.refusal from None

    async def follow(self) -> None:
        """Looks for changes of the tokens, and ends what they no longer allow. In a thread: a file
        may be large, or on a network."""
        while (tokens := self._tokens) is not None:
            await asyncio.sleep(FOLLOW_SECONDS)
            if await asyncio.to_thread(lambda: tokens.settled() and tokens.refresh()):
                self._recheck(tokens.current)

    def _recheck(self, tokens: Tokens) -> None:
        for held in self._held:
            try:
                _allowed(held.method, tokens.again(held.token))
            except JobsvcError as error:
                held.refusal = error
                held.limit.reschedule(asyncio.get_running_loop().time())


def _bearer(values: list[str | bytes]) -> str:
    if not values:
        raise Unauthenticated("no token: send the metadata `authorization: Bearer TOKEN`")
    scheme, _, text = values[0].partition(" ") if isinstance(values[0], str) else ("", "", "")
    if len(values) > 1 or scheme.lower() != "bearer" or not text:
        raise Unauthenticated("the metadata `authorization` is not one `Bearer TOKEN`")
    return text.strip()


def _allowed(method: str, token: Token | None) -> Token:
    if token is None:
        raise Unauthenticated("the token is not known, or no longer")
    needed = NEEDED.get(method, _ADMIN)
    if not needed <= token.scopes and not token.scopes >= _ADMIN:
        raise ScopeMissing(method, needed)
    return token
