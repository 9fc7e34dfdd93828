"""One file per op of the `mpc` dialect. `load_all` imports them all."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import EntryPoint

from mergec.runtime.core.entry_points import load_class, offered, place_of
from mergec.runtime.core.errors import OpError
from mergec.runtime.core.op import REGISTRY, Op, unregister

ENTRY_POINTS = "mergec.ops"
"""The group of entry points under which other packages offer ops."""


@cache
def load_all() -> dict[str, type[Op]]:
    """Every op by name: those of this package, and those that other packages offer.

    Imports each file of this package, then loads each entry point of the group `mergec.ops`. Raises
    OpError that names an entry point which cannot be used, or has the name of another op; the ops
    that it registered are forgotten.
    """
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for point in offered(ENTRY_POINTS):
        before = set(REGISTRY)
        try:
            _load(point)
        except OpError:
            for name in set(REGISTRY) - before:
                unregister(name)
            raise
    return REGISTRY


def _load(point: EntryPoint) -> None:
    kind = load_class(point, Op, "a subclass of mergec.Op; repair its package", OpError)
    if kind not in REGISTRY.values():
        raise OpError(f"{place_of(point)} is an abstract class, not an op; repair its package")
