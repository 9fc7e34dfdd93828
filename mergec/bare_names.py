"""In a checkout, makes `import compiler` return the module `mergec.compiler`, submodules included.

The folders `compiler`, `passes` and `runtime` are at the top of a checkout, so Python also finds
them without the prefix. Each of them then calls `stand_for`, so that no module is loaded twice
under two names. An installed mergec has no such folders at the top, and uses nothing of this file.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_standing: set[str] = set()
"""The packages that were imported by their bare names."""


def stand_for(name: str) -> None:
    """Make the package `name` another name of `mergec.<name>` in this process."""
    sys.modules[name] = importlib.import_module(f"mergec.{name}")
    if not _standing:
        sys.meta_path.insert(0, _Finder())
    _standing.add(name)


class _Finder(MetaPathFinder):
    """Finds the submodules of packages that were imported by their bare names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, rest = fullname.partition(".")
        if package not in _standing or not rest:
            return None
        return ModuleSpec(fullname, _Same())


class _Same(Loader):
    """Returns the module with the prefix. The import replaces its spec, so it is restored."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"mergec.{spec.name}")
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec
