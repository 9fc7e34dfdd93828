"""Words of 128 bits as two unsigned ones of 64, in numba's kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from mergec.runtime.kernels.compiled import compiled

_WORD = ir.IntType(64)
_WIDE = ir.IntType(128)


@intrinsic
def upper_product(typing, one, other):  # type: ignore[no-untyped-def]
    """The upper half of a product of unsigned words."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        product = builder.mul(*(builder.zext(word, _WIDE) for word in args))
        return builder.trunc(builder.lshr(product, _WIDE(64)), _WORD)

    return types.uint64(types.uint64, types.uint64), generate


@compiled(inline="always")
def plus(low, high, other_low, other_high):  # type: ignore[no-untyped-def]
    """The sum of two words of 128 bits."""
    total = low + other_low
    return total, high + other_high + np.uint64(total < low)


@compiled(inline="always")
def times(low, high, factor):  # type: ignore[no-untyped-def]
    """A word of 128 bits times a signed one of 64."""
    word = np.uint64(factor)
    upper = high * word + upper_product(low, word)
    if factor < 0:
        # As an unsigned word a negative factor is 2**64 too large.
        upper -= low
    return low * word, upper
