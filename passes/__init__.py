"""Graph rewrites, one per file. `available` lists them all."""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import EntryPoint, entry_points

from mergec import bare_names
from mergec.compiler.errors import CompileError
from mergec.compiler.graph.rewriting import Pass

ENTRY_POINTS = "mergec.passes"
"""The group of entry points under which other packages offer passes."""


def available() -> dict[str, type[Pass]]:
    """Every pass by name: those of this package, and those that other packages offer.

    A package offers a pass as an entry point of the group `mergec.passes`.
    """
    found: dict[str, type[Pass]] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name == "base":
            continue
        contents = vars(importlib.import_module(f"{__name__}.{module.name}")).values()
        for item in contents:
            if isinstance(item, type) and issubclass(item, Pass) and item is not Pass:
                found[item.name()] = item
    for point in entry_points(group=ENTRY_POINTS):
        kind = _load(point)
        if found.setdefault(kind.name(), kind) is not kind:
            raise CompileError(
                f"the entry point {point.value} of {ENTRY_POINTS} has the name of another pass, "
                f"{kind.name()!r}; rename its class"
            )
    return found


def _load(point: EntryPoint) -> type[Pass]:
    """The pass behind an entry point."""
    where = f"the entry point {point.value} of {ENTRY_POINTS}"
    try:
        kind = point.load()
    except Exception as error:
        raise CompileError(f"{where} cannot be loaded: {error}; repair its package") from error
    if not (isinstance(kind, type) and issubclass(kind, Pass)):
        raise CompileError(f"{where} is no subclass of mergec.Pass; repair its package")
    return kind


if __name__ == "passes":  # imported from a checkout without the prefix
    bare_names.stand_for(__name__)
