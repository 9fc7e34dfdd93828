"""Classes that other packages offer by entry points."""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from mergec.runtime.core.errors import MergecError

Offered = TypeVar("Offered")


def offered(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of a group, read once for each search path: that opens every package."""
    return _offered(group, tuple(sys.path))


@cache
def _offered(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:  # noqa: ARG001
    return tuple(entry_points(group=group))


def place_of(point: EntryPoint) -> str:
    """What errors call an entry point."""
    return f"the entry point {point.value} of {point.group}"


def load_class(
    point: EntryPoint, base: type[Offered], wanted: str, error: type[MergecError]
) -> type[Offered]:
    """The class behind an entry point.

    wanted: what it has to be, as "a subclass of mergec.Op; repair its package". Raises `error` if
    it cannot be loaded, or is no subclass of `base`.
    """
    try:
        kind = point.load()
    except Exception as cause:
        raise error(f"{place_of(point)} cannot be loaded: {cause}; repair its package") from cause
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise error(f"{place_of(point)} is not {wanted}")
    return kind
