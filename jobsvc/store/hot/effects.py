"""What a statement leaves to be told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from jobsvc.core.model import Change, Dispatch, Effects, Step
from jobsvc.core.states import EventType, JobState


def effects_of(
    event: EventType,
    state: JobState,
    kinds: Iterable[tuple[str, str]],
    changes: Sequence[Change],
    dispatches: Sequence[Dispatch] = (),
) -> Effects:
    """`kinds`: the job type and queue of each job that was moved."""
    counted = Counter(kinds)
    steps = {Step(event, state, *kind): count for kind, count in counted.items()}
    return Effects(tuple(changes), tuple(dispatches), steps)
