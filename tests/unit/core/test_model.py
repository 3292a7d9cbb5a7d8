from __future__ import annotations

import dataclasses

import pytest

from jobsvc.core import model
from jobsvc.core.attempts import Input, Output
from jobsvc.core.model import DAY, RETENTION_SECONDS, NewJob
from jobsvc.core.states import TERMINAL_STATES


@pytest.mark.parametrize(
    ("output", "size"),
    [
        (Output(text="abc"), 3),
        (Output(text="é"), 2),
        (Output(data=b"\x00\xff"), 2),
        (Output(text=""), 0),
        (Output(data=b""), 0),
        (Output(), 0),
    ],
)
def test_an_outputs_size_is_its_bytes(output: Output, size: int) -> None:
    assert output.size == size


def test_every_end_has_a_retention() -> None:
    assert set(RETENTION_SECONDS) == set(TERMINAL_STATES)
    assert sorted(RETENTION_SECONDS.values()) == [7 * DAY, 7 * DAY, 30 * DAY]


def test_new_jobs_share_no_labels() -> None:
    first, second = NewJob("1", "demo"), NewJob("2", "demo")
    first.labels["a"] = "b"
    assert second.labels == {}


def test_values_cannot_be_changed() -> None:
    parameters = [
        vars(c).get("__dataclass_params__") for c in vars(model).values() if type(c) is type
    ]
    frozen = [p.frozen for p in parameters if p]
    assert len(frozen) > 15
    assert all(frozen)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Input().data = b""  # type: ignore[misc]
