"""The former place of `compiler.graph.rewriting`; goes with the next release."""

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
    "mergec.passes.base is deprecated: import Pass from mergec, and what belongs to it from "
    "mergec.compiler.graph.rewriting",
    DeprecationWarning,
    stacklevel=2,
)
