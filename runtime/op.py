"""Deprecated alias of `runtime.core.op`; the next release removes it."""

import warnings

from mergec.runtime.core.op import REGISTRY, Op, target
from mergec.runtime.ops import load_all

__all__ = ["REGISTRY", "Op", "load_all", "target"]

warnings.warn(
    "mergec.runtime.op is deprecated: import Op from mergec, and load_all from mergec.runtime.ops",
    DeprecationWarning,
    stacklevel=2,
)
