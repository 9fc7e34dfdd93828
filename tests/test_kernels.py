"""Matrix products modulo 2**64: every path against torch's own int64 product."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numba
import pytest
import torch

from mergec.runtime.kernels import matmul as kernels
from tests.roles import ROOT

GENERATOR = torch.Generator().manual_seed(5)


@pytest.fixture(autouse=True, params=[0, kernels._ALONE], ids=["all-threads", "few-alone"])
def alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Pairs of words below which one thread multiplies them."""
    monkeypatch.setattr(kernels, "_ALONE", request.param)
    return int(request.param)


def words(*shape: int, bits: int = 63) -> torch.Tensor:
    return torch.randint(-(2**bits), 2**bits - 1, shape, generator=GENERATOR)


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_products_with_a_weight(rows: int, dtype: torch.dtype) -> None:
    weight = words(37, 70, bits=31 if dtype is torch.int32 else 63).to(dtype)
    x, y = words(2, rows, 70), words(rows, 37)
    assert torch.equal(kernels.matmul_rows(x, weight), x @ weight.long().T)
    assert torch.equal(kernels.matmul_columns(y, weight), y @ weight.long())


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("outputs", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_in_groups_and_columns_in_runs(rows: int, outputs: int, dtype: torch.dtype) -> None:
    """Incomplete groups of rows, and more columns than are multiplied at once."""
    info = torch.iinfo(dtype)
    for inner in (1, kernels._COLUMN, 2 * kernels._COLUMN + 9):
        weight = words(outputs, inner, bits=info.bits - 1).to(dtype)
        x = words(rows, inner)
        weight[:, :2], x[:, 1:2] = info.min, -(2**63)
        assert torch.equal(kernels.matmul_rows(x, weight), x @ weight.long().T)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize(("inner", "columns"), [(1, 3), (6, 3), (21, kernels._CACHED_WORDS // 8)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_columns_in_groups_and_rows_in_runs(
    rows: int, inner: int, columns: int, dtype: torch.dtype
) -> None:
    """Incomplete groups of rows, and more of them than are multiplied at once."""
    info = torch.iinfo(dtype)
    weight, x = words(inner, columns, bits=info.bits - 1).to(dtype), words(rows, inner)
    weight[:2], x[:, :1] = info.min, -(2**63)
    assert torch.equal(kernels.matmul_columns(x, weight), x @ weight.long())


def test_batched_products_broadcast() -> None:
    a, b = words(2, 1, 5, 7), words(3, 7, 4)
    assert torch.equal(kernels.matmul(a, b), torch.matmul(a, b))
    turned = words(3, 4, 7).transpose(-1, -2)
    assert torch.equal(kernels.matmul(a, turned), torch.matmul(a, turned))


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("features", [1, 6])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("groups", [1, 3])
def test_batched_products_with_a_part_of_a_tensor(
    length: int, features: int, rows: int, groups: int
) -> None:
    """A cache with room for more entries: its rows are not contiguous."""
    part = words(2, groups, 12, features)[:, :, 2 : 2 + length]
    first = words(2, groups, rows, length)
    assert torch.equal(kernels.matmul(first, part), torch.matmul(first, part))
    query, turned = words(2, groups, features, rows).mT, part.mT
    assert torch.equal(kernels.matmul(query, turned), torch.matmul(query, turned))
    strided = words(2, groups, features, 2 * length)[..., ::2]
    assert torch.equal(kernels.matmul(query, strided), torch.matmul(query, strided))


def test_few_words_are_multiplied_by_one_thread(
    alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others are not woken for them, and serve the next product again."""
    before, used = numba.get_num_threads(), []

    def noted(kernel: Any) -> Any:
        def run(*arguments: Any) -> None:
            used.append(numba.get_num_threads())
            kernel(*arguments)

        return run

    for name in ("_row", "_rows", "_column", "_columns", "_batched", "_batched_dots"):
        monkeypatch.setattr(kernels, name, noted(getattr(kernels, name)))
    for size in (2, 300):
        a, b = words(1, 1, size), words(1, size, size)
        kernels.matmul(a, b)
        kernels.matmul(a, b.mT)
        kernels.matmul_rows(a, b[0])
        kernels.matmul_rows(a.expand(1, 2, size), b[0])
        kernels.matmul_columns(a, b[0])
        kernels.matmul_columns(a.expand(1, 2, size), b[0])
    assert used == [1 if alone else before] * 6 + [before] * 6
    assert numba.get_num_threads() == before


def test_limb_products_are_exact_at_the_largest_words() -> None:
    """The path for CUDA, on the CPU."""
    extreme = torch.full((3, 5000), -1)
    assert torch.equal(kernels._limb_product(extreme, extreme.T), extreme @ extreme.T)
    a, b = words(4, 300), words(300, 6)
    assert torch.equal(kernels._limb_product(a, b), a @ b)


def test_empty_and_meta_operands() -> None:
    empty = kernels.matmul(words(1, 2, 3, 0), words(1, 2, 0, 4))
    assert empty.shape == (1, 2, 3, 4)
    assert not empty.any()
    ghost = torch.empty(2, 70, dtype=torch.int64, device="meta")
    weight = words(37, 70)
    assert kernels.matmul_rows(ghost, weight).shape == (2, 37)
    assert kernels.matmul_rows(ghost, weight).is_meta


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS > 1, reason="the tests above have the threads")
def test_products_on_two_threads() -> None:
    """The tests of this file, as each process of the others has one thread."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout
