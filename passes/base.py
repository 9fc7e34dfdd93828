"""Deprecated alias of `compiler.graph.rewriting`; the next release removes it."""

import warnings

from mergec.compiler.graph.manager import PassReport, ordered, run_passes
from mergec.compiler.graph.rewriting import STAGES, GraphInfo, Pass, Skip
from mergec.passes import ENTRY_POINTS, available

__all__ = [
    "ENTRY_POINTS",
    "STAGES",
    "GraphInfo",
    "Pass",
    "PassReport",
    "Skip",
    "available",
    "ordered",
    "run_passes",
]

warnings.warn(
    "mergec.passes.base is deprecated: import Pass from mergec, and everything else from "
    "mergec.compiler.graph.rewriting",
    DeprecationWarning,
    stacklevel=2,
)
