"""Room for Python's frames.

CPython (3.11 and later) has the frames of a thread in chunks of 16 KB, maps one where a call needs it and unmaps it
when that call returns. A loop whose calls cross the end of a chunk does both in each turn: as deep as Dynamo,
AOTAutograd and our passes are then, that took half of the passes' time, and a third of what two processes did.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
SLOTS = 1 << 18  # of 8 bytes; a chunk is the next power of two, so that callees have as much again


def with_room(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with one chunk for the frames of all that it calls: that of a caller with a large stack."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return _calling(function, args, kwargs)  # type: ignore[no-any-return]

    return run


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


_calling = FunctionType(_call.__code__.replace(co_stacksize=SLOTS), globals())
