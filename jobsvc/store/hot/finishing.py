"""RUNNING -> SUCCEEDED, as verbs.finish has it."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping
from operator import itemgetter
from typing import Final

from jobsvc.core.attempts import Ending, Succeeded
from jobsvc.core.model import RETENTION_SECONDS, Change, Effects
from jobsvc.core.states import EventType, JobState
from jobsvc.store.database import Database
from jobsvc.store.dialects.prepared import Statement
from jobsvc.store.hot.effects import effects_of

SUCCEED: Final = Statement.from_file("succeed", "json", "float8")


def succeed(
    database: Database, endings: Mapping[str, tuple[str, Ending]]
) -> tuple[frozenset[str], Effects]:
    """Of `endings` (job id -> lease token, ending) those that are plain successes. Answers the ids
    of those that it ended; the others are for the verb."""
    rows = [
        {
            "id": job_id,
            "token": token,
            "result": b64encode(ending.result.data).decode(),
            "content_type": ending.result.content_type,
        }
        for job_id, (token, ending) in sorted(endings.items(), key=itemgetter(0))
        if isinstance(ending, Succeeded)
    ]
    if database.sqlite or not rows:
        return frozenset(), Effects()
    ended = database.once(SUCCEED, json.dumps(rows), RETENTION_SECONDS[JobState.SUCCEEDED])
    kinds = ((job_type, queue) for _, job_type, queue, _ in ended)
    changes = [Change(job_id, last) for job_id, _, _, last in ended]
    effects = effects_of(EventType.SUCCEEDED, JobState.SUCCEEDED, kinds, changes)
    return frozenset(row[0] for row in ended), effects
