"""Matrix products modulo 2**64 of int64 (and narrower) tensors, on CPU and CUDA."""

from __future__ import annotations

import math

import numba
import numpy as np
import torch

from runtime.kernels.compiled import compiled

_LIMB_BITS = 16
_FLOAT_EXACT_BITS = 53

_CACHED_WORDS = 1 << 16
"""Words of a weight that stay in a core's second cache while they are used."""


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Batched `a @ b` modulo 2**64, with broadcast batch dimensions; shapes only on meta."""
    if a.is_meta or b.is_meta:
        return torch.empty(_shape(a, b), dtype=torch.int64, device="meta")
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    rows, inner, columns = a.shape[-2], a.shape[-1], b.shape[-1]
    count = math.prod(batch)
    a3 = a.expand(*batch, rows, inner).reshape(count, rows, inner)
    b3 = b.expand(*batch, inner, columns).reshape(count, inner, columns)
    if a.is_cuda:
        out = torch.stack([_limb_product(x, y) for x, y in zip(a3, b3, strict=True)])
        return out.reshape(*batch, rows, columns)
    result = np.zeros((a3.shape[0], rows, columns), np.int64)
    _batched(a3.contiguous().numpy(), b3.contiguous().numpy(), result)
    return torch.from_numpy(result).reshape(*batch, rows, columns)


def matmul_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T` modulo 2**64: x [..., I] int64, weight [O, I] int32 or int64."""
    shape = (*x.shape[:-1], weight.shape[0])
    if x.is_meta or weight.is_meta:
        return torch.empty(shape, dtype=torch.int64, device="meta")
    flat = x.reshape(-1, x.shape[-1])
    if x.is_cuda:
        return _limb_product(flat, weight.T).reshape(shape)
    result = np.empty((flat.shape[0], weight.shape[0]), np.int64)
    _rows(flat.contiguous().numpy(), weight.numpy(), result)
    return torch.from_numpy(result).reshape(shape)


def matmul_columns(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight` modulo 2**64: x [..., V] int64, weight [V, D] int32 or int64."""
    shape = (*x.shape[:-1], weight.shape[1])
    if x.is_meta or weight.is_meta:
        return torch.empty(shape, dtype=torch.int64, device="meta")
    flat = x.reshape(-1, x.shape[-1])
    if x.is_cuda:
        return _limb_product(flat, weight).reshape(shape)
    parts = np.zeros((numba.get_num_threads(), flat.shape[0], weight.shape[1]), np.int64)
    _columns(flat.contiguous().numpy(), weight.numpy(), parts)
    result = parts[0] if len(parts) == 1 else parts.sum(0)
    return torch.from_numpy(result).reshape(shape)


def _shape(a: torch.Tensor, b: torch.Tensor) -> tuple[int, ...]:
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return (*batch, a.shape[-2], b.shape[-1])


def _limb_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` modulo 2**64 by float64 products of 16-bit limbs, for devices without an int64 GEMM.

    Exact as long as 16 + 16 + log2(inner) <= 53; the inner dimension is cut so that it holds.
    """
    step = 1 << (_FLOAT_EXACT_BITS - 2 * _LIMB_BITS - 1)
    result = torch.zeros(a.shape[0], b.shape[1], dtype=torch.int64, device=a.device)
    for start in range(0, a.shape[1], step):
        left = _limbs(a[:, start : start + step])
        right = _limbs(b[start : start + step].to(torch.int64))
        for i, x in enumerate(left):
            for j, y in enumerate(right[: 4 - i]):
                result += (x @ y).to(torch.int64) << (_LIMB_BITS * (i + j))
    return result


def _limbs(x: torch.Tensor) -> list[torch.Tensor]:
    """The four 16-bit limbs of int64 words, least significant first, as float64."""
    return [((x >> (_LIMB_BITS * i)) & 0xFFFF).to(torch.float64) for i in range(4)]


def set_threads(count: int) -> None:
    """Use `count` threads in the kernels of this process (1 <= count <= cores)."""
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))


@compiled(parallel=True)
def _rows(x, weight, out):  # type: ignore[no-untyped-def]
    # One weight row at a time for all rows of x: the weights are read from memory once.
    for o in numba.prange(weight.shape[0]):
        for n in range(x.shape[0]):
            total = np.int64(0)
            for i in range(x.shape[1]):
                total += x[n, i] * np.int64(weight[o, i])
            out[n, o] = total


@compiled(parallel=True)
def _columns(x, weight, parts):  # type: ignore[no-untyped-def]
    # Each thread takes some of the weight's rows and sums into a part of its own. As many of them
    # at once as keep in a core's second cache, for all rows of x. Rows are taken out of their
    # arrays first: only then is the innermost loop compiled to vector instructions.
    count, inner, columns = parts.shape[0], weight.shape[0], weight.shape[1]
    depth = max(8, _CACHED_WORDS // max(1, columns))
    for part in numba.prange(count):
        first, last = part * inner // count, (part + 1) * inner // count
        for start in range(first, last, depth):
            for n in range(x.shape[0]):
                sums = parts[part, n]
                for v in range(start, min(start + depth, last)):
                    factor, row = x[n, v], weight[v]
                    for i in range(columns):
                        sums[i] += factor * np.int64(row[i])


@compiled(parallel=True)
def _batched(a, b, out):  # type: ignore[no-untyped-def]
    for index in numba.prange(a.shape[0] * a.shape[1]):
        batch, row = index // a.shape[1], index % a.shape[1]
        for k in range(a.shape[2]):
            factor = a[batch, row, k]
            for column in range(b.shape[2]):
                out[batch, row, column] += factor * b[batch, k, column]
