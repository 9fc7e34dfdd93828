"""Functions over many octaves: exactly one octave serves each number, whatever its mask is."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from mergec.runtime.core.context import ShapeContext
from mergec.runtime.core.spec import CLIENT, SERVER
from mergec.runtime.correlations.dpf import Generator, HostKeys, signed, unsigned
from mergec.runtime.correlations.prg import Prg, new_seed
from mergec.runtime.engine.rehearsal import drive
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.kernels.aes import LANES
from mergec.runtime.kernels.doubles import plus
from mergec.runtime.protocols.normalize import RowNorm
from mergec.runtime.protocols.octave import (
    Descent,
    Octaves,
    _correct,
    _trees,
    columns,
    columns_cost,
    descend_by_instructions,
    descend_by_library,
)
from mergec.runtime.protocols.power import Mantissa
from mergec.runtime.protocols.rows import MAX_ROW, inverse
from tests.protocols.harness import integers, run, uniform_bytes

DESCENDS = [
    descend_by_library,
    pytest.param(
        descend_by_instructions,
        marks=pytest.mark.skipif(not LANES, reason="this processor has no instructions for AES"),
    ),
]


def _words(*shape: int) -> np.ndarray:
    return Prg(new_seed()).words(shape, np.dtype(np.uint64))


def _found(
    spec: Octaves, tree: Descent, lifted: torch.Tensor, mask: torch.Tensor, descend
) -> torch.Tensor:
    """The columns for numbers, shifted up, under these masks."""
    generator, count = Generator(tree.blocks), len(lifted)
    roots = _words(count, 2), _words(count, 2)
    corrections = unsigned(_correct(mask, tree, generator, tuple(map(signed, roots))))
    points = (lifted + mask).numpy()
    out = np.zeros((count, spec.columns, tree.width), np.int64)
    for party in (CLIENT, SERVER):
        descend(points, HostKeys(roots[party], corrections), tree, party, generator, out)
    return _whole(torch.from_numpy(out))


def _whole(found: torch.Tensor) -> torch.Tensor:
    """Opened columns [n, columns, width], which fit into 64 bits."""
    if found.shape[-1] > 1:
        assert torch.equal(found[..., 1], found[..., 0] >> 63)
    return found[..., 0]


def _opened_wide(simulation: Simulation, protocol) -> torch.Tensor:
    """The sum of both parties' shares modulo 2**128."""
    client, server, _ = simulation.run(protocol)
    halves = plus((client[..., 0], client[..., 1]), (server[..., 0], server[..., 1]))
    return _whole(torch.stack(halves, -1))


@pytest.mark.parametrize("descend", DESCENDS)
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("high", [1, 4])
def test_every_small_number_under_every_mask(high: int, width: int, descend) -> None:
    """All carries between z and r at all octaves, and any bits of the mask above."""
    spec = Octaves(0, high, 1, Mantissa(-1.0, 1.0), 60)
    (tree,) = _trees(spec, exact=False, width=width)
    low = torch.arange(2**tree.top)
    above = torch.from_numpy(_words(len(low)).view(np.int64)) << tree.top
    for value in range(2 ** (high + 1)):
        lifted = torch.full_like(low, value) << spec.lift(exact=False)
        found = _found(spec, tree, lifted, low + above, descend)
        assert bool(((found != 0).sum(1) == 1).all()), value
        place = found.argmax(1)
        real = found.gather(1, place[:, None])[:, 0].double() * 2.0**-spec.frac
        if value == 0:
            assert bool((place == 0).all()) and bool((real - 1).abs().max() < 0.2)
            continue
        # A number less than a window below a power of two may be in the octave above.
        octave = int(np.log2(value))
        after = octave + int(value >= 2.0 ** (octave + 1) * (1 - 2**-5))
        assert set(place.tolist()) <= {octave, after}
        exact = 2.0 ** place.double() / value
        assert (real / exact - 1).abs().max() < 2**-17


@pytest.mark.parametrize("descend", DESCENDS)
def test_every_small_number_under_every_mask_with_exact_rounding(descend) -> None:
    """The bumps of all octaves add up to one; each octave has its own carry."""
    spec = Octaves(0, 2, 1, Mantissa(-1.0, 1.0), 60)
    trees = _trees(spec, exact=True)
    low = torch.arange(2 ** trees[0].top)
    weights = 2.0 ** -torch.arange(spec.columns, dtype=torch.float64)
    for value in range(1, 2**3):
        lifted = torch.full_like(low, value) << spec.lift(exact=True)
        ends = []
        for tree in trees:
            found = _found(spec, tree, lifted, low, descend).double() * 2.0**-spec.frac
            real = (found * weights).sum(1)
            ends.append((real.min(), real.max()))
        least, most = (float(sum(end)) for end in zip(*ends, strict=True))
        assert max(abs(least * value - 1), abs(most * value - 1)) < 2**-17


SPECS = {
    "softmax": inverse(129, "pairs").octaves,
    "long softmax": inverse(MAX_ROW, "pairs").octaves,
    "norm": RowNorm(576, 32, 1e-5, 2.0**18).inverse_root.octaves,
    "norm of any row": RowNorm(4, 6, 0.0, 1.0).inverse_root.octaves,
    "one column": Octaves(3, 40, 38, np.log2, 55),
    "three octaves": Octaves(20, 22, 2, np.sqrt, 58),
    **{
        f"factor {factor}": Octaves(9, 30, 4, Mantissa(-0.5, factor), 60)
        for factor in (1.0, 1.25, 2**0.5, 1.999)
    },
}


def _numbers(spec: Octaves) -> torch.Tensor:
    """Both ends; powers of two, windows' ends and their neighbours; and numbers of any size."""
    places = [2**k * i // 16 + d for k in range(spec.low, spec.high + 1) for i in range(16, 33)
              for d in (-2, -1, 0, 1, 2)]  # fmt: skip
    some = torch.exp2(torch.linspace(spec.low, spec.high + 1, 2000, dtype=torch.float64)).long()
    last = 2 ** (spec.high + 1) - 1
    every = torch.cat([torch.tensor([*places, 2**spec.low, last] * 2), some])
    return every.clamp(2**spec.low, last)


@pytest.mark.parametrize(("exact", "wide"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("name", SPECS)
def test_numbers_of_every_octave_and_beside_every_window(
    name: str, exact: bool, wide: bool
) -> None:
    spec = SPECS[name]
    values = _numbers(spec)
    values = values[:: 6 if exact else 1]
    simulation = Simulation(exact=exact)
    shares = integers(simulation, values)
    if wide:
        found = _opened_wide(simulation, lambda ctx, p: columns(ctx, shares[p].share, spec, True))
    else:
        found, cost = run(simulation, lambda ctx, p: columns(ctx, shares[p].share, spec))
        assert exact or cost == columns_cost(spec, len(values))
    used = (found != 0).sum(1)
    assert set(used.tolist()) <= ({1, 2} if exact else {1})
    # The sum of the columns, as the function of V in the column of the largest.
    real = found.double() * 2.0**-spec.frac
    start = spec.low + spec.span * torch.arange(spec.columns)
    if spec.curve is np.sqrt or isinstance(spec.curve, Mantissa):
        exponent = 0.5 if spec.curve is np.sqrt else spec.curve.exponent
        total = (real * 2.0 ** (start * exponent)).sum(1)
        factor = getattr(spec.curve, "factor", 1.0)
        wanted = factor * values.double() ** exponent
        # A unit of V, which is up to 2**-18 of it, and what a reciprocal's first cubic is off.
        assert (total / wanted - 1).abs().max() < 2**-18 + 1.02 * 2**-19
    else:
        error = real.sum(1) - (values.double().log2() - spec.low)
        assert error.abs().max() < (2**-11 if exact else 2**-15)


@pytest.mark.parametrize("exact", [False, True])
def test_other_numbers_give_no_more_than_the_curve_ever_is(exact: bool) -> None:
    spec = SPECS["softmax"]
    beyond = [0, 1, -1, 2**spec.low - 1, 2 ** (spec.high + 1), 2**53, -(2**40), 2**62, -(2**63)]
    values = torch.tensor(beyond).repeat(300)
    simulation = Simulation(exact=exact)
    shares = integers(simulation, values)
    found, _ = run(simulation, lambda ctx, p: columns(ctx, shares[p].share, spec))
    largest = float(spec.curve(np.array([0.9]))[0])
    assert (found.double() * 2.0**-spec.frac).abs().max() < 1.01 * largest
    assert bool(((found != 0).sum(1) <= (2 if exact else 1)).all())


@pytest.mark.parametrize(("exact", "wide"), [(False, False), (True, False), (False, True)])
def test_shapes_alone_have_the_same_messages_and_dealt_bytes(exact: bool, wide: bool) -> None:
    spec, context = SPECS["norm"], ShapeContext(exact=exact)
    ghost = torch.empty(5, dtype=torch.int64, device="meta")
    rounds, found = drive(context, columns(context, ghost, spec, wide))
    assert found.shape == ((5, spec.columns, 2) if wide else (5, spec.columns))
    simulation = Simulation(exact=exact)
    shares = integers(simulation, torch.full((5,), 2**spec.low))
    _, cost = run(simulation, lambda ctx, p: columns(ctx, shares[p].share, spec, wide))
    assert sum(context.dealt.values()) == cost.offline
    if not exact:
        assert cost == columns_cost(spec, 5, wide)
    assert cost.rounds == len(rounds) == (2 if exact else 1)


@pytest.mark.parametrize("wide", [False, True])
def test_what_is_received_is_uniform_whatever_the_number_is(wide: bool) -> None:
    spec = SPECS["softmax"]
    for value in (2**spec.low, 2**20, 2 ** (spec.high + 1) - 1):
        simulation = Simulation(record=True)
        shares = integers(simulation, torch.full((2048,), value))
        simulation.run(lambda ctx, p, s=shares: columns(ctx, s[p].share, spec, wide))
        one, other = simulation.transcript
        assert abs(uniform_bytes([one, other])) < 6.5
        assert abs(uniform_bytes([one + other])) < 6.5


@pytest.mark.parametrize("wide", [False, True])
def test_a_party_s_share_is_uniform_in_every_column(wide: bool) -> None:
    """Of numbers in one octave: the columns that are zero look like the one that is not."""
    spec = Octaves(0, 20, 4, Mantissa(-1.0, 1.0), 60)
    simulation = Simulation()
    shares = integers(simulation, torch.full((4096,), 1000))
    found = simulation.run(lambda ctx, p: columns(ctx, shares[p].share, spec, wide))
    for share in found[:2]:
        for column in share.flatten(1).T:
            assert abs(uniform_bytes([column.contiguous()])) < 6.5


@pytest.mark.skipif(not LANES, reason="this processor has no instructions for AES")
@pytest.mark.parametrize(("exact", "width"), [(False, 1), (True, 1), (False, 2)])
@pytest.mark.parametrize("party", [CLIENT, SERVER])
def test_instructions_and_library_find_the_same(party: int, exact: bool, width: int) -> None:
    """Equal bit for bit, with keys of no table, for more elements than one piece holds."""
    spec, count, generator = SPECS["norm"], 70, Generator(2 * width)
    for tree in _trees(spec, exact, width)[:3]:
        keys = HostKeys(_words(count, 2), _words(count, tree.words))
        points = _words(count).view(np.int64)
        results = [np.zeros((count, spec.columns, width), np.int64) for _ in range(2)]
        for out, descend in zip(
            results, (descend_by_library, descend_by_instructions), strict=True
        ):
            descend(points, keys, tree, party, generator, out)
        assert np.array_equal(*results)


@pytest.mark.parametrize(("exact", "width"), [(False, 1), (True, 1), (False, 2)])
@pytest.mark.parametrize("name", SPECS)
def test_kernels_look_up_every_row_of_an_octave(name: str, exact: bool, width: int) -> None:
    """Two rows a line, and nothing else."""
    for tree in _trees(SPECS[name], exact, width):
        lines = tree.nodes(torch.device("cpu"))
        assert set(lines[:, 0].tolist()) == set(tree.ends)
        for octave, end in enumerate(tree.ends):
            mine = lines[lines[:, 0] == end]
            last = 2 * int(tree.kept[end - 1, 1])
            windows = (mine[:, 1:2] + torch.arange(2)).flatten().tolist()
            assert windows == list(range(int(tree.firsts[octave]), last + 2))
            assert (mine[:, 2] == last).all()
            assert (mine[:, 3] == int(tree.columns[octave])).all()
            assert (mine[:, 4] == int(tree.drops[octave])).all()
            # Its coefficients follow those of the octaves before it; its correction, of four
            # numbers, comes as long before a key's end as it comes before the last octave.
            assert (mine[:, 5] == octave * tree.coefficients[0].size).all()
            assert (mine[:, 6] == tree.words - 4 * width * (len(tree.ends) - octave)).all()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_only_parents_of_what_is_needed_are_expanded(name: str, exact: bool) -> None:
    """Above the highest octave; a parent has half a window's number, rounded up or down."""
    for tree in _trees(SPECS[name], exact):
        for depth in range(tree.ends[-1] - 1):
            first, last = tree.kept[depth + 1].tolist()
            assert tree.kept[depth].tolist() == [first // 2, (last + 1) // 2]


@pytest.mark.parametrize("name", ["softmax", "norm"])
def test_with_exact_rounding_it_hardly_matters_which_window_serves(name: str) -> None:
    """How far the cubics of neighbouring windows are apart where either may serve a number."""
    for tree in _trees(SPECS[name], exact=True):
        size = 2**tree.step_bits
        place = np.arange(0, size, size // 64)[:, None]
        powers = np.stack([(place - start) ** k for start in (0, size) for k in range(4)])
        scaled = tree.coefficients[0, tree.windows :].astype(float) * 2.0 ** -SPECS[name].frac
        here = np.einsum("wk,kp->wp", scaled[1:-2], powers[:4, :, 0])
        there = np.einsum("wk,kp->wp", scaled[2:-1], powers[4:, :, 0])
        assert np.abs(here - there).max() < 2**-20.8, tree.ends


def test_octaves_that_do_not_fit_are_refused() -> None:
    curve = partial(np.multiply, 1.0)
    for low, high in ((0, 54), (-1, 5), (5, 5), (6, 5)):
        with pytest.raises(ValueError, match=f"octaves {low} to {high} are outside 0 to 53"):
            Octaves(low, high, 2, curve, 50)
    assert Octaves(0, 53, 2, curve, 50).count == 54
    with pytest.raises(ValueError, match="values with 60 fractional bits do not fit"):
        Octaves(0, 10, 2, curve, 60)
    assert Octaves(0, 10, 2, curve, 59).columns == 6
