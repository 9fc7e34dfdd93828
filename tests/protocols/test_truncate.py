"""Faithful truncation: at most one unit off, and never a wrap."""

from __future__ import annotations

import pytest
import torch

from mergec.runtime.core.values import logical_shift
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.protocols import squares
from mergec.runtime.protocols.truncate import (
    Truncation,
    _truncate_cpu,
    cut,
    top_bit,
    truncate,
    truncate_cost,
    truncation_parts,
    truncation_words,
    width_of,
    window_of_zeros,
)
from tests.protocols.harness import integers, run, words

EDGE = 2**62 - 1


@pytest.mark.parametrize("shift", [1, 2, 13, 16, 32, 47, 62])
def test_within_one_unit_of_the_floor(shift: int) -> None:
    edges = torch.tensor([0, 1, -1, EDGE, -EDGE, 2**shift, -(2**shift), 2**shift - 1, EDGE - 1])
    values = torch.cat([edges.clamp(-EDGE, EDGE), words(20_000, -EDGE, EDGE)])
    simulation = Simulation()
    shares = integers(simulation, values)
    result, cost = run(simulation, lambda ctx, p: truncate(ctx, shares[p].share, shift))
    error = result - (values >> shift)
    assert set(error.unique().tolist()) <= {0, 1}
    assert cost == truncate_cost(len(values), shift)


def test_every_small_value_under_every_small_mask() -> None:
    """Exhaustive: all |x| below 2**8, all masks of one low byte and edge cases of the high one."""
    shift = 4
    x = torch.arange(-256, 256)[:, None]
    low = torch.arange(256)[None, :]
    for high in (0, 1, 0x3F, 0x40, 0x7F, -0x80, -0x7F, -0x41, -0x40, -1):
        mask = (high << 56) + low
        opened = x + (1 << 62) + mask
        parts = Truncation(opened, shift)
        result = parts.base - logical_shift(mask, shift) + parts.wrap * top_bit(mask)
        assert set((result - (x >> shift)).unique().tolist()) <= {0, 1}


def _edges_and_words(dtype: torch.dtype) -> torch.Tensor:
    info = torch.iinfo(dtype)
    edges = torch.tensor([0, 1, -1, info.max, info.min, info.min + 1, info.max // 2, info.min // 2])
    return torch.cat([edges, words(3_000, info.min, info.max)]).to(dtype)


@pytest.mark.parametrize("at_client", [False, True])
@pytest.mark.parametrize(
    ("dtype", "shift"),
    [(torch.int32, 0), (torch.int32, 7), (torch.int32, 30)]
    + [(torch.int64, shift) for shift in (0, 1, 16, 31, 62)],
)
def test_kernels_compute_what_words_of_tensors_do(
    dtype: torch.dtype, shift: int, at_client: bool
) -> None:
    """Equal bit for bit, on words that belong to no value."""
    mask = _edges_and_words(dtype)
    opened = mask.flip(0)
    low = logical_shift(mask.long() & (0xFFFFFFFF if dtype is torch.int32 else -1), shift)
    parts = truncation_parts(mask[:, None], shift)
    assert torch.equal(parts, torch.stack([torch.ones_like(low), low, top_bit(mask)], -1)[:, None])
    assert torch.equal(truncation_words(mask, shift), torch.stack([low, top_bit(mask)]))

    x, dealt = Truncation(opened, shift), words(2 * len(mask), -(2**63), 2**63 - 1).reshape(2, -1)
    found = torch.empty(len(mask), dtype=torch.int64)
    _truncate_cpu(opened.numpy(), dealt.numpy(), shift, width_of(opened), at_client, found.numpy())
    assert torch.equal(found, (x.base if at_client else 0) - dealt[0] + x.wrap * dealt[1])


@pytest.mark.parametrize("at_client", [False, True])
@pytest.mark.parametrize("shift", [0, 1, 16, 62])
def test_kernels_of_squares_compute_what_words_of_tensors_do(shift: int, at_client: bool) -> None:
    mask = _edges_and_words(torch.int64)
    low, found = logical_shift(mask, shift), torch.empty((4, len(mask)), dtype=torch.int64)
    squares._deal_cpu(mask.numpy(), shift, found.numpy())
    assert torch.equal(found, torch.stack([top_bit(mask), low, low * low, low * top_bit(mask)]))

    opened = mask.flip(0)
    x, dealt = Truncation(opened, shift), words(4 * len(mask), -(2**63), 2**63 - 1).reshape(4, -1)
    share = torch.empty(len(mask), dtype=torch.int64)
    squares._square_cpu(opened.numpy(), dealt.numpy(), shift, at_client, share.numpy())
    top, low, low_square, low_top = dealt
    expected = low_square + (x.wrap * x.wrap + 2 * x.base * x.wrap) * top
    expected += (x.base * x.base if at_client else 0) - 2 * x.base * low - 2 * x.wrap * low_top
    assert torch.equal(share, expected)


def test_no_wrap_among_many_large_values() -> None:
    """CrypTen's local truncation fails here about every second time."""
    values = torch.full((500_000,), EDGE)
    values[::2] = -EDGE
    simulation = Simulation()
    shares = integers(simulation, values)
    result, _ = run(simulation, lambda ctx, p: truncate(ctx, shares[p].share, 16))
    assert bool(((result - (values >> 16)).abs() <= 1).all())


def test_is_unbiased() -> None:
    values = torch.full((200_000,), 3 * 2**14)
    simulation = Simulation()
    shares = integers(simulation, values)
    result, _ = run(simulation, lambda ctx, p: truncate(ctx, shares[p].share, 16))
    # The mean of 200,000 coin flips with probability 3/4, within five standard deviations.
    assert abs(result.double().mean() - 0.75) < 5 * (0.1875 / 200_000) ** 0.5


@pytest.mark.parametrize("drop", [0, 1, 16, 32])
def test_bits_are_dropped_before_the_opening_unless_rounding_is_exact(drop: int) -> None:
    """With exact rounding they are opened with the rest, and hidden from the client."""
    values = words(500, -(2**46), 2**46)
    for exact in (False, True):
        simulation = Simulation(exact=exact)
        shares = integers(simulation, values)
        cuts = [cut(ctx, shares[p].share, drop) for p, ctx in enumerate(simulation.contexts)]
        later = drop if exact else 0
        assert all((each.drop, each.hidden) == (later, later) for each in cuts)
        assert all(each.share.dtype is (torch.int64 if later else torch.int32) for each in cuts)
        if not later:
            error = (cuts[0].share + cuts[1].share - (values >> drop)).to(torch.int32)
            assert set(error.tolist()) <= {0, 1 if drop else 0}
    for drop in (-1, 33):
        with pytest.raises(ValueError, match=f"cannot leave out the lowest {drop}"):
            cut(simulation.contexts[0], values, drop)


def test_halves_of_zero_are_zero_whatever_its_shares_are() -> None:
    simulation = Simulation()
    client, server, _ = simulation.contexts
    edges = torch.tensor([0, 1, -1, 2**32, -(2**32), 2**32 - 1, 2**63 - 1, -(2**63)])
    some = torch.cat([edges, words(5000, -(2**63), 2**63 - 1)])
    zero = window_of_zeros(client, some) + window_of_zeros(server, -some)
    assert not bool(zero.any())
    x = words(len(some), -(2**61), 2**61, 1)
    upper = (window_of_zeros(client, some) + window_of_zeros(server, x - some)).double()
    assert (upper - x.double() * 2.0**-32).abs().max() < 1


def test_negative_shift_multiplies_locally() -> None:
    simulation = Simulation()
    shares = integers(simulation, torch.tensor([3, -5]))
    result, cost = run(simulation, lambda ctx, p: truncate(ctx, shares[p].share, -4))
    assert result.tolist() == [48, -80]
    assert cost.rounds == cost.online == cost.offline == 0
