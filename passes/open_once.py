"""Compute an activation from a single opening where a round takes long."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from mergec.compiler.graph.ir import bind, constant, op_of
from mergec.compiler.graph.moves import is_move, keeps_rows
from mergec.compiler.graph.paying import rows_that_pay
from mergec.compiler.graph.rewriting import Pass
from mergec.runtime.core.spec import FRACTIONAL_BITS, Vis
from mergec.runtime.core.values import Shared
from mergec.runtime.engine.rehearsal import call_dealt
from mergec.runtime.ops.gelu import Gelu
from mergec.runtime.ops.glu import FUNCTIONS, Glu
from mergec.runtime.ops.linear import Linear
from mergec.runtime.ops.normed_linear import NormedLinear


class OpenOnce(Pass):
    """Lets a GELU or a gated unit take one round instead of two, by longer tables for the server.

    The usual table ends near zero, so the bits that tell whether an input is beyond it are opened,
    and the table's value as well. A table of all that inputs reach needs neither
    (`runtime.protocols.waves`), but some 600 dealt bytes for an element instead of 200. In a gated
    unit, whose words are also dealt times the mask of `up` (`runtime.protocols.gated`), it is some
    2,700 instead of 500. So it pays where a round takes long and the dealer is near the server: the
    cost model for the network decides up to how many rows. Steps of more rows take two rounds,
    inside of the same op.

    A GELU's result has 36 fractional bits then, of which nothing is rounded off. So only products
    with constants of the server's may read it, as they can take that many. Where they have no room
    for these, or calibration saw inputs that are too large, the op is computed as before.

    Before:
        %x = input : shared 1xnewx8
        %weight = constant : server 6x8
        %1 = mpc.gelu(%x, True)
        %2 = mpc.linear(%1, %weight)
    After:
        %1 = mpc.gelu(%x, True, alone=1024)
        %2 = mpc.linear(%1, %weight)
    """

    stage = "optimize"
    # What reads an activation, and what its products are, is known after these.
    after = ("defer_norm", "fold_scalars", "hoist_last_position", "merge_chains", "merge_siblings")

    def run(self, graph_module: fx.GraphModule) -> int:
        found = [
            node
            for node in graph_module.graph.nodes
            if op_of(node) in (Gelu, Glu) and node.meta["vis"] is Vis.SHARED
        ]
        if found and not self.info.network.parties.latency:
            self.skip(found[0], "a message takes no time on this network; nor for others")
            return 0
        return sum(self._open(graph_module, node) for node in found)

    def _open(self, graph_module: fx.GraphModule, node: fx.Node) -> int:
        op: Any = op_of(node)
        arguments = bind(op, node)
        if arguments["alone"]:
            return 0
        if op is Gelu and not _for_products(graph_module, node):
            self.skip(node, "not only products with constants of the server's read it")
            return 0
        if op is Glu and arguments["act"] not in FUNCTIONS:
            self.skip(node, "a rectifier is no sum of cosines")
            return 0
        rows, seconds = self._rows(op, node.meta["val"].shape[-1], 2 if _deferred(node) else 1)
        if not rows:
            self.skip(node, f"its table would take {seconds:.1e} s more for each token")
            return 0
        node.kwargs = {**node.kwargs, "alone": rows}
        return 1

    def _rows(self, op: type[Gelu] | type[Glu], size: int, latencies: int) -> tuple[int, float]:
        """For how many rows one opening is cheaper; else by how many seconds it is not.

        latencies: how many a round takes. How far inputs reach is known only later; this is the
        usual case.
        """
        words = torch.empty((1, size), dtype=torch.int64, device="meta")

        def weigh(count: int, alone: int) -> float:
            x = Shared(words.expand(count, size), 2 * FRACTIONAL_BITS)
            given: tuple[Any, ...] = x, True, USUAL_REACH, alone
            if op is Glu:
                given = x, x, "silu", USUAL_REACH, False, alone, USUAL_SPAN
            cost = op.cost(*given, fixed=FRACTIONAL_BITS)
            dealt = call_dealt(op, FRACTIONAL_BITS, False, *given)
            cost = replace(cost, rounds=latencies * cost.rounds)
            return self.info.network.weight(cost, dealt)

        return rows_that_pay(weigh)


USUAL_REACH, USUAL_SPAN = 6, 64


def _deferred(node: fx.Node) -> bool:
    """Whether a norm that was deferred is in front of an activation.

    The openings from there on are an odd number, which take a latency more than they are, and an
    even one without this round (docs/performance.md, Latencies).
    """
    before: Any = node.args[0]
    while is_move(before):
        before = before.args[0]
    op = op_of(before)
    return op is not None and issubclass(op, NormedLinear)


def _for_products(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether products with constants of the server's read a value, and nothing else does."""
    return bool(node.users) and all(
        _for_products(graph_module, user)
        if keeps_rows(user)
        else op_of(user) is Linear and _by_constant(graph_module, node, user)
        for user in node.users
    )


def _by_constant(graph_module: fx.GraphModule, rows: fx.Node, product: fx.Node) -> bool:
    given = bind(Linear, product)
    weight: Any = given["weight"]
    held = constant(graph_module, weight) is not None and weight.meta["vis"] is Vis.SERVER
    return held and given["x"] is rows and given["bias"] is not rows
