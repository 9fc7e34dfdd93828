"""Windows of shares: which bits they hold, and which there are."""

from __future__ import annotations

import pytest
import torch

from mergec.runtime.core.spec import CLIENT, DEALER, SERVER, Cost
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.kernels.long import added
from mergec.runtime.protocols.compare import take_window
from mergec.runtime.protocols.opening import Cut, open_long
from tests.protocols.harness import integers, words


def test_window_of_high_bits_is_exact_up_to_one_unit() -> None:
    values = words(50_000, -(2**61), 2**61)
    simulation = Simulation()
    shares = integers(simulation, values)
    drop = 31
    total = sum(take_window(shares[p].share, drop) for p in (0, 1))
    error = total.long() - (values >> drop)
    # A borrow from the dropped bits costs one unit; modulo 2**32 the top is right.
    assert set(error.unique().tolist()) <= {0, -1}


@pytest.mark.parametrize("halves", [1, 2, 5])
def test_long_words_are_opened_under_one_mask(halves: int) -> None:
    """To both parties, with every carry."""
    x, own = (
        words(300 * halves, -(2**31), 2**31, seed).to(torch.int32).reshape(-1, halves)
        for seed in (1, 2)
    )
    x[:3] = torch.tensor([[0], [-1], [1]], dtype=torch.int32)
    shares, masks = (own, added(x, _negative(own)), x.to("meta")), {}

    def protocol(ctx, p):
        masks[p] = ctx.long_mask(*x.shape)
        return (yield from open_long(ctx, shares[p], masks[p]))

    simulation = Simulation()
    simulation.cost = Cost()
    client, server, dealer = simulation.run(protocol)
    assert dealer.is_meta and torch.equal(client, server)
    assert torch.equal(client, added(x, masks[DEALER]))
    assert torch.equal(masks[DEALER], added(masks[CLIENT], masks[SERVER]))
    assert simulation.cost == Cost(1, 8 * halves * len(x))


def _negative(words_: torch.Tensor) -> torch.Tensor:
    one = torch.zeros_like(words_)
    one[:, 0] = 1
    return added(~words_, one)


def test_only_windows_that_lie_within_the_word() -> None:
    """Both ways to take a window: bits dropped before the opening, or after it."""
    share = words(3, -(2**63), 2**63 - 1)
    for drop in (0, 32):
        assert take_window(share, drop).dtype is torch.int32
        assert Cut(share, drop, drop).drop == drop
    for drop in (-1, 33):
        with pytest.raises(ValueError, match=f"the lowest {drop}"):
            take_window(share, drop)
        with pytest.raises(ValueError, match=f"begins at bit {drop}"):
            Cut(share, drop, drop)
