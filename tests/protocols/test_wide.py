"""Shares modulo 2**128: products of openings as whole numbers, local truncation, what is seen."""

from __future__ import annotations

import pytest
import torch

from mergec.runtime.core.context import ShapeContext
from mergec.runtime.core.spec import CLIENT, DEALER, SERVER, Vis
from mergec.runtime.core.values import Held, Wide
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.ops.rotary import Rotary
from mergec.runtime.protocols.opening import open_under
from mergec.runtime.protocols.truncate import OFFSET
from mergec.runtime.protocols.wide import (
    Factors,
    added_wide,
    fits_wide,
    narrow,
    narrow_of_zeros,
    scaled_wide,
    scaled_wide_cost,
    shifted_wide,
)
from tests.protocols.harness import uniform_bytes, wide_value, words

WHOLE = 1 << 128


def split(numbers: list[int], simulation: Simulation, frac: int = 0) -> list[Wide]:
    """Fresh shares modulo 2**128 of whole numbers; the dealer's has no data."""
    count = len(numbers)
    low, high = (simulation.share(torch.zeros(count), 0)[CLIENT].share for _ in range(2))
    rest = [
        (n - (int(a) % 2**64) - (int(b) << 64)) % WHOLE
        for n, a, b in zip(numbers, low, high, strict=True)
    ]
    signed = [[_signed(n % 2**64) for n in rest], [_signed(n >> 64) for n in rest]]
    server = torch.tensor(signed)
    ghost = low.to("meta")
    return [Wide(low, high, frac), Wide(server[0], server[1], frac), Wide(ghost, ghost, frac)]


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def whole(client: Wide, server: Wide) -> list[int]:
    """The sum of two shares as whole numbers of either sign."""
    found = []
    for a, b, c, d in zip(client.low, client.high, server.low, server.high, strict=True):
        total = (int(a) + (int(b) << 64) + int(c) + (int(d) << 64)) % WHOLE
        # int() of a lower half is signed: so is what it lacks.
        total += 2**64 * ((int(a) < 0) + (int(c) < 0))
        total %= WHOLE
        found.append(total - WHOLE if total >= WHOLE // 2 else total)
    return found


@pytest.mark.parametrize(
    "shifts", [[3, 5, 7], [10, 10, 12, 30], [1], [62, 62], [16, 16, 20, 20, 33, 62]], ids=str
)
def test_the_products_of_two_openings_are_exact(shifts: list[int]) -> None:
    """For rows of any size and sign, against whole numbers."""
    rows, size, columns = 5, 40, len(shifts)
    x = words(rows * size, -(2**62) + 1, 2**62, seed=1).reshape(rows, size)
    x[0, :6] = torch.tensor([0, 1, -1, 2**62 - 1, -(2**62) + 1, 2**40])
    base = words(rows * columns, -(2**42), 2**42, seed=2).reshape(rows, columns)
    wrap = words(rows * columns, 0, 2, seed=3).reshape(rows, columns) << 41
    low = words(rows * columns, 0, 2**42, seed=4).reshape(rows, columns)
    top = words(rows * columns, 0, 2, seed=5).reshape(rows, columns)
    simulation = Simulation()
    shares = simulation.share(x, 0)
    opened: dict[int, torch.Tensor] = {}

    def protocol(ctx, party):  # type: ignore[no-untyped-def]
        mask = ctx.mask(x.shape)
        opened[party] = yield from open_under(ctx, shares[party].share, mask, OFFSET)
        if party == DEALER:
            opened[DEALER] = mask
        factors = Factors(base, wrap, lambda: (low, top))
        return Wide(*scaled_wide(ctx, opened[party], mask, factors, shifts), 0)

    simulation.cost = type(simulation.cost)()
    client, server, dealer = simulation.run(protocol)
    assert dealer.low.is_meta
    assert simulation.cost.offline == scaled_wide_cost(shifts, rows, size).offline
    assert simulation.to_client.total == 0
    for row in range(rows):
        pairs = (Wide(v.low[row], v.high[row], 0) for v in (client, server))
        for e, found in enumerate(whole(*pairs)):
            z, r = (int(opened[party][row, e]) % 2**64 for party in (CLIENT, DEALER))
            wanted = 0
            for k, s in enumerate(shifts):
                wrapped = (r >> 63) * (1 - (z >> 63)) << (64 - s)
                part = (z >> s) - (r >> s) + wrapped - (1 << (62 - s))
                assert part - (int(x[row, e]) >> s) in (0, 1)
                factor = int(base[row, k]) - int(low[row, k]) + int(wrap[row, k] * top[row, k])
                wanted += part * factor
            assert found == wanted


@pytest.mark.parametrize("drop", [1, 7, 44, 63])
def test_zero_stays_zero_where_bits_are_dropped(drop: int) -> None:
    """Whatever its shares are; other numbers are less than one unit off, and right on average."""
    edges = [0, 1, -1, 2**drop, -(2**drop), 2**drop - 1, (2**62) << drop, -(2**62) << drop]
    numbers = [0] * 4000 + [2**drop // 3] * 4000 + edges * 100
    simulation = Simulation()
    views = split(numbers, simulation)
    found = [narrow_of_zeros(ctx, views[p], drop) for p, ctx in enumerate(simulation.contexts)]
    total = found[0] + found[1]
    assert not bool(total[:4000].any())
    for seen, number in zip(total.tolist(), numbers, strict=True):
        assert abs((seen << drop) - number) < 2**drop
    assert abs(float(total[4000:8000].double().mean()) - (2**drop // 3) * 2.0**-drop) < 0.05
    for share in found[:2]:
        assert abs(uniform_bytes([share[:4000].contiguous()])) < 6.5


@pytest.mark.parametrize("drop", [1, 7, 38, 63, 64])
def test_dropping_bits_rounds_up_or_down_with_the_right_expectation(drop: int) -> None:
    numbers = [n << drop >> 3 for n in range(-40, 41)] * 500
    numbers += [(2**62) << drop, -(2**62) << drop, (2**62 << drop) + 1]
    simulation = Simulation()
    views = split(numbers, simulation)
    found = [narrow(ctx, views[p], drop) for p, ctx in enumerate(simulation.contexts)]
    total = found[0] + found[1]
    over = [int(n) - (m >> drop) for n, m in zip(total, numbers, strict=True)]
    assert set(over) <= {0, 1}
    exact = torch.tensor([m / 2**drop for m in numbers[:-3]])
    mean = float((total[:-3].double() - exact).mean())
    assert abs(mean - 2.0**-drop) < 5 * 0.5 / len(exact) ** 0.5


def test_no_other_number_of_bits_is_dropped_at_once() -> None:
    ghost = torch.empty(3, device="meta")
    for drop in (0, -1, 65):
        with pytest.raises(ValueError, match="bits are dropped at once"):
            narrow(ShapeContext(), Wide(ghost, ghost, 70), drop)
    with pytest.raises(ValueError, match="shifted down by"):
        scaled_wide(
            ShapeContext(), ghost, ghost, Factors(ghost, ghost, lambda: (ghost, ghost)), [0]
        )
    assert fits_wide([1, 62]) and not fits_wide([0, 3]) and not fits_wide([3, 63])


def test_shifts_and_sums_are_exact() -> None:
    generator = torch.Generator().manual_seed(2)
    numbers = [int(n) << 20 for n in torch.randint(-(2**60), 2**60, (64,), generator=generator)]
    simulation = Simulation()
    views = split(numbers, simulation, 16)
    bits = torch.arange(64) % 30
    client, server, _ = (shifted_wide(view, bits) for view in views)
    assert whole(client, server) == [n << int(b) for n, b in zip(numbers, bits, strict=True)]
    held = torch.linspace(-9, 9, 64, dtype=torch.float64)
    away = Held(Vis.SERVER, held.to("meta"))
    client, server = added_wide(views[0], away), added_wide(views[1], Held(Vis.SERVER, held))
    wanted = [n + round(float(h) * 2**16) for n, h in zip(numbers, held, strict=True)]
    assert whole(client, server) == wanted


@pytest.mark.parametrize("frac", [16, 54, 62])
@pytest.mark.parametrize("parts", [(), (1, 3, 1, 0)])
def test_a_constant_that_64_bits_do_not_hold_is_refused(frac: int, parts: tuple[int, ...]) -> None:
    """At the largest that fits it is added exactly, and just beyond nothing is added."""
    bits = 63 - frac - (parts[1] if parts else 0)
    fits = 2.0**bits * (1 - 2.0**-20)
    for sign in (1.0, -1.0):
        views = split([5, -7], Simulation(), frac)
        given = torch.tensor([sign * fits, 0.0], dtype=torch.float64)
        held = Held(Vis.SERVER, given)
        client, server = views[CLIENT], added_wide(views[SERVER], held, parts)
        lift = 2 ** (frac + (parts[1] if parts else 0))
        assert whole(client, server) == [5 + int(sign * fits * lift), -7]
        beyond = Held(Vis.SERVER, torch.tensor([0.0, sign * 2.0 ** (63 - frac)]).double())
        with pytest.raises(ValueError, match=rf"2\*\*{63 - frac} or more has no room in 64 bits"):
            added_wide(views[SERVER], beyond, parts)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("size", [8, 4])
def test_rotary_embeddings_are_those_of_narrow_shares(size: int, interleaved: bool) -> None:
    """Whole numbers beyond the ring of 64 bits too, for all features or the first of them."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-(2**50), 2**50, (3 * 8,), generator=generator)
    angles = torch.rand(3, size, generator=generator).double() * 6
    for lift in (0, 30):
        simulation = Simulation()
        numbers = [int(n) << lift for n in x]
        views = [
            Wide(v.low.reshape(1, 1, 3, 8), v.high.reshape(1, 1, 3, 8), 38)
            for v in split(numbers, simulation)
        ]
        results = simulation.run(
            lambda ctx, p, v=views: Rotary.protocol(
                ctx, v[p], angles.cos(), angles.sin(), interleaved
            )
        )
        assert results[DEALER].low.is_meta and results[CLIENT].frac == 38 + 16
        found = wide_value(results[0], results[1]) * 2.0 ** -(16 + lift)
        exact = Rotary.reference(
            x.double().reshape(1, 1, 3, 8), angles.cos(), angles.sin(), interleaved
        )
        assert float((found - exact).abs().max()) < 2.0 ** (51 - 16)


def test_what_the_server_is_sent_is_uniform_whatever_the_masks_are() -> None:
    simulation = Simulation()
    kept, write = [], simulation.to_server.write
    simulation.to_server.write = lambda data: (kept.append(data.clone()), write(data))[1]  # type: ignore[method-assign]
    mask = torch.full((40, 30), 2**63 - 1)
    ones = torch.ones(40, 2, dtype=torch.int64)

    def protocol(ctx, party):  # type: ignore[no-untyped-def]
        yield from ()
        factors = Factors(ones, ones, lambda: (ones, ones))
        return scaled_wide(ctx, mask, mask, factors, [4, 9])

    simulation.run(protocol)
    assert sum(len(data) for data in kept) == scaled_wide_cost([4, 9], 40, 30).offline
    for data in kept:
        assert abs(uniform_bytes([data])) < 6.5
