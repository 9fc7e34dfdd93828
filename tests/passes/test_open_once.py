"""Activations by one opening: which networks, programs and steps they are for."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from mergec import CompileConfig, compile_decoder
from mergec.compiler.backend.cost import cost_report
from mergec.compiler.backend.legalize import legalize
from mergec.compiler.graph.ir import bind
from mergec.runtime.core.network import NETWORKS, Link, Network
from mergec.runtime.core.values import Shared
from mergec.runtime.engine.rehearsal import call_dealt
from mergec.runtime.ops.gelu import ALONE_FRAC, Gelu
from mergec.runtime.roles.inprocess import InProcessSession
from tests.families import float_decoder
from tests.passes.harness import Graph, leaves, normal, rewrites

mpc = torch.ops.mpc
IDS = [3, 14, 15, 92, 65, 35, 89, 79]


def activated(self: Any, x: torch.Tensor) -> Any:
    return mpc.linear(mpc.gelu(x), self.w)


def graph(network: str | Network = "wan") -> Graph:
    made = Graph(activated, normal(1, 3, 8), w=normal(5, 8))
    found = NETWORKS[network] if isinstance(network, str) else network
    made.info = replace(made.info, network=found)
    return made


def gelu_of(made: Graph) -> dict[str, Any]:
    (node,) = [n for n in made.module.graph.nodes if "gelu" in str(n.target)]
    return {"node": node, **bind(Gelu, node)}


def test_on_one_machine_no_activation_waits() -> None:
    leaves(graph("loopback"), "open_once", reason="takes no time")


def test_a_second_time_nothing_changes() -> None:
    made = graph()
    rewrites(made, "open_once")
    leaves(made, "open_once")


def test_the_limit_is_where_the_costs_meet() -> None:
    """Rows are dearer where the dealer's bytes to the server take long."""
    limits = []
    for bandwidth in (5e6, 1e7, 1.25e9):
        network = replace(NETWORKS["wan"], to_server=Link(0.0, bandwidth))
        made = graph(network)
        rewrites(made, "open_once")
        limits.append(limit := gelu_of(made)["alone"])

        def weight(rows: int, alone: int, network: Network = network) -> float:
            x = Shared(torch.empty((rows, 8), dtype=torch.int64, device="meta"), 32)
            given = x, True, 6, alone
            cost = Gelu.cost(*given, fixed=16)
            return network.weight(cost, call_dealt(Gelu, 16, False, *given))

        if limit < 1024:
            assert weight(limit, limit) < weight(limit, 0)
            assert weight(limit + 1, limit + 1) >= weight(limit + 1, 0)
    assert limits == sorted(set(limits))
    assert limits[0] > 1


@pytest.mark.parametrize(
    ("largest", "room", "exact", "alone"),
    [(5.0, 3.0, False, 9), (5.0, 3.0, True, 0), (15.0, 3.0, False, 0), (5.0, 2.0**9, False, 0)],
    ids=["kept", "exact rounding", "inputs too large", "no room in the product"],
)
def test_where_it_cannot_be_it_is_computed_as_before(
    largest: float, room: float, exact: bool, alone: int
) -> None:
    """36 fractional bits of rows and 16 of the matrix leave the product 10, with three to spare."""

    def body(self: Any, x: torch.Tensor) -> Any:
        return mpc.linear(mpc.gelu(x, alone=9), self.w)

    made = Graph(body, normal(1, 3, 8), w=normal(4, 8))
    found = gelu_of(made)
    found["node"].meta |= {"largest_input": largest, "range": (0.0, largest)}
    (product,) = found["node"].users
    product.meta["range"] = (-room, room)
    legalize(made.module, 16, exact)
    assert gelu_of(made)["alone"] == alone
    assert found["node"].meta["frac"] == (ALONE_FRAC if alone else 16)


@pytest.mark.parametrize("options", [{}, {"weights": "shared"}, {"reveal": "token"}], ids=str)
def test_a_decoder_takes_a_round_less_for_each_layer(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a token; a prompt of more rows than pay takes as many as before, to the same logits."""
    network = replace(NETWORKS["wan"], to_server=Link(0.0, 1e7))
    monkeypatch.setitem(NETWORKS, "wan", network)
    model, captured = float_decoder("gpt2")
    config = CompileConfig(max_length=64, logit_noise=0.0, network="wan", **options)
    program = compile_decoder(model, config=config, captured=captured)
    plain = compile_decoder(
        model, config=replace(config, disable=("open_once",)), captured=captured
    )
    calls = [i for i in program.roles["client"].instructions if i.target == "mpc.gelu"]
    assert all(int(call.args[3]) >= 1 for call in calls)

    def rounds(made: Any, new: int, past: int) -> dict[str, int]:
        rows = cost_report(made.roles["client"], new, past).rows
        return {row.name: row.cost.rounds for row in rows if row.target == "mpc.gelu"}

    assert set(rounds(program, 1, 8).values()) == {1}
    assert set(rounds(plain, 1, 8).values()) == {2}
    assert max(rounds(program, 40, 0).values()) == 2
    with InProcessSession(program.roles) as session, torch.no_grad():
        past = 0
        for new in (5, 1, 2):
            found = session.step(IDS[past : past + new], past)
            wanted = model(torch.tensor([IDS[: past + new]])).logits[0, -1]
            if options.get("reveal") == "token":
                assert int(found) == int(wanted.argmax())
            else:
                assert (found.reshape(-1) - wanted).abs().max() < 1e-3
            report = cost_report(program.roles["client"], new, past)
            assert session.record.total == report.total
            past += new


def test_rows_are_counted_whatever_their_shape() -> None:
    shape = (2, 3, 8)
    x = Shared(torch.empty(shape, dtype=torch.int64, device="meta"), 32)
    assert [Gelu.cost(x, False, 6, rows, fixed=16).rounds for rows in (5, 6)] == [2, 1]
    assert math.prod(shape[:-1]) == 6
