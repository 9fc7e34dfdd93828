"""Graph rewrites, one per file. `available` lists them all."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from mergec import bare_names
from mergec.compiler.errors import CompileError
from mergec.compiler.graph.manager import check_after
from mergec.compiler.graph.rewriting import Pass
from mergec.runtime.core.entry_points import load_class, offered

ENTRY_POINTS = "mergec.passes"
"""The entry point group in which other packages offer passes."""

_WANTED = "a subclass of mergec.Pass; repair its package"


def available() -> dict[str, type[Pass]]:
    """Every pass by name: the built-in ones, and those that other packages offer.

    A package offers a pass as an entry point of the group `mergec.passes`. Raises CompileError if a
    file defines no pass, several passes, or a class whose name does not match the file; if two
    passes have the same name; or if an `after` names an unknown pass.
    """
    found: dict[str, type[Pass]] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name != "base":
            found[module.name] = only_pass(importlib.import_module(f"{__name__}.{module.name}"))
    for point in offered(ENTRY_POINTS):
        kind = load_class(point, Pass, _WANTED, CompileError)
        if found.setdefault(kind.name(), kind) is not kind:
            raise CompileError(
                f"the entry point {point.value} of {ENTRY_POINTS} has the name of another pass, "
                f"{kind.name()!r}; rename its class"
            )
    check_after(found.values(), found)
    return found


def only_pass(module: ModuleType) -> type[Pass]:
    """The one pass that a file of this package defines; its class is named after the file."""
    name = module.__name__.rpartition(".")[2]
    where = f"passes/{name}.py"
    kinds = [
        item
        for item in vars(module).values()
        if isinstance(item, type)
        and issubclass(item, Pass)
        and item.__module__ == module.__name__
        and item.run is not Pass.run
    ]
    if len(kinds) > 1:
        names = " and ".join(kind.__name__ for kind in kinds)
        raise CompileError(f"{where} defines {names}; put each pass into its own file")
    if not kinds:
        raise CompileError(f"{where} defines no pass; move shared helpers to compiler/graph/")
    (kind,) = kinds
    if kind.__name__.lower() != name.replace("_", ""):
        wanted = "".join(map(str.capitalize, name.split("_")))
        raise CompileError(f"{where} defines {kind.__name__}; name the class {wanted}")
    return kind


if __name__ == "passes":  # imported from a checkout without the prefix
    bare_names.stand_for(__name__)
