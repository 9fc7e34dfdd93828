"""Sums of words with hundreds of bits, as 32-bit halves in int32, the lowest first."""

from __future__ import annotations

import numpy as np
import torch

from mergec.runtime.kernels.backends import Kernel
from mergec.runtime.kernels.compiled import compiled

HALF_BITS = 32

ONES = (1 << HALF_BITS) - 1


def added(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """one + other modulo 2**(32 H), int32 [n, H]."""
    if one.is_meta:
        return torch.empty_like(one)
    total: torch.Tensor = _ADDED(one.contiguous(), other.contiguous())
    return total


def carried(sums: torch.Tensor) -> torch.Tensor:
    """Words [n, H] of which each half is below 2**62 and not negative, as halves in int32."""
    halves, carry = [], torch.zeros_like(sums[:, 0])
    for half in range(sums.shape[1]):
        total = sums[:, half] + carry
        halves.append(total.to(torch.int32))
        carry = total >> HALF_BITS
    return torch.stack(halves, 1)


def _added_host(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(one)
    _add_cpu(*(words.numpy().view("uint32") for words in (one, other, out)))
    return out


def _added_tensors(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return carried((one.long() & ONES) + (other.long() & ONES))


_ADDED = Kernel("long.added", _added_host, _added_tensors)


@compiled()
def _add_cpu(one, other, out):  # type: ignore[no-untyped-def]
    for i in range(one.shape[0]):
        carry = np.uint64(0)
        for half in range(one.shape[1]):
            total = np.uint64(one[i, half]) + np.uint64(other[i, half]) + carry
            out[i, half] = np.uint32(total & np.uint64(ONES))
            carry = total >> np.uint64(HALF_BITS)
