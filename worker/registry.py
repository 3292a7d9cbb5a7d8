"""The job types that the imported handler modules have registered in this process."""

from __future__ import annotations

import _thread
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal

from jobsvc.core.attempts import JobTypeInfo

if TYPE_CHECKING:
    from pydantic import BaseModel

_start_new_thread = _thread.start_new_thread  # as it is before any handlers are loaded

PayloadKind = Literal["object", "blob", "any", "model"]


class HandlersError(Exception):
    """The handler modules cannot be used; the message names the module or job type, and why."""


@dataclass(frozen=True, slots=True)
class JobDefinition:
    """A job type and the function that runs it. `model` is set where `payload_kind` is "model"."""

    name: str
    function: Callable[..., Any]
    takes_context: bool
    payload_kind: PayloadKind
    model: type[BaseModel] | None
    description: str
    timeout_seconds: float | None
    max_attempts: int | None
    queue: str | None

    def describe(self) -> JobTypeInfo:
        """What is announced; raises whatever Pydantic raises for a model without a schema."""
        schema_json = None
        if self.model is not None:
            import json

            from worker.schemas import payload_schema

            schema_json = json.dumps(payload_schema(self.model), allow_nan=False)
        return JobTypeInfo(
            name=self.name,
            description=self.description,
            payload_schema=schema_json,
            max_attempts=self.max_attempts,
            timeout=self.timeout_seconds,
            queue=self.queue,
        )


_definitions: dict[str, JobDefinition] = {}


def register(definition: JobDefinition) -> None:
    """Add a job type. Raises ValueError if another function already has its name."""
    known = _definitions.get(definition.name)
    # A module that is run and imported registers the same source twice, which is harmless.
    if known is not None and _source(known.function) != _source(definition.function):
        message = (
            f"job type {definition.name!r} is registered twice:"
            f" by {_location(known.function)} and by {_location(definition.function)}"
        )
        raise ValueError(message)
    _definitions[definition.name] = definition


def find(name: str) -> JobDefinition | None:
    """The definition of a job type, None if it is not registered here."""
    return _definitions.get(name)


def load(modules: Sequence[str]) -> list[JobTypeInfo]:
    """Import `modules`, and say which job types there are now, in the order of their names.

    `demo.echo` is among them whatever the modules. Modules are found in the working directory
    too. Raises HandlersError.
    """
    directory = str(Path.cwd())
    if "" not in sys.path and directory not in sys.path:
        sys.path.append(directory)
    for module in ("worker.echo", *modules):
        try:
            importlib.import_module(module)
        except BaseException as error:  # a module may raise anything, SystemExit too
            what = f"{type(error).__name__}: {error}{_place(error)}"
            raise HandlersError(f"cannot import handlers from {module!r}: {what}") from error
    if _thread.start_new_thread is not _start_new_thread:
        raise HandlersError(
            f"the handlers from {','.join(modules)} replace Python's threads (as"
            " gevent.monkey.patch_all() does), which their own process needs to be told of"
            " cancels and to report: leave them as they are (patch_all(thread=False))"
        )
    return [_describe(_definitions[name]) for name in sorted(_definitions)]


# What is between `load` and the handlers in a traceback, beside the frozen parts of the import.
_IMPORTERS = frozenset({__file__, importlib.__file__})


def _place(error: BaseException) -> str:
    """The line of the handlers, or of what they import, that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if not frame.filename.startswith("<frozen ") and frame.filename not in _IMPORTERS:
            return f" ({frame.filename}, line {frame.lineno})"
    return ""  # it is not there at all, or its own text names the line (SyntaxError)


def _describe(definition: JobDefinition) -> JobTypeInfo:
    try:
        return definition.describe()
    except Exception as error:
        message = (
            f"job type {definition.name!r} ({_location(definition.function)}):"
            f" its payload has no JSON Schema: {error}"
        )
        raise HandlersError(message) from error


def _source(function: Callable[..., Any]) -> tuple[str, int]:
    code = _code_owner(function).__code__
    return code.co_filename, code.co_firstlineno


def _location(function: Callable[..., Any]) -> str:
    owner = _code_owner(function)
    return f"{owner.__module__}.{owner.__qualname__} (line {owner.__code__.co_firstlineno})"


def _code_owner(function: Callable[..., Any]) -> FunctionType:
    owner = inspect.unwrap(function)
    assert isinstance(owner, FunctionType)  # the decorator takes nothing else
    return owner
