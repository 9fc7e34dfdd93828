"""Compile a Hugging Face decoder into a program that two parties run together.

The client owns the prompt and reads the answer; the server owns the weights; neither learns what
the other holds. Importing this package loads neither torch nor the compiler: each name below is
loaded on first use.

`compile_decoder` needs the extra `compile` (`pip install 'mergec[compile]'`). Without it the other
names still work, and calling `compile_decoder` raises a `CompileError` that names what is missing.

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
    BusyError,
    LimitError,
    MergecError,
    OpError,
    PartyError,
    PromptError,
)
from mergec.runtime.core.version import VERSION

if TYPE_CHECKING:
    from mergec.compiler.adaptation.config import AdaptConfig
    from mergec.compiler.adaptation.run import adapt
    from mergec.compiler.config import CompileConfig
    from mergec.compiler.driver import compile_decoder
    from mergec.compiler.errors import CompileError, InternalError
    from mergec.compiler.graph.rewriting import Pass
    from mergec.compiler.program import Program
    from mergec.runtime.core.op import Op

__version__ = VERSION

__all__ = [
    "AdaptConfig",
    "BundleError",
    "BusyError",
    "CompileConfig",
    "CompileError",
    "InternalError",
    "LimitError",
    "MergecError",
    "Op",
    "OpError",
    "PartyError",
    "Pass",
    "Program",
    "PromptError",
    "__version__",
    "adapt",
    "compile_decoder",
]

_HOMES = {
    "AdaptConfig": "mergec.compiler",
    "CompileConfig": "mergec.compiler",
    "CompileError": "mergec.compiler.errors",
    "InternalError": "mergec.compiler.errors",
    "Op": "mergec.runtime.core.op",
    "Pass": "mergec.compiler.graph.rewriting",
    "Program": "mergec.compiler",
    "adapt": "mergec.compiler",
    "compile_decoder": "mergec.compiler",
}
"""The module of each name that is loaded on first use."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
