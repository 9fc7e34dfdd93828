"""Errors of the compiler: the user's model, or our own bug."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergec.runtime.core.errors import MergecError

if TYPE_CHECKING:
    # The command line reads the options' names without torch.
    from torch import fx


class CompileError(MergecError):
    """The model cannot be compiled. Names every offending node, its module and source line."""

    def __init__(self, message: str, nodes: Mapping[fx.Node, str] | None = None) -> None:
        self.nodes = dict(nodes or {})
        lines = [message]
        for node, reason in self.nodes.items():
            text = describe(node)
            lines += [f"  {text}", f"  {'^' * len(text)}", f"  {reason}"]
        super().__init__("\n".join(lines))


class InternalError(MergecError):
    """A broken invariant of the compiler itself; please report it."""


def describe(node: fx.Node) -> str:
    """One node with its module path and source line."""
    where = [node.meta.get("module", ""), node.meta.get("source", "")]
    place = "  ".join(part for part in where if part)
    arguments = ", ".join(str(arg) for arg in node.args)
    text = f"%{node.name} = {node.target}({arguments})"
    return f"{text}   # {place}" if place else text
