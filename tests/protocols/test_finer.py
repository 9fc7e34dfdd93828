"""Products modulo 2**72 with values opened modulo 2**64: every wrap, ends, what is seen."""

from __future__ import annotations

import math

import pytest
import torch

from mergec.runtime.core.context import Context, ShapeContext
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Masked
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.kernels.long import added
from mergec.runtime.protocols.finer import HALVES, finer_products, finer_products_cost
from tests.protocols.harness import run, uniform_bytes, words
from tests.protocols.test_logarithm import halves, numbers

LARGEST = 2**62 - 1


def _weights(values: torch.Tensor, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares modulo 2**96."""
    flat = values.reshape(-1).tolist()
    client = words(len(flat) * HALVES, -(2**31), 2**31, seed).to(torch.int32).reshape(-1, HALVES)
    rest = [value - own for value, own in zip(flat, numbers(client), strict=True)]
    shape = (*values.shape, HALVES)
    return client.reshape(shape), halves(rest, HALVES).reshape(shape)


def _products(
    weights: torch.Tensor, values: torch.Tensor, masks: torch.Tensor
) -> tuple[torch.Tensor, Cost]:
    """The results for values that were opened under these masks."""
    simulation = Simulation()
    parts = _weights(weights)
    shares = (*parts, parts[0].to("meta"))
    own = words(values.numel(), -(2**63), 2**63 - 1, 4).reshape(values.shape)
    held = own, masks - own, masks
    opened = values + masks

    def protocol(ctx: Context, party: int) -> Protocol:
        z = opened if party < 2 else opened.to("meta")
        return finer_products(ctx, shares[party], Masked(z, held[party], 16))

    found, cost = run(simulation, protocol)
    rows = weights.numel() // weights.shape[-1]
    assert cost == finer_products_cost(rows, Masked(opened, masks, 16)) and cost.rounds == 1
    assert simulation.to_client.total == 0
    return found, cost


def _exact(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Products rounded down after 8 bits were dropped, as Python's integers."""
    flat, other = weights.reshape(-1, *weights.shape[-2:]), values.reshape(-1, *values.shape[-2:])
    found = [
        [
            [
                sum(a * b for a, b in zip(row, column, strict=True)) >> 8
                for column in zip(*y, strict=True)
            ]
            for row in x
        ]
        for x, y in zip(flat.tolist(), other.tolist(), strict=True)
    ]
    return torch.tensor(found).reshape(*weights.shape[:-1], values.shape[-1])


def _check(weights: torch.Tensor, values: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    found, _ = _products(weights, values, masks)
    error = found - _exact(weights, values)
    assert int(error.min()) >= 0 and int(error.max()) <= 1
    return error


EDGES = [0, 1, -1, 2**63 - 1, -(2**63), 2**62, -(2**62), 2**62 - 1, -(2**62) - 1, 255, -256]


def test_every_pair_of_edges_of_values_and_masks() -> None:
    """All ways in which the sum of a value, 2**62 and its mask may wrap."""
    size = [0, 1, -1, LARGEST, -LARGEST, 255, 256, -(2**40)]
    pairs = torch.tensor([[value, mask] for value in size for mask in EDGES])
    values, masks = pairs[:, 0].reshape(1, -1, 1), pairs[:, 1].reshape(1, -1, 1)
    count = values.shape[1]
    for weight in (0, 1, 2, 255, -1, -255):
        _check(torch.full((1, 1, 1), weight), values[:, :1], masks[:, :1])
        # Each value alone, as products of all of them would exceed what may be weighed.
        weights = weight * torch.eye(count, dtype=torch.int64)[None]
        _check(weights, values, masks)


def test_every_small_weight_and_value() -> None:
    """All products of small numbers, under masks at the ring's ends and uniform ones."""
    numbers_ = torch.arange(-40, 41)
    weights = numbers_.reshape(1, -1, 1)
    for mask in (0, -1, 2**62, -(2**62), 2**63 - 1):
        for values in (numbers_, numbers_ * 7 + 2**20):
            _check(weights, values.reshape(1, 1, -1), torch.full((1, 1, 81), mask))
    _check(weights, numbers_.reshape(1, 1, -1), words(81, -(2**63), 2**63 - 1, 1).reshape(1, 1, -1))


@pytest.mark.parametrize("length", [1, 2, 128, 4096])
def test_rows_of_any_length(length: int) -> None:
    """Weights of a row add up to 2**24; values up to 2**37. Groups of several rows of weights."""
    generator = torch.Generator().manual_seed(length)
    shape = 1, 2, 3, length
    weights = torch.softmax(torch.randn(shape, generator=generator).double() * 3, -1)
    whole = (weights * 2**24).round().long()
    values = words(2 * length * 4, -(2**37), 2**37, 6).reshape(1, 2, length, 4)
    masks = words(values.numel(), -(2**63), 2**63 - 1, 7).reshape(values.shape)
    _check(whole, values, masks)
    _check(whole, torch.full_like(values, 2**37), masks)


def test_roundings_have_the_right_expectation() -> None:
    count = 40_000
    weights, value = torch.full((1, count, 1), 3), torch.full((1, 1, 1), 100)
    found, _ = _products(weights, value, torch.full_like(value, 12345))
    assert abs(float(found.double().mean()) - 300 / 256) < 5 * 0.5 / math.sqrt(count)


@pytest.mark.parametrize("value", [0, -(2**20), 2**40])
def test_what_is_seen_is_uniform_and_of_one_shape(value: int) -> None:
    simulation = Simulation(record=True)
    weights, values = torch.full((1, 2, 3, 100), 2**23), torch.full((1, 2, 100, 8), value)
    masks = words(values.numel(), -(2**63), 2**63 - 1, 7).reshape(values.shape)
    own = words(values.numel(), -(2**63), 2**63 - 1, 4).reshape(values.shape)
    parts = _weights(weights)
    shares, held = (*parts, parts[0].to("meta")), (own, masks - own, masks)
    sent, kept = simulation.to_server, []
    write = sent.write
    sent.write = lambda data: (kept.append(data.clone()), write(data))[1]  # type: ignore[method-assign]

    def protocol(ctx: Context, party: int) -> Protocol:
        z = values + masks if party < 2 else masks.to("meta")
        return finer_products(ctx, shares[party], Masked(z, held[party], 16))

    simulation.run(protocol)
    first, second = simulation.transcript
    assert first.dtype is torch.int32 and first.shape == (600, HALVES)
    for opened in (first, second, added(first, second), torch.cat([d.reshape(-1) for d in kept])):
        assert abs(uniform_bytes([opened])) < 6.5
    assert [len(data) for data in kept] == [1600 * 9, 1600, 6 * 100 * 8, 6 * 8 * 9]


@pytest.mark.parametrize("length", [1, 9])
def test_shapes_alone_take_the_same_bytes(length: int) -> None:
    context = ShapeContext()
    weights = torch.empty((1, 2, 3, length, HALVES), dtype=torch.int32, device="meta")
    ghost = torch.empty((1, 2, length, 5), dtype=torch.int64, device="meta")
    values = Masked(ghost, ghost, 16)
    assert len(list(finer_products(context, weights, values))) == 1
    assert context.dealt == {"client": 0, "server": finer_products_cost(6, values).offline}
