"""Beaver products, and products with server-held constants."""

from __future__ import annotations

import itertools

import pytest
import torch

from mergec.runtime.core.spec import CLIENT, DEALER, SERVER, Cost
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.protocols import weights
from mergec.runtime.protocols.multiply import matmul_of_masked, multiply, multiply_cost
from mergec.runtime.protocols.opening import open_masked
from mergec.runtime.protocols.shared_weights import (
    open_constant,
    share_constant,
    tell_constant_seed,
)
from mergec.runtime.protocols.weights import (
    add_held,
    linear,
    move,
    move_cost,
    reuse_weight,
    scale_by,
    send,
    send_cost,
    share_weight,
    table_rows,
    table_rows_cost,
)
from tests.protocols.harness import integers, run, run_list, uniform_bytes, words


def test_all_pairs_of_small_numbers() -> None:
    small = torch.arange(-16, 16)
    pairs = torch.tensor(list(itertools.product(small.tolist(), repeat=2)))
    simulation = Simulation()
    x, y = integers(simulation, pairs[:, 0]), integers(simulation, pairs[:, 1])
    (product,), cost = run_list(simulation, lambda ctx, p: multiply(ctx, (x[p].share, y[p].share)))
    assert torch.equal(product, pairs[:, 0] * pairs[:, 1])
    assert cost == multiply_cost((len(pairs), len(pairs), len(pairs)))


def test_products_wrap_as_the_ring_does() -> None:
    a, b = words(10_000, -(2**63), 2**63 - 1), words(10_000, -(2**63), 2**63 - 1, seed=1)
    simulation = Simulation()
    x, y = integers(simulation, a), integers(simulation, b)
    (product,), _ = run_list(simulation, lambda ctx, p: multiply(ctx, (x[p].share, y[p].share)))
    assert torch.equal(product, a * b)


def test_several_pairs_share_one_round_and_broadcast() -> None:
    simulation = Simulation()
    a, b, c = words(12, -99, 99).reshape(3, 4), words(3, -99, 99).reshape(3, 1), words(4, -9, 9)
    x, y, z = (integers(simulation, t) for t in (a, b, c))
    products, cost = run_list(
        simulation,
        lambda ctx, p: multiply(
            ctx, (x[p].share, y[p].share), (x[p].share, z[p].share), (z[p].share, y[p].share)
        ),
    )
    assert torch.equal(products[0], a * b)
    assert torch.equal(products[1], a * c)
    assert torch.equal(products[2], c * b)
    assert cost.rounds == 1


def test_matmul_of_opened_wires() -> None:
    simulation = Simulation()
    a, b = words(2 * 3 * 5, -(2**63), 2**63 - 1).reshape(2, 3, 5), words(20, -99, 99).reshape(5, 4)
    x, y = integers(simulation, a), integers(simulation, b)

    def protocol(ctx, p):
        left = yield from open_masked(ctx, x[p])
        right = yield from open_masked(ctx, y[p])
        return matmul_of_masked(ctx, left, right)

    result, cost = run(simulation, protocol)
    assert torch.equal(result, a @ b)
    assert cost == Cost(2, 16 * (30 + 20), 8 * 24)


@pytest.mark.parametrize("piece", [weights.PIECE, 16])
def test_server_held_constants_cost_one_message_to_the_server(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result does not depend on the number of pieces in which masked words are sent."""
    monkeypatch.setattr(weights, "PIECE", piece)
    simulation = Simulation()
    x = words(6 * 8, -(2**63), 2**63 - 1).reshape(6, 8)
    weight = words(40, -(2**20), 2**20).reshape(5, 8).to(torch.int32)
    gain = words(8, -99, 99).to(torch.int32)
    shares = integers(simulation, x)
    held = simulation.run(lambda ctx, p: share_weight(ctx, "w", _held(weight, p), 0))
    assert simulation.cost == Cost(-(-40 // (piece // 8 * 8)), 8 * 40)
    gains = simulation.run(lambda ctx, p: share_weight(ctx, "g", _held(gain, p), 0))

    def protocol(ctx, p):
        sent = yield from send(ctx, shares[p])
        return torch.cat([linear(ctx, sent, held[p]), scale_by(ctx, sent, gains[p])], -1)

    result, cost = run(simulation, protocol)
    product = x @ weight.long().T
    assert torch.equal(result, torch.cat([product, x * gain], -1))
    assert cost == send_cost(48) + Cost(offline=8 * result.numel())


def test_a_weight_that_the_client_kept_needs_no_message() -> None:
    """The same mask hides the same weight, so products are right in the next session, too."""
    simulation = Simulation()
    weight = words(40, -(2**20), 2**20).reshape(5, 8).to(torch.int32)
    first = simulation.run(lambda ctx, p: share_weight(ctx, "w", _held(weight, p), 3))
    simulation.cost = Cost()
    again = [
        reuse_weight(ctx, _held(weight, p), first[p].difference, 3) if p != DEALER else first[p]
        for p, ctx in enumerate(simulation.contexts)
    ]
    assert simulation.cost == Cost()
    assert [each.frac for each in again] == [3, 3, 3]
    assert again[CLIENT].encoded.is_meta and again[SERVER].difference.is_meta
    x = words(6 * 8, -(2**63), 2**63 - 1).reshape(6, 8)
    shares = integers(simulation, x)

    def protocol(ctx, p):
        sent = yield from send(ctx, shares[p])
        return linear(ctx, sent, again[p])

    assert torch.equal(run(simulation, protocol)[0], x @ weight.long().T)


def test_a_constant_that_is_a_single_number() -> None:
    simulation = Simulation()
    x, factor = words(6, -(2**63), 2**63 - 1), torch.tensor(-77, dtype=torch.int32)
    shares = integers(simulation, x)
    held = simulation.run(lambda ctx, p: share_weight(ctx, "f", _held(factor, p), 0))
    assert simulation.cost == Cost(1, 8)

    def protocol(ctx, p):
        sent = yield from send(ctx, shares[p])
        return scale_by(ctx, sent, held[p])

    assert torch.equal(run(simulation, protocol)[0], x * -77)


def test_shared_constants_cost_one_opening_of_the_other_factor() -> None:
    """With the same static masks twice, nothing is sent for a weight after its first opening."""
    simulation = Simulation()
    weight = words(40, -(2**63), 2**63 - 1).reshape(5, 8)
    gain, bias = words(8, -99, 99), words(5, -(2**40), 2**40)
    simulation.run(lambda ctx, p: tell_constant_seed(ctx))
    assert simulation.cost == Cost(1, 32)
    weights = simulation.run(lambda ctx, p: open_constant(ctx, "w", _held(weight, p), 0))
    assert simulation.cost == Cost(2, 32 + 8 * 40)
    gains = simulation.run(lambda ctx, p: open_constant(ctx, "g", _held(gain, p), 0))
    biases = [
        share_constant(ctx, "b", _held(bias, p), 3) for p, ctx in enumerate(simulation.contexts)
    ]
    assert biases[DEALER].share.is_meta and weights[DEALER].opened.is_meta
    for seed in (0, 1):
        x = words(6 * 8, -(2**63), 2**63 - 1, seed).reshape(6, 8)
        shares = integers(simulation, x)

        def protocol(ctx, p, shares=shares):
            moved = yield from move(ctx, shares[p], weights[p])
            product = add_held(linear(ctx, moved, weights[p]), biases[p], 5)
            return torch.cat([product, scale_by(ctx, moved, gains[p])], -1)

        result, cost = run(simulation, protocol)
        assert torch.equal(result, torch.cat([x @ weight.T + 4 * bias, x * gain], -1))
        assert cost == move_cost(48, weights[0]) + Cost(offline=8 * result.numel())
        assert cost.online == 16 * 48


@pytest.mark.parametrize("shared", [False, True])
def test_rows_of_a_table(shared: bool) -> None:
    simulation = Simulation()
    table = words(7 * 3, -(2**31), 2**31).reshape(7, 3)
    ids = torch.tensor([[6, 0, 6], [1, 2, 3]])
    simulation.run(lambda ctx, p: tell_constant_seed(ctx))
    place = open_constant if shared else share_weight
    weights = simulation.run(lambda ctx, p: place(ctx, "t", _held(table, p), 0))
    result, cost = run(
        simulation,
        lambda ctx, p: table_rows(ctx, ids if p == CLIENT else ids.to("meta"), weights[p]),
    )
    assert torch.equal(result, table[ids])
    assert cost == table_rows_cost(6, weights[0]) == Cost(1, 8 * 7 * 6, 8 * 3 * 6)


def test_an_opened_constant_is_uniform_to_the_client() -> None:
    """Without the server's part of the mask, the client would learn a constant of small numbers."""
    simulation = Simulation()
    constant = torch.full((4096,), 5)
    simulation.run(lambda ctx, p: tell_constant_seed(ctx))
    client, *_ = simulation.run(lambda ctx, p: open_constant(ctx, "w", _held(constant, p), 0))
    shared = share_constant(simulation.contexts[CLIENT], "b", constant, 0)
    assert abs(uniform_bytes([client.opened - client.mask])) < 5
    assert abs(uniform_bytes([shared.share])) < 5
    assert not bool((client.mask == shared.share).any()), "each name has words of its own"


def test_factors_that_do_not_fit_each_other_are_refused() -> None:
    """An activation that was opened to both is no factor of a weight that the server holds."""
    simulation, square = Simulation(), words(9, -99, 99).reshape(3, 3)
    shares = integers(simulation, square)
    opened = simulation.run(lambda ctx, p: open_masked(ctx, shares[p]))
    held = simulation.run(lambda ctx, p: share_weight(ctx, "w", _held(square, p), 0))
    for ctx, x, weight in zip(simulation.contexts, opened, held, strict=True):
        with pytest.raises(TypeError, match="a Masked cannot be multiplied by a Weight"):
            linear(ctx, x, weight)


def test_the_server_needs_the_seed_of_shared_constants() -> None:
    with pytest.raises(RuntimeError, match="has not sent the seed"):
        Simulation().contexts[SERVER].constant_words("w", (3,))


def _held(value: torch.Tensor, party: int) -> torch.Tensor:
    return value if party == SERVER else value.to("meta")


def test_static_mask_depends_on_the_name_alone() -> None:
    server, dealer = Simulation().contexts[1:]
    mask = server.weight_mask("a", (3,))
    assert torch.equal(mask, dealer.weight_mask("a", (3,)))
    assert not torch.equal(mask, server.weight_mask("b", (3,)))
