"""Compile a Hugging Face decoder into a program that two parties run together.

The client owns the prompt and reads the answer; the server owns the weights; neither learns what
the other holds.

Example:
    >>> import mergec
    >>> program = mergec.compile_decoder(model, tokenizer)  # doctest: +SKIP
    >>> program.save("bundles/mine")  # doctest: +SKIP
    >>> program.generate_local("The capital of France is").text  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mergec.runtime.core.errors import (
    BundleError,
    LimitError,
    MergecError,
    PartyError,
    PromptError,
    RangeError,
)
from mergec.runtime.core.version import VERSION

if TYPE_CHECKING:
    from mergec.compiler.config import CompileConfig
    from mergec.compiler.driver import compile_decoder
    from mergec.compiler.errors import CompileError, InternalError
    from mergec.compiler.graph.rewriting import Pass
    from mergec.compiler.program import Program
    from mergec.runtime.core.op import Op

__version__ = VERSION

__all__ = [
    "BundleError",
    "CompileConfig",
    "CompileError",
    "InternalError",
    "LimitError",
    "MergecError",
    "Op",
    "PartyError",
    "Pass",
    "Program",
    "PromptError",
    "RangeError",
    "__version__",
    "compile_decoder",
]

_HOMES = {
    "CompileConfig": "mergec.compiler.config",
    "CompileError": "mergec.compiler.errors",
    "InternalError": "mergec.compiler.errors",
    "Op": "mergec.runtime.core.op",
    "Pass": "mergec.compiler.graph.rewriting",
    "Program": "mergec.compiler.program",
    "compile_decoder": "mergec.compiler.driver",
}
"""Names that are imported on first use, so that `import mergec` loads neither torch nor passes."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
