"""Beaver products, and products with server-held constants."""

from __future__ import annotations

import itertools

import torch

from runtime.protocols.multiply import matmul_of_masked, multiply, multiply_cost
from runtime.protocols.opening import open_masked
from runtime.protocols.weights import linear, scale_by, send, send_cost, share_weight, table_rows
from runtime.simulate import Simulation
from runtime.spec import SERVER, Cost
from tests.protocols.harness import integers, run, run_list, words


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
        lambda ctx, p: multiply(ctx, (x[p].share, y[p].share), (x[p].share, z[p].share)),
    )
    assert torch.equal(products[0], a * b)
    assert torch.equal(products[1], a * c)
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


def test_server_held_constants_cost_one_message_to_the_server() -> None:
    simulation = Simulation()
    x = words(6 * 8, -(2**63), 2**63 - 1).reshape(6, 8)
    weight = words(40, -(2**20), 2**20).reshape(5, 8).to(torch.int32)
    gain = words(8, -99, 99).to(torch.int32)
    shares = integers(simulation, x)

    def held(value, p):
        return value if p == SERVER else value.to("meta")

    weights = simulation.run(lambda ctx, p: share_weight(ctx, "w", held(weight, p), 0))
    gains = simulation.run(lambda ctx, p: share_weight(ctx, "g", held(gain, p), 0))
    turned = simulation.run(
        lambda ctx, p: share_weight(ctx, "t", held(weight.T.contiguous(), p), 0)
    )

    def protocol(ctx, p):
        sent = yield from send(ctx, shares[p])
        return torch.cat(
            [
                linear(ctx, sent, weights[p]),
                scale_by(ctx, sent, gains[p]),
                table_rows(ctx, sent, turned[p]),
            ],
            -1,
        )

    result, cost = run(simulation, protocol)
    product = x @ weight.long().T
    assert torch.equal(result, torch.cat([product, x * gain, product], -1))
    assert cost == send_cost(48) + Cost(offline=8 * result.numel())


def test_static_mask_depends_on_the_name_alone() -> None:
    server, dealer = Simulation().contexts[1:]
    assert torch.equal(server.weight_mask("a", (3,)), dealer.weight_mask("a", (3,)))
    assert not torch.equal(server.weight_mask("a", (3,)), server.weight_mask("b", (3,)))
