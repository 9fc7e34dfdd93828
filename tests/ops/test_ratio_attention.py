"""Rows that a ratio could not take: without weight, very long, of very large scores."""

from __future__ import annotations

import pytest
import torch

from mergec.runtime.core.spec import Cost
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.ops import load_all
from mergec.runtime.ops.ratio_attention import KINDS, LARGEST_BOUND, RatioAttention
from mergec.runtime.protocols.opening import open_masked

load_all()
GENERATOR = torch.Generator().manual_seed(3)


def run(q, k, v, mask, kind: str, bound: float = 0.0, softcap: float = 0.0) -> torch.Tensor:
    """The largest error of the protocol, at the cost that the formula says."""
    simulation = Simulation()
    views = []
    for value in (q, k, v):
        shares = simulation.share(value)
        views.append(simulation.run(lambda ctx, p, shares=shares: open_masked(ctx, shares[p])))
    simulation.cost = Cost()
    rest = (mask, 0.25, softcap, kind, bound)
    results = simulation.run(
        lambda ctx, p: RatioAttention.protocol(ctx, *(view[p] for view in views), *rest)
    )
    assert simulation.cost == RatioAttention.cost(*(view[2] for view in views), *rest, fixed=16)
    expected = RatioAttention.reference(q, k, v, *rest)
    assert torch.isfinite(expected).all()
    return (simulation.reveal(results) - expected).abs().max()


def real(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR) * scale


def test_all_weights_vanish() -> None:
    """Scores of -5 for 2Quad, negative ones for 2ReLU: rows are plain means."""
    q, v = torch.ones(1, 2, 3, 4, dtype=torch.float64), real(1, 2, 7, 4)
    mask = torch.full((3, 7), -3e38).triu(5)
    for kind, key in (("2quad", -5.0), ("2relu", -3.0)):
        k = torch.full((1, 2, 7, 4), key, dtype=torch.float64)
        means = torch.stack([v[:, :, : row + 5].mean(-2) for row in range(3)], -2)
        assert torch.allclose(RatioAttention.reference(q, k, v, mask, 0.25, 0.0, kind), means)
        assert run(q, k, v, mask, kind) < 2e-3


@pytest.mark.parametrize("kind", KINDS)
def test_one_entry_and_many(kind: str) -> None:
    for length in (1, 2, 700):
        q, k, v = real(1, 1, 1, 8), real(1, 1, length, 8), real(1, 1, length, 8)
        assert run(q, k, v, None, kind) < 2e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_scores(kind: str) -> None:
    bound = LARGEST_BOUND[kind]
    q = torch.full((1, 1, 2, 4), 32.0, dtype=torch.float64)
    k = real(1, 1, 9, 4).sign() * (bound - 8) / 32
    assert run(q, k, real(1, 1, 9, 4, scale=8), None, kind, bound) < 0.05


def test_masked_entries_are_no_part_of_the_cost() -> None:
    q, k, v = real(1, 2, 4, 8), real(1, 2, 4, 8), real(1, 2, 4, 8)
    causal = torch.full((4, 4), -3e38).triu(1)
    for kind in KINDS:
        run(q, k, v, causal, kind)


def test_a_mask_of_one_precision_more() -> None:
    q, k, v = (real(1, 1, 2, 8) for _ in range(3))
    assert run(q, k, v, torch.tensor([[0.0, -1e4], [-2.5, 0.0]]), "2quad", softcap=20.0) < 2e-3
