"""Logarithms of long numbers: every carry at every table's ends, every octave, what is seen."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mergec.runtime.core.context import ShapeContext
from mergec.runtime.correlations.dpf import Generator, HostKeys, unsigned
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.kernels.aes import LANES
from mergec.runtime.kernels.long import added
from mergec.runtime.protocols.logarithm import (
    _ROWS,
    _correct,
    _values_host,
    descend_by_instructions,
    descend_by_library,
    long_log,
    long_log_cost,
)
from mergec.runtime.protocols.logarithm import LongLog as Spec
from mergec.runtime.protocols.probabilities import WAYS
from tests.protocols.harness import run, uniform_bytes, words

ERROR = 2.0**-16
GENERATOR = Generator(2, b"salt")
SMALL = Spec(17, 12, 54)
SPECS = [SMALL, Spec(30, 1, 57), *(way.logarithm for way in WAYS.values())]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=[f"{s.octaves}" for s in SPECS])


def halves(numbers: list[int], count: int) -> torch.Tensor:
    """Numbers modulo 2**(32 count) as int32 halves."""
    ring = 1 << (32 * count)
    data = b"".join((number % ring).to_bytes(4 * count, "little") for number in numbers)
    return torch.frombuffer(bytearray(data), dtype=torch.int32).reshape(-1, count)


def numbers(words_: torch.Tensor) -> list[int]:
    return [int.from_bytes(row.numpy().tobytes(), "little") for row in words_.contiguous()]


def _uniform(count: int, size: int, seed: int) -> torch.Tensor:
    return words(count * size, -(2**31), 2**31, seed).to(torch.int32).reshape(count, size)


def _exact(values: list[int], spec: Spec) -> torch.Tensor:
    return torch.tensor(
        [math.log(value) - spec.low * math.log(2) for value in values], dtype=torch.float64
    )


def _difference(found: torch.Tensor, values: list[int], spec: Spec) -> torch.Tensor:
    """What shares modulo 2**64 stand for, less the logarithm; the latter may exceed the ring."""
    exact = _exact(values, spec)
    whole = exact.floor()
    rest = found - (whole.long() << spec.frac)
    return rest.double() * 2.0**-spec.frac - (exact - whole)


def _check_masks(values: list[int], masks: list[int], spec: Spec) -> None:
    """Keys of these masks, each read for the number of its place, in the clear."""
    mask = halves(masks, spec.halves)
    opened = added(mask, halves(values, spec.halves))
    roots = words(2 * len(values), -(2**63), 2**63 - 1, 1), words(2 * len(values), 0, 2**63 - 1, 2)
    roots = roots[0].reshape(-1, 2), roots[1].reshape(-1, 2)
    corrections = _correct(mask, spec, GENERATOR)(roots)
    found = sum(
        _values_host(opened, roots[party], corrections, spec, party, GENERATOR)
        for party in range(2)
    )
    assert isinstance(found, torch.Tensor)
    assert float(_difference(found, values, spec).abs().max()) < ERROR


def _places(spec: Spec) -> list[int]:
    """Numbers at and beside the ends of every octave, and the largest."""
    ends = [1 << (spec.low + k) for k in range(spec.octaves)]
    near = [end + more for end in ends for more in (-1, 0, 1) if end + more >= 1 << spec.low]
    steps = [end + (end >> 4) * j for end in ends for j in (1, 7, 15)]
    return [*near, *steps, (1 << (spec.low + spec.octaves)) - 1]


def test_every_window_of_the_mask_in_a_small_tree() -> None:
    """Every row of the tree, with a low part that carries and one that does not."""
    spec, values, masks = SMALL, [], []
    rows = 1 << spec.depth
    some = [1 << 17, (1 << 17) + 1, (1 << 18) - 1, 3 << 20, 1 << 21, (1 << 21) - 1, 1 << 25]
    some += [(1 << 25) - 1, (1 << 29) - 1, 5 << 26]
    for row in range(0, rows, 3):
        for low in (0, 1, (1 << spec.base) - 1):
            values.append(some[(row // 3 + low) % len(some)])
            masks.append((row << spec.base) + low)
    _check_masks(values, masks, spec)


def test_every_number_that_matters_in_a_small_tree() -> None:
    """All units of the lowest octave and beyond, against masks at both ends of the ring."""
    spec = SMALL
    values = [(1 << 17) + k for k in range(0, 1 << 17, 37)]
    values += [(1 << 19) + k for k in range(0, 1 << 19, 211)]
    values += [(1 << 26) + k * 40_009 for k in range(1 << 10)]
    top = 1 << spec.top
    for mask in (0, 1, top - 1, top // 2, top // 2 - 1, 0x155555 << 5):
        _check_masks(values, [mask] * len(values), spec)


@pytest.mark.parametrize(
    "spec",
    [pytest.param(s, marks=pytest.mark.slow if s is SPECS[-1] else ()) for s in SPECS],
    ids=[f"{s.octaves}" for s in SPECS],
)
def test_every_octave_and_its_ends(spec: Spec) -> None:
    """Against masks that carry everywhere, nowhere, and uniform ones."""
    values = _places(spec)
    top = (1 << spec.top) - 1
    for mask in (0, top, top // 3):
        _check_masks(values, [mask] * len(values), spec)
    _check_masks(values, numbers(_uniform(len(values), spec.halves, 3)), spec)


@every_spec
def test_a_number_just_below_the_range_has_a_logarithm_of_about_zero(spec: Spec) -> None:
    values = [(1 << spec.low) - k for k in (1, 2, 3, 5)] * 50
    _check_masks(values, numbers(_uniform(len(values), spec.halves, 3)), spec)


@every_spec
@pytest.mark.parametrize("more", [0, 2])
def test_the_protocol_and_its_cost(spec: Spec, more: int) -> None:
    """Also in rings that are larger than the tree takes."""
    values = _places(spec)[:: 1 + spec.octaves // 60]
    size = spec.halves + more
    client = _uniform(len(values), size, 5)
    ring = 1 << (32 * size)
    server = halves([value - own for value, own in zip(values, numbers(client), strict=True)], size)
    assert numbers(added(client, server)) == [value % ring for value in values]
    simulation, shares = Simulation(record=True), (client, server, client.to("meta"))
    found, cost = run(simulation, lambda ctx, p: long_log(ctx, shares[p], spec))
    assert cost == long_log_cost(spec, len(values), size)
    assert simulation.to_client.total == simulation.to_server.total == cost.offline // 2
    assert cost.offline // 2 == len(values) * (16 * spec.depth + 32 * -(-spec.octaves // 4))
    assert float(_difference(found, values, spec).abs().max()) < ERROR


def test_processors_without_instructions_get_the_same_words() -> None:
    if not LANES:
        pytest.skip("this processor has no AES instructions")
    for spec in (SMALL, Spec(30, 1, 57), WAYS["log-6"].logarithm):
        values = _places(spec)[::5]
        mask = _uniform(len(values), spec.halves, 6)
        roots = tuple(words(2 * len(values), 0, 2**63 - 1, k).reshape(-1, 2) for k in (1, 2))
        corrections = unsigned(_correct(mask, spec, GENERATOR)((roots[0], roots[1])))
        opened = added(mask, halves(values, spec.halves)).numpy().view("uint32")
        for party in range(2):
            keys = HostKeys(unsigned(roots[party]), corrections)
            one, other = np.empty(len(values), np.int64), np.empty(len(values), np.int64)
            descend_by_instructions(opened, keys, spec, party, GENERATOR, one)
            descend_by_library(opened, keys, spec, party, GENERATOR, other)
            assert np.array_equal(one, other)


def test_rows_of_masks_are_their_bits() -> None:
    spec = WAYS["log-7"].logarithm
    mask = _uniform(5, spec.halves, 7)
    index, payloads = _ROWS(mask, spec)
    for i, number in enumerate(numbers(mask)):
        row = (number >> spec.base) & ((1 << spec.depth) - 1)
        assert sum(int(w) % 2**64 << (64 * k) for k, w in enumerate(index[i])) == row
        for k in range(spec.tables):
            low = (number >> (spec.base + 4 * k - 13)) & (2**13 - 1)
            assert payloads[k, i].tolist() == [1, low, low**2, low**3]


@pytest.mark.parametrize("value", [1 << 22, 3 << 100, (1 << 205) - 1, 0, (1 << 223) + 12345])
def test_what_is_seen_is_uniform_and_of_one_shape(value: int) -> None:
    """Also for numbers outside of the range."""
    spec, count = WAYS["log-7"].logarithm, 60
    client = _uniform(count, spec.halves, 8)
    server = halves([value - own for own in numbers(client)], spec.halves)
    simulation, shares = Simulation(record=True), (client, server, client.to("meta"))
    kept: list[torch.Tensor] = []
    write = simulation.to_client.write
    simulation.to_client.write = lambda data: (kept.append(data.clone()), write(data))[1]  # type: ignore[method-assign]
    simulation.run(lambda ctx, p: long_log(ctx, shares[p], spec))
    first, second = simulation.transcript
    assert first.dtype is torch.int32 and first.shape == (count, spec.halves)
    # Of a key's words the two lowest bits of seeds are not used; all others look uniform.
    assert sum(len(data) for data in kept) == 8 * count * spec.words
    for opened in (first, second, added(first, second)):
        assert abs(uniform_bytes([opened])) < 6.5
    key = torch.cat([data.view(torch.int64) for data in kept]).reshape(count, -1)
    assert abs(uniform_bytes([key[:, 2 * spec.depth :]])) < 6.5
    assert abs(uniform_bytes([key[:, 1 : 2 * spec.depth : 2].contiguous()])) < 6.5


@pytest.mark.parametrize("count", [0, 7])
def test_shapes_alone_take_the_same_bytes(count: int) -> None:
    context, spec = ShapeContext(), WAYS["log-8"].logarithm
    share = torch.empty((count, spec.halves), dtype=torch.int32, device="meta")
    assert len(list(long_log(context, share, spec))) == 1
    cost = long_log_cost(spec, count, spec.halves)
    assert context.dealt == {"client": cost.offline // 2, "server": cost.offline // 2}


def test_a_logarithm_without_room_raises() -> None:
    for low, octaves, frac in ((16, 5, 54), (30, 0, 54), (30, 5, 49), (30, 5, 59)):
        with pytest.raises(ValueError, match=f"no logarithm has {frac} fractional bits"):
            Spec(low, octaves, frac)
    assert [Spec(17, 1, frac).tables for frac in (50, 58)] == [1, 1]
