"""Tensors without data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

_KEPT = 1024


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
