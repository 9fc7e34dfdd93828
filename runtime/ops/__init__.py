"""One file per op of the `mpc` dialect. `load_all` imports them all."""

from __future__ import annotations

import importlib
import pkgutil

from mergec.runtime.core.op import REGISTRY, Op


def load_all() -> dict[str, type[Op]]:
    """Import every file of this package, so that the registry is complete."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return REGISTRY
