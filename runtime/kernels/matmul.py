"""Matrix products modulo 2**64 of int64 (and narrower) tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch

from mergec.runtime.kernels.backends import Kernel
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.kernels.spread import Spread

_LIMB_BITS = 16
_FLOAT_EXACT_BITS = 53

_CACHED_WORDS = 1 << 16
"""Words of a weight that stay in a core's L2 cache while they are used."""

_ALONE = 1 << 15
"""Pairs of words below which one thread multiplies them all, in some 20 microseconds. A second one
saves 5 of them at most, and where other processes have its core, the first waits for milliseconds.
"""

_COLUMN = 1024
"""Columns of a weight that are multiplied at once; 64 rows of that length fit into the L2 cache."""


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Batched `a @ b` modulo 2**64, with broadcast batch dimensions. Shape only on meta tensors."""
    if a.is_meta or b.is_meta:
        return ghost(_shape(a, b))
    if isinstance(b, Spread):
        return b.ranks.batched(a, b)
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    rows, inner, columns = a.shape[-2], a.shape[-1], b.shape[-1]
    count = math.prod(batch)
    a3 = a.expand(*batch, rows, inner).reshape(count, rows, inner)
    b3 = b.expand(*batch, inner, columns).reshape(count, inner, columns)
    product: torch.Tensor = _PRODUCTS(a3, b3)
    return product.reshape(*batch, rows, columns)


def _batched_host(a3: torch.Tensor, b3: torch.Tensor) -> torch.Tensor:
    result = np.zeros((*a3.shape[:2], b3.shape[2]), np.int64)
    if result.size and a3.shape[2]:
        turned = b3.stride(2) != 1 and b3.stride(1) == 1
        b3 = b3 if turned or b3.stride(2) == 1 else b3.contiguous()
        _launch(
            _batched_dots if turned else _batched,
            a3.shape[2] * result.size,
            *(a3.contiguous().numpy(), _flat(b3), b3.stride(0), b3.stride(2 if turned else 1)),
            result,
        )
    return torch.from_numpy(result)


def _flat(x: torch.Tensor) -> np.ndarray:
    """The words from a tensor's first to its last in memory order, including any in between."""
    length = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((length,), (1,)).numpy()


def matmul_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T` modulo 2**64: x [..., I] int64, weight [O, I] int32 or int64."""
    shape = (*x.shape[:-1], weight.shape[0])
    if x.is_meta or weight.is_meta:
        return ghost(shape)
    flat = x.reshape(-1, x.shape[-1])
    if isinstance(weight, Spread):
        return weight.ranks.by_rows(flat, weight).reshape(shape)
    product: torch.Tensor = _BY_ROWS(flat, weight)
    return product.reshape(shape)


def _rows_host(flat: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if flat.shape[0] == 1:
        result = np.empty((1, weight.shape[0]), np.int64)
        _launch(_row, weight.numel(), flat.contiguous().numpy()[0], weight.numpy(), result[0])
    else:
        result = np.zeros((flat.shape[0], weight.shape[0]), np.int64)
        count = len(flat) * weight.numel()
        _launch(_rows, count, flat.contiguous().numpy(), weight.numpy(), result)
    return torch.from_numpy(result)


def matmul_columns(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight` modulo 2**64: x [..., V] int64, weight [V, D] int32 or int64."""
    shape = (*x.shape[:-1], weight.shape[1])
    if x.is_meta or weight.is_meta:
        return ghost(shape)
    flat = x.reshape(-1, x.shape[-1])
    if isinstance(weight, Spread):
        return weight.ranks.by_columns(flat, weight).reshape(shape)
    product: torch.Tensor = _BY_COLUMNS(flat, weight)
    return product.reshape(shape)


def _columns_host(flat: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    count = len(flat) * weight.numel()
    threads = 1 if count < _ALONE else _threads()
    parts = np.zeros((threads, flat.shape[0], weight.shape[1]), np.int64)
    kernel = _column if len(flat) == 1 else _columns
    _launch(kernel, count, flat.contiguous().numpy(), weight.numpy(), parts)
    return torch.from_numpy(parts[0] if threads == 1 else parts.sum(0))


def _shape(a: torch.Tensor, b: torch.Tensor) -> tuple[int, ...]:
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return (*batch, a.shape[-2], b.shape[-1])


def _limb_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` modulo 2**64 by float64 products of 16-bit limbs: the reference, on any device.

    Exact while 16 + 16 + log2(inner) <= 53; the inner dimension is split to satisfy this.
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


def _limb_products(a3: torch.Tensor, b3: torch.Tensor) -> torch.Tensor:
    if not len(a3):
        return torch.empty((0, a3.shape[1], b3.shape[2]), dtype=torch.int64, device=a3.device)
    return torch.stack([_limb_product(x, y) for x, y in zip(a3, b3, strict=True)])


def _limb_rows(flat: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _limb_product(flat, weight.T)


_PRODUCTS = Kernel("products.batched", _batched_host, _limb_products)
_BY_ROWS = Kernel("products.by_rows", _rows_host, _limb_rows)
_BY_COLUMNS = Kernel("products.by_columns", _columns_host, _limb_product)


def set_threads(count: int) -> None:
    """Use `count` threads in this process's kernels (at least 1; capped at the cores)."""
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))


def _threads() -> int:
    """Threads of this process's kernels. To ask numba takes as long as to multiply a few words."""
    return 1 if numba.config.NUMBA_NUM_THREADS == 1 else numba.get_num_threads()


def _launch(kernel: Callable[..., Any], products: int, *arguments: Any) -> None:
    """Run a kernel that multiplies this many pairs of words, on one thread if they are few."""
    threads = _threads()
    if threads == 1 or products >= _ALONE:
        kernel(*arguments)
        return
    numba.set_num_threads(1)
    try:
        kernel(*arguments)
    finally:
        numba.set_num_threads(threads)


@compiled(parallel=True)
def _row(x, weight, out):  # type: ignore[no-untyped-def]
    # Memory bandwidth of the weights is the limit here, and one stream of loads does not reach it:
    # a quarter of the rows is read in each of four. The last quarter may be shorter; it repeats its
    # last row then, whose sum is written more than once.
    last, quarter = weight.shape[0] - 1, (weight.shape[0] + 3) // 4
    for o0 in numba.prange(quarter):
        o1, o2, o3 = (
            min(o0 + quarter, last), min(o0 + 2 * quarter, last), min(o0 + 3 * quarter, last)
        )  # fmt: skip
        w0, w1, w2, w3 = weight[o0], weight[o1], weight[o2], weight[o3]
        a0 = a1 = a2 = a3 = np.int64(0)
        for i in range(x.shape[0]):
            a0 += x[i] * np.int64(w0[i])
            a1 += x[i] * np.int64(w1[i])
            a2 += x[i] * np.int64(w2[i])
            a3 += x[i] * np.int64(w3[i])
        out[o0], out[o1], out[o2], out[o3] = a0, a1, a2, a3


@compiled(parallel=True)
def _rows(x, weight, out):  # type: ignore[no-untyped-def]
    # Four rows of the weight times two of x at once, so that each loaded word serves more than one
    # product; partial sums are kept in `out`. Where fewer rows are left, the last one is repeated
    # and its sum is written twice. The weight is processed in blocks of columns, few enough for the
    # rows of x to stay in a core's L2 cache; each column is read from memory once.
    last, rows, inner = x.shape[0] - 1, weight.shape[0], x.shape[1]
    for start in range(0, inner, _COLUMN):
        stop = min(start + _COLUMN, inner)
        for group in numba.prange((rows + 3) // 4):
            o0, o1, o2, o3 = (
                4 * group, min(4 * group + 1, rows - 1), min(4 * group + 2, rows - 1),
                min(4 * group + 3, rows - 1),
            )  # fmt: skip
            w0, w1, w2, w3 = (
                weight[o0, start:stop], weight[o1, start:stop], weight[o2, start:stop],
                weight[o3, start:stop],
            )  # fmt: skip
            for n in range(0, x.shape[0], 2):
                m = min(n + 1, last)
                x0, x1 = x[n, start:stop], x[m, start:stop]
                a0, a1, a2, a3 = out[n, o0], out[n, o1], out[n, o2], out[n, o3]
                b0, b1, b2, b3 = out[m, o0], out[m, o1], out[m, o2], out[m, o3]
                for i in range(stop - start):
                    a, b = x0[i], x1[i]
                    v0, v1, v2, v3 = (
                        np.int64(w0[i]), np.int64(w1[i]), np.int64(w2[i]), np.int64(w3[i])
                    )  # fmt: skip
                    a0 += a * v0
                    a1 += a * v1
                    a2 += a * v2
                    a3 += a * v3
                    b0 += b * v0
                    b1 += b * v1
                    b2 += b * v2
                    b3 += b * v3
                out[n, o0], out[n, o1], out[n, o2], out[n, o3] = a0, a1, a2, a3
                out[m, o0], out[m, o1], out[m, o2], out[m, o3] = b0, b1, b2, b3


@compiled(inline="always")
def _add_row(sums, factor, row):  # type: ignore[no-untyped-def]
    for i in range(sums.shape[0]):
        sums[i] += factor * np.int64(row[i])


@compiled(parallel=True)
def _column(x, weight, parts):  # type: ignore[no-untyped-def]
    # One row of x. Each thread sums some of the weight's rows into its own part, a quarter of them
    # in each of four streams of loads, as `_row` does.
    count, inner, columns = parts.shape[0], weight.shape[0], weight.shape[1]
    for part in numba.prange(count):
        first, last = part * inner // count, (part + 1) * inner // count
        sums, quarter = parts[part, 0], (last - first) // 4
        for v0 in range(first, first + quarter):
            v1, v2, v3 = v0 + quarter, v0 + 2 * quarter, v0 + 3 * quarter
            a0, a1, a2, a3 = x[0, v0], x[0, v1], x[0, v2], x[0, v3]
            w0, w1, w2, w3 = weight[v0], weight[v1], weight[v2], weight[v3]
            for i in range(columns):
                sums[i] += (
                    a0 * np.int64(w0[i]) + a1 * np.int64(w1[i])
                    + a2 * np.int64(w2[i]) + a3 * np.int64(w3[i])
                )  # fmt: skip
        for v in range(first + 4 * quarter, last):
            _add_row(sums, x[0, v], weight[v])


@compiled(parallel=True)
def _columns(x, weight, parts):  # type: ignore[no-untyped-def]
    # Each thread sums some of the weight's rows into its own part, for all rows of x, in blocks of
    # rows that fit into a core's L2 cache. Slicing rows before the innermost loop is what lets the
    # compiler vectorize it. As in `_rows`, each loaded word serves two rows of x, and each sum four
    # rows of the weight.
    count, inner, columns = parts.shape[0], weight.shape[0], weight.shape[1]
    depth = max(8, _CACHED_WORDS // max(1, columns))
    for part in numba.prange(count):
        first, last = part * inner // count, (part + 1) * inner // count
        for start in range(first, last, depth):
            stop = min(start + depth, last)
            fours = stop - (stop - start) % 4
            for n in range(0, x.shape[0] - 1, 2):
                sums0, sums1 = parts[part, n], parts[part, n + 1]
                for v in range(start, fours, 4):
                    a0, a1, a2, a3 = x[n, v], x[n, v + 1], x[n, v + 2], x[n, v + 3]
                    b0, b1, b2, b3 = x[n + 1, v], x[n + 1, v + 1], x[n + 1, v + 2], x[n + 1, v + 3]
                    w0, w1, w2, w3 = weight[v], weight[v + 1], weight[v + 2], weight[v + 3]
                    for i in range(columns):
                        v0, v1, v2, v3 = (
                            np.int64(w0[i]), np.int64(w1[i]), np.int64(w2[i]), np.int64(w3[i])
                        )  # fmt: skip
                        sums0[i] += a0 * v0 + a1 * v1 + a2 * v2 + a3 * v3
                        sums1[i] += b0 * v0 + b1 * v1 + b2 * v2 + b3 * v3
                for v in range(fours, stop):
                    _add_row(sums0, x[n, v], weight[v])
                    _add_row(sums1, x[n + 1, v], weight[v])
            if x.shape[0] % 2:
                sums0, n = parts[part, x.shape[0] - 1], x.shape[0] - 1
                for v in range(start, fours, 4):
                    a0, a1, a2, a3 = x[n, v], x[n, v + 1], x[n, v + 2], x[n, v + 3]
                    w0, w1, w2, w3 = weight[v], weight[v + 1], weight[v + 2], weight[v + 3]
                    for i in range(columns):
                        sums0[i] += (
                            a0 * np.int64(w0[i]) + a1 * np.int64(w1[i])
                            + a2 * np.int64(w2[i]) + a3 * np.int64(w3[i])
                        )  # fmt: skip
                for v in range(fours, stop):
                    _add_row(sums0, x[n, v], weight[v])


@compiled(parallel=True)
def _batched(a, b, batch_step, row_step, out):  # type: ignore[no-untyped-def]
    # b: flat words of the second factors, which may be strided, as a part of a longer cache is.
    columns = out.shape[2]
    for index in numba.prange(a.shape[0] * a.shape[1]):
        batch, row = index // a.shape[1], index % a.shape[1]
        sums = out[batch, row]
        for k in range(a.shape[2]):
            factor, first = a[batch, row, k], batch * batch_step + k * row_step
            words = b[first : first + columns]
            for column in range(columns):
                sums[column] += factor * words[column]


@compiled(parallel=True)
def _batched_dots(a, b, batch_step, column_step, out):  # type: ignore[no-untyped-def]
    # Like `_batched`, where b is transposed: its columns are contiguous.
    inner = a.shape[2]
    for index in numba.prange(a.shape[0] * a.shape[1]):
        batch, row = index // a.shape[1], index % a.shape[1]
        factors = a[batch, row]
        for column in range(out.shape[2]):
            first = batch * batch_step + column * column_step
            words, total = b[first : first + inner], np.int64(0)
            for k in range(inner):
                total += factors[k] * words[k]
            out[batch, row, column] = total
