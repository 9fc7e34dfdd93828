"""Compile a Hugging Face decoder into a program that two parties run together."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mergec import bare_names

if TYPE_CHECKING:
    from mergec.compiler.config import CompileConfig
    from mergec.compiler.driver import compile_decoder
    from mergec.compiler.program import Program

__all__ = ["CompileConfig", "Program", "compile_decoder"]

_HOMES = {
    "CompileConfig": "mergec.compiler.config",
    "Program": "mergec.compiler.program",
    "compile_decoder": "mergec.compiler.driver",
}


def __getattr__(name: str) -> Any:
    """Import on first use: a part of the compiler must not pull in the passes, nor torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


if __name__ == "compiler":  # imported from a checkout without the prefix
    bare_names.stand_for(__name__)
