"""Polynomials of opened bits, and the digit tables that supply the bits: exhaustive."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mergec.runtime.core.spec import Cost
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.protocols import peak, rectify
from mergec.runtime.protocols.compare import DIGITS, LESS_THAN
from mergec.runtime.protocols.digits import Digits
from mergec.runtime.protocols.formula import (
    Formula,
    added,
    conjunction,
    negated,
    open_bits,
    shifted,
)
from mergec.runtime.protocols.halves import Halves
from tests.protocols.harness import run, words

FORMULAS = {
    "less than": LESS_THAN,
    "at least": rectify._POSITIVE.formula,
    "less than, short": peak._LESS,
    "between": Formula(added(shifted(Digits(9, 9).less, 4), Digits(9, 9).less, -1)),
    "outside": Formula(negated(Digits(9, 9).less)),
    "all": Formula(conjunction(range(8))),
}
WIDTHS = [(8, 8, 8, 8), (9, 9), (5, 5, 6), (3,), (2, 3), (3, 2, 3)]


def _value(formula: Formula, byte: int) -> int:
    return sum(f * all((byte >> i) & 1 for i in term) for term, f in formula.polynomial.items())


@pytest.mark.parametrize("name", FORMULAS)
def test_unmasking_is_exact_for_every_mask_and_every_bit_pattern(name: str) -> None:
    """All 256 * 256 pairs of bits and mask bits yield the polynomial's value."""
    formula = FORMULAS[name]
    mask = np.arange(256)
    for byte in range(256):
        opened = byte ^ mask
        value = (formula.coefficients[opened] * formula.products[mask].astype(int)).sum(1)
        assert (value == _value(formula, byte)).all()


@pytest.mark.parametrize("name", ["less than", "outside", "all"])
def test_arithmetic_of_polynomials_is_that_of_their_values(name: str) -> None:
    one, other = FORMULAS[name], FORMULAS["between"]
    negation = Formula(negated(one.polynomial))
    both = Formula(added(one.polynomial, other.polynomial, -3))
    for byte in range(256):
        value = _value(one, byte)
        assert _value(negation, byte) == 1 - value
        assert _value(both, byte) == value - 3 * _value(other, byte)


@pytest.mark.parametrize("widths", [w for w in WIDTHS if sum(w) <= 8])
def test_every_pair_of_small_numbers(widths: tuple[int, ...]) -> None:
    digits = Digits(*widths)
    size = 2**digits.width
    mask, points = torch.arange(size), torch.arange(size)
    # Tables of less than a byte are padded by none: only widths of three bits and more are used.
    if min(widths) < 3:
        with pytest.raises(ValueError, match="at least 3 bits"):
            digits.tables(mask)
        return
    bits = digits.look_up(points[:, None].expand(size, size), digits.tables(mask))
    less = Formula(digits.less)
    values = torch.tensor([_value(less, byte) for byte in range(256)])[bits.long()]
    expected = ((points[:, None] - mask[None, :]) >> (digits.width - 1)) & 1
    assert torch.equal(values, expected)


def test_a_digit_has_three_to_twelve_bits() -> None:
    for width in (3, 12):
        assert Digits(width).tables(torch.arange(2)).shape[0] == 2
    for width in (2, 13):
        with pytest.raises(ValueError, match=f"a digit has {width} bits; it needs at least 3"):
            Digits(width).tables(torch.arange(2))


@pytest.mark.parametrize("widths", [w for w in WIDTHS if sum(w) > 8])
def test_sign_of_the_difference_for_all_digit_patterns(widths: tuple[int, ...]) -> None:
    """Every order relation of the digits, at both sides of the sign and of each borrow."""
    digits = Digits(*widths)
    edges = [sorted({0, 1, 2**w - 1, 2 ** (w - 1), 2 ** (w - 1) - 1}) for w in widths]
    shifts = np.cumsum([0, *widths[:-1]])
    numbers = torch.tensor(
        [
            sum(d << int(s) for d, s in zip(p, shifts, strict=True))
            for p in itertools.product(*edges)
        ]
    )
    less = Formula(digits.less)
    table = torch.tensor([_value(less, byte) for byte in range(256)])
    for start in range(0, len(numbers), 100):
        mask = numbers[start : start + 100]
        points = numbers[:, None].expand(len(numbers), len(mask))
        values = table[digits.look_up(points, digits.tables(mask)).long()]
        expected = ((points - mask[None, :]) >> (digits.width - 1)) & 1
        assert torch.equal(values, expected)


def test_layout_of_the_32_bit_window_is_one_byte() -> None:
    assert DIGITS.bits == 8


def test_keys_have_no_more_levels_than_leaves_of_128_places_need() -> None:
    few, most, one, two = (Halves(width).dealt_bytes for width in (3, 7, 8, 9))
    assert few == most
    assert one - most == two - one == 32


@pytest.mark.parametrize("width", [3, 7, 8, 10])
def test_half_of_every_pair_of_numbers(width: int) -> None:
    """The top bit of v - r for all v and r, also where a key has fewer levels than a leaf."""
    halves, numbers = Halves(width), torch.arange(2**width)
    mask = numbers.repeat(max(1, 2 ** (8 - width)))
    simulation = Simulation()

    def protocol(ctx, p):
        yield from ()
        dealt = halves.deal(ctx, len(mask), lambda: mask)
        points = numbers[:, None].expand(len(numbers), len(mask))
        return halves.look_up(points, dealt) if p < 2 else None

    client, server, _ = simulation.run(protocol)
    expected = ((numbers[:, None] - mask[None, :]) >> (width - 1)) & 1
    assert torch.equal((client ^ server).long(), expected)
    assert simulation.cost == Cost(offline=halves.dealt_bytes * len(mask))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_value_times_a_payload_in_any_ring(dtype: torch.dtype) -> None:
    formula = FORMULAS["between"]
    secret = torch.arange(256, dtype=torch.uint8)
    size = 2 ** (8 * dtype.itemsize - 2)
    payload = torch.stack([words(256, -size, size), torch.ones(256, dtype=torch.int64)], 1)
    simulation = Simulation()
    split = torch.from_numpy(np.random.default_rng(1).integers(0, 256, 256, np.uint8))

    def protocol(ctx, p):
        mask = ctx.mask_bits((256,))
        dealt = formula.deal(ctx, mask, lambda: payload, 2, dtype)
        mine = (split, split ^ secret, secret.to("meta"))[p]
        bits = yield from open_bits(ctx, mine, mask)
        return formula.evaluate(bits, dealt)

    result, cost = run(simulation, protocol)
    value = torch.tensor([_value(formula, byte) for byte in range(256)])
    assert torch.equal(result, (value[:, None] * payload).to(dtype))
    assert cost.rounds == 1
    assert cost.online == 2 * 256
