"""Selected lines against the plain formula: every pattern of bits, and x at its ends."""

from __future__ import annotations

import pytest
import torch

from mergec.runtime.core.spec import CLIENT, DEALER, SERVER
from mergec.runtime.core.values import Masked
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.protocols.compare import LESS_THAN
from mergec.runtime.protocols.digits import Digits
from mergec.runtime.protocols.formula import Formula, added, open_bits, shifted
from mergec.runtime.protocols.opening import open_masked, open_under
from mergec.runtime.protocols.selection import Line, Selection
from mergec.runtime.protocols.truncate import NARROW_OFFSET, Truncation, truncation_parts
from tests.protocols.harness import run, words

FORMULAS = [
    LESS_THAN,
    Formula(added(shifted(Digits(9, 9).less, 4), Digits(9, 9).less, -1)),
    Formula({frozenset({0}): 1}),
]
LINES = [
    Line(),
    Line(shift=10),
    Line(shift=30, scale=-5, constant=2**63 - 1),
    Line(scale=1 << 16, constant=-(2**40)),
    Line(scale=0, constant=-7),
]
EDGES = torch.tensor([2**30 - 1, -(2**30), -1, 0, 1, 2**29, -(2**29) - 1])
COUNT = 256 * len(EDGES)


def _value(formula: Formula, byte: int) -> int:
    return sum(f * all((byte >> i) & 1 for i in term) for term, f in formula.polynomial.items())


@pytest.mark.parametrize("formula", FORMULAS, ids=["less", "between", "one bit"])
@pytest.mark.parametrize("line", LINES, ids=str)
@pytest.mark.parametrize("multiplied", [False, True])
def test_it_is_the_line_where_the_bits_say_so(
    formula: Formula, line: Line, multiplied: bool
) -> None:
    selection, simulation = Selection(formula, line), Simulation()
    secret = torch.arange(256, dtype=torch.uint8).repeat(len(EDGES))
    number = EDGES.repeat_interleave(256)
    x = [share.share.to(torch.int32) for share in simulation.share(number, 0)]
    times = words(COUNT, -(2**63), 2**63 - 1)
    y = simulation.share(times, 0)
    split = words(COUNT, 0, 256, seed=1).to(torch.uint8)
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def protocol(ctx, p):
        mask, bit_mask = ctx.mask((COUNT,), torch.int32), ctx.mask_bits((COUNT,))
        opened = yield from open_under(ctx, x[p], mask, NARROW_OFFSET)
        bits = yield from open_bits(ctx, (split, split ^ secret, secret.to("meta"))[p], bit_mask)
        factor: Masked | None = None
        if multiplied:
            factor = yield from open_masked(ctx, y[p])
        dealt = selection.deal(ctx, bit_mask, mask, factor)
        seen[p] = opened, mask
        if p == DEALER:
            return torch.empty(COUNT, dtype=torch.int64, device="meta")
        total = torch.zeros(COUNT, dtype=torch.int64)
        selection.add(total, bits, dealt, opened, factor)
        return total

    result, cost = run(simulation, protocol)
    parts = Truncation(seen[CLIENT][0], line.shift)
    _, low, top = truncation_parts(seen[DEALER][1], line.shift).unbind(-1)
    truncated = parts.base - low + parts.wrap * top
    assert bool(((truncated - (number >> line.shift)) & -2 == 0).all()), "floor, or one more"
    chosen = torch.tensor([_value(formula, byte) for byte in range(256)])[secret.long()]
    expected = chosen * (line.scale * truncated + line.constant)
    assert torch.equal(result, expected * times if multiplied else expected)
    assert torch.equal(seen[CLIENT][0], seen[SERVER][0])
    assert cost.offline == 8 * COUNT * selection.words(int(multiplied))


@pytest.mark.parametrize("shift", [-1, 31, 64])
def test_a_shift_beyond_the_number_is_refused(shift: int) -> None:
    with pytest.raises(ValueError, match=f"cannot be shifted by {shift}"):
        Line(shift)
