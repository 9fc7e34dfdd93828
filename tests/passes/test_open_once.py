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
from mergec.runtime.engine.plan import Plan
from mergec.runtime.engine.rehearsal import call_dealt
from mergec.runtime.ops.gelu import ALONE_FRAC, Gelu
from mergec.runtime.ops.glu import Glu
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


def gated(act: str = "silu", **options: Any) -> Graph:
    """A gated unit that a product with a constant of the server's reads."""

    def body(self: Any, gate: torch.Tensor, up: torch.Tensor) -> Any:
        return mpc.linear(mpc.glu(gate, up, act, **options), self.w)

    made = Graph(body, normal(1, 3, 8), normal(1, 3, 8), w=normal(4, 8))
    made.info = replace(made.info, network=NETWORKS["wan"])
    return made


def glu_of(made: Graph) -> dict[str, Any]:
    (node,) = [n for n in made.module.graph.nodes if "glu" in str(n.target)]
    return {"node": node, **bind(Glu, node)}


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
def test_a_gated_unit_is_computed_at_once_whatever_reads_it(act: str) -> None:
    made = gated(act)
    rewrites(made, "open_once")
    assert glu_of(made)["alone"] >= 1
    leaves(made, "open_once")


def test_behind_a_deferred_norm_a_round_counts_twice() -> None:
    """As many rows as two latencies pay for, instead of one."""

    def body(self: Any, x: torch.Tensor) -> Any:
        return mpc.linear(mpc.gelu(mpc.linear(x, self.w)), self.v)

    def deferred(self: Any, x: torch.Tensor) -> Any:
        rows = mpc.rms_norm_linear(x, self.w, None, 1e-5, 16.0)
        return mpc.linear(mpc.gelu(rows[..., 0:6]), self.v)

    limits = []
    for form in (body, deferred):
        made = Graph(form, normal(1, 3, 8), w=normal(6, 8), v=normal(4, 6))
        made.info = replace(made.info, network=replace(NETWORKS["wan"], to_server=Link(0.0, 1e6)))
        rewrites(made, "open_once")
        limits.append(gelu_of(made)["alone"])
    assert 2 * limits[0] - 1 <= limits[1] <= 2 * limits[0]


def test_a_rectifier_has_no_table() -> None:
    leaves(gated("relu"), "open_once", reason="no sum of cosines")


@pytest.mark.parametrize(
    ("largest", "exact", "span"),
    [
        (6.0, False, 48),
        (6.1, False, 64),
        (8.1, False, 80),
        (10.0, False, 80),
        (10.1, False, 0),
        (6.0, True, 0),
    ],
)
def test_a_gated_unit_has_the_shortest_table_with_eight_times_what_was_seen(
    largest: float, exact: bool, span: int
) -> None:
    made = gated(alone=3)
    found = glu_of(made)["node"]
    found.meta |= {"largest_input": largest, "range": (-largest, largest)}
    legalize(made.module, 16, exact)
    given = glu_of(made)
    assert (given["alone"], given["span"]) == ((3, span) if span else (0, 0))
    assert given["node"].meta["frac"] == 32


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
@pytest.mark.parametrize(("family", "op"), [("gpt2", Gelu), ("llama", Glu)])
def test_a_decoder_takes_a_round_less_for_each_layer(
    family: str,
    op: type[Gelu] | type[Glu],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a token; a prompt of more rows than pay takes as many as before, to the same logits."""
    network = replace(NETWORKS["wan"], to_server=Link(0.0, 1e7))
    monkeypatch.setitem(NETWORKS, "wan", network)
    model, captured = float_decoder(family)
    config = CompileConfig(max_length=64, logit_noise=0.0, network="wan", **options)
    program = compile_decoder(model, config=config, captured=captured)
    plain = compile_decoder(
        model, config=replace(config, disable=("open_once",)), captured=captured
    )
    steps = [p for p in Plan(program.roles["client"]).steps if p.op is op]
    assert steps and all(step.argument("alone") >= 1 for step in steps)

    def rounds(made: Any, new: int, past: int) -> dict[str, int]:
        rows = cost_report(made.roles["client"], new, past).rows
        return {row.name: row.cost.rounds for row in rows if row.target == f"mpc.{op.name}"}

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
