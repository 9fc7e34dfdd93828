"""Errors of the compiler: the user's model, or our own bug."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergec.runtime.core.errors import MergecError

if TYPE_CHECKING:
    from torch import fx


class CompileError(MergecError):
    """The model cannot be compiled.

    nodes: the fault of each offending node. The message shows all of them as lines of the printed
    graph, with module path and source line.
    """

    def __init__(self, message: str, nodes: Mapping[fx.Node, str] | None = None) -> None:
        self.nodes = dict(nodes or {})
        lines = [message]
        if self.nodes:
            # Imported here because the command line uses this module without torch.
            from mergec.compiler.text import offences

            lines += offences(self.nodes)
        super().__init__("\n".join(lines))


class InternalError(MergecError):
    """A broken invariant of the compiler itself; please report it."""
