"""Resume tokens: where a fleet watcher stands, signed, and opaque to it."""

from __future__ import annotations

import struct
from datetime import UTC, datetime, timedelta
from uuid import UUID

from jobsvc.errors import InvalidRequest, Violation
from jobsvc.rpc.signing import Signer
from jobsvc.services.fleet import Mark

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
# Another layout gets another purpose: none is ever taken for the other.
_PURPOSE = "WatchJobs"
_BODY = struct.Struct(">16sqq16sq")


class ResumeTokens:
    def __init__(self, signer: Signer) -> None:
        self._signer = signer

    def token(self, mark: Mark) -> str:
        x, job_id, sequence = mark.position
        at = (mark.time - _EPOCH) // _MICROSECOND
        body = _BODY.pack(_bytes(mark.incarnation), at, x, _bytes(job_id), sequence)
        return self._signer.seal(_PURPOSE, body)

    def mark(self, token: str) -> Mark | None:
        """None for no token. Raises InvalidRequest for what the service did not make."""
        if not token:
            return None
        try:
            body = self._signer.open(_PURPOSE, token)
        except ValueError:
            what = "must be the latest resume_token that was received, unchanged, or empty"
            raise InvalidRequest([Violation("resume_token", what)]) from None
        incarnation, at, x, job_id, sequence = _BODY.unpack(body)
        position = x, str(UUID(bytes=job_id)), sequence
        return Mark(str(UUID(bytes=incarnation)), _EPOCH + at * _MICROSECOND, position)


def _bytes(uuid: str) -> bytes:
    return bytes.fromhex(uuid.replace("-", ""))
