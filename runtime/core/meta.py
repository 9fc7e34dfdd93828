"""Tensors without data, and their shapes without torch's compiler."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

_KEPT = 1024


def compute_shapes_alone() -> None:
    """Keep torch from importing its compiler when it computes shapes.

    Some operations on meta tensors are Python functions of torch. Each tells torch's compiler not
    to trace it, and the first that is called imports the compiler for this: a second of work, and
    900 modules. A party compiles nothing, so here they have told already. Only for processes of a
    party's own, because the functions would be traced if something else there compiled them. Does
    nothing if the compiler is loaded, or if another version of torch does this in another way.
    """
    if "torch._dynamo" in sys.modules:
        return
    for function in vars(torch._refs).values():
        while inspect.isfunction(function) and hasattr(function, "__wrapped__"):
            wrapper, function = function, function.__wrapped__
            if wrapper.__code__.co_filename == torch._compile.__file__:
                function.__dynamo_disable = function


def ghost(*shapes: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """A meta tensor of the broadcast shape: what a role has in place of words that it does not see.

    Equal ghosts are one tensor, because a new one takes torch longer than all else that a role does
    with it. So a ghost must not stand for a mask, of which `Context.spend` takes each for another.
    """
    return _ghost(dtype, *map(tuple, shapes))


@lru_cache(_KEPT)
def _ghost(dtype: torch.dtype, *shapes: tuple[int, ...]) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.empty(np.broadcast_shapes(*shapes), dtype=dtype, device="meta")
