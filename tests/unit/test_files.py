"""Files that are read anew when they change."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from jobsvc.files import Followed


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "number"
    path.write_text("1")
    return path


def reading(path: Path) -> Callable[[], int]:
    def read() -> int:
        try:
            return int(path.read_text())
        except OSError:
            raise ValueError("is gone") from None

    return read


def test_a_change_is_read_once(path: Path) -> None:
    followed = Followed("number", [str(path)], reading(path))
    assert (followed.current, followed.refresh()) == (1, False)
    path.write_text("22")
    assert (followed.refresh(), followed.refresh(), followed.current) == (True, False, 22)


def test_a_file_that_is_put_in_place_of_it_is_read(path: Path) -> None:
    followed = Followed("number", [str(path)], reading(path))
    other = path.with_name("new")
    other.write_text("2")
    other.replace(path)
    assert (followed.refresh(), followed.current) == (True, 2)


def test_a_file_of_the_same_size_and_times_is_read(path: Path) -> None:
    followed = Followed("number", [str(path)], reading(path))
    times = path.stat()
    path.write_text("2")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (followed.refresh(), followed.current) == (True, 2)


def test_a_file_that_is_touched_is_as_it_was(path: Path) -> None:
    followed = Followed("number", [str(path)], reading(path))
    os.utime(path, ns=(0, 0))
    assert (followed.settled(), followed.refresh()) == (True, False)


@pytest.mark.parametrize("spoil", [lambda path: path.write_text("no number"), Path.unlink])
def test_what_was_good_outlives_a_bad_file(path: Path, spoil: Callable[[Path], object]) -> None:
    followed = Followed("number", [str(path)], reading(path))
    spoil(path)
    with capture_logs() as records:
        assert (followed.refresh(), followed.refresh(), followed.current) == (False, False, 1)
    (record,) = records
    assert (record["log_level"], record["what"]) == ("error", "number")
    path.write_text("333")
    assert (followed.refresh(), followed.current) == (True, 333)


def test_a_bad_file_is_an_error_at_first(path: Path) -> None:
    path.write_text("no number")
    with pytest.raises(ValueError, match="no number"):
        Followed("number", [str(path)], reading(path))


def test_a_file_that_is_being_written_is_not_settled(path: Path) -> None:
    followed = Followed("number", [str(path)], reading(path))
    assert followed.settled()
    path.write_text("22")
    assert not followed.settled()
    path.write_text("333")
    assert not followed.settled()
    assert followed.settled()
