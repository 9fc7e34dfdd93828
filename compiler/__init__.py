"""Compile a Hugging Face decoder into a program that two parties run together."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from mergec import bare_names
from mergec.compiler.errors import CompileError

if TYPE_CHECKING:
    from mergec.compiler.adaptation.config import AdaptConfig
    from mergec.compiler.adaptation.run import adapt
    from mergec.compiler.config import CompileConfig
    from mergec.compiler.driver import compile_decoder
    from mergec.compiler.program import Program

__all__ = ["AdaptConfig", "CompileConfig", "Program", "adapt", "compile_decoder"]

_HOMES = {
    "AdaptConfig": "mergec.compiler.adaptation.config",
    "CompileConfig": "mergec.compiler.config",
    "Program": "mergec.compiler.program",
    "adapt": "mergec.compiler.adaptation.run",
    "compile_decoder": "mergec.compiler.driver",
}


def __getattr__(name: str) -> Any:
    """Import on first use: a part of the compiler must not load the passes, nor torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if name not in _EXTRAS or missing == "mergec":
            raise
        return _without(name, missing)


_EXTRAS = {"adapt": "adapt", "compile_decoder": "compile"}
"""The extra that each function needs."""


def _without(name: str, package: str) -> Callable[..., NoReturn]:
    """What a function is on a machine that has the requirements of the runtime only.

    A function, so that importing the name, as `from mergec import *` does, still works there.
    """

    def missing(*_: Any, **__: Any) -> NoReturn:
        raise CompileError(
            f"{name} needs the package {package!r}, which is not installed here; "
            f"install mergec[{_EXTRAS[name]}]"
        )

    missing.__name__ = name
    return missing


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if __name__ == "compiler":  # imported from a checkout without the prefix
    bare_names.stand_for(__name__)
