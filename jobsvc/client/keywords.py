"""Keywords that a TypedDict types are checked as Python checks those that are written out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar, get_args, get_type_hints

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def known_keywords(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Makes a function with `**options: Unpack[Options]` raise TypeError for a keyword that Options
    does not have, and at once, also where it is a generator.

    Python itself lets every keyword through there: a filter that is misspelt would match
    everything.
    """
    names = set(inspect.signature(function).parameters)
    (rest,) = (
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.VAR_KEYWORD
    )
    (options,) = get_args(get_type_hints(function)[rest])
    known = (names - {rest}) | set(options.__annotations__)

    @functools.wraps(function)
    def checked(*args: _Parameters.args, **given: _Parameters.kwargs) -> _Result:
        for name in given.keys() - known:
            raise TypeError(
                f"{function.__qualname__}() got an unexpected keyword argument {name!r}; it takes "
                + ", ".join(sorted(options.__annotations__))
            )
        return function(*args, **given)

    return checked
