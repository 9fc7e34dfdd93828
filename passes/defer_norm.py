"""Apply the scale of a normalized row behind the product that reads the row."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mergec.compiler.graph.ir import bind, calls, constant
from mergec.compiler.graph.moves import keeps_rows
from mergec.compiler.graph.paying import rows_that_pay
from mergec.compiler.graph.rewriting import Pass
from mergec.compiler.graph.shapes import insert_call
from mergec.compiler.graph.weights import uses
from mergec.runtime.core.op import REGISTRY, target
from mergec.runtime.core.spec import FRACTIONAL_BITS, Vis
from mergec.runtime.core.values import Shared, Weight
from mergec.runtime.engine.rehearsal import call_dealt
from mergec.runtime.ops.linear import Linear
from mergec.runtime.ops.normed_linear import NormedLinear


class DeferNorm(Pass):
    """Rewrites linear(norm(x), W, b) as one op that can scale the product instead of the row.

    Saves a round, or two where the normalized row would have to be truncated for the product: x W
    is computed while the protocol finds out how large x is (`runtime.protocols.deferred`). It takes
    16 bytes more for each output, which is opened to both parties. So it pays where a round takes
    long: the cost model for the network decides for each layer up to how many rows. Steps of more
    rows, such as long prompts, run the norm first.

    The norm must have neither gain nor bias, its rows must be read by one product alone, and the
    matrix must not be used elsewhere.

    Before:
        %x = input : shared 1xnewx8
        %weight = constant : server 16x8
        %bias = constant : server 16
        %1 = mpc.rms_norm(%x, None, 1e-06, 0.0)
        %2 = mpc.linear(%1, %weight, %bias)
    After:
        %2 = mpc.rms_norm_linear(%x, %weight, %bias, 1e-06, rows=1024)
    """

    stage = "optimize"
    # These passes fold what stands between a norm and its products, or change which products there
    # are.
    after = (
        "centre_residual",
        "fold_norm_affine",
        "fold_attention_scale",
        "fold_scalars",
        "hoist_last_position",
        "merge_chains",
        "merge_siblings",
    )

    def run(self, graph_module: fx.GraphModule) -> int:
        norms = [
            (node, op)
            for node in list(graph_module.graph.nodes)
            for op in _ops()
            if calls(node, target(op.norm.name)) and node.meta["vis"] is Vis.SHARED
        ]
        if norms and not self.info.network.parties.latency:
            self.skip(norms[0][0], "a message takes no time on this network; nor for other norms")
            return 0
        return sum(self._defer(graph_module, norm, op) for norm, op in norms)

    def _defer(self, graph_module: fx.GraphModule, norm: fx.Node, op: type[NormedLinear]) -> int:
        arguments = bind(op.norm, norm)
        if any(arguments[name] is not None for name in op.norm.tensors[1:]):
            self.skip(norm, "it has a gain or a bias, which no product has absorbed")
            return 0
        moves, product = _product(norm)
        if product is None:
            self.skip(norm, "its rows are not read by one product alone")
            return 0
        given = bind(Linear, product)
        weight: Any = given["weight"]
        if constant(graph_module, weight) is None or weight.meta["vis"] is not Vis.SERVER:
            self.skip(norm, f"the matrix of %{product.name} is not a constant of the server's")
            return 0
        if len(uses(graph_module, weight)) > 1:
            self.skip(norm, f"the matrix of %{product.name} is also used elsewhere")
            return 0
        rows, seconds = self._rows(op, *weight.meta["val"].shape)
        if not rows:
            self.skip(norm, f"scaling the product would take {seconds:.1e} s more for each token")
            return 0
        x = arguments["x"]
        for move in moves:
            x = insert_call(move, move.target, x, *move.args[1:], **move.kwargs)
        new = insert_call(
            product, target(op.name), x, weight, given["bias"], arguments["eps"], rows=rows
        )
        new.meta = dict(product.meta)
        product.replace_all_uses_with(new)
        return 1

    def _rows(self, op: type[NormedLinear], outputs: int, inputs: int) -> tuple[int, float]:
        """For how many rows scaling the product is cheaper; else by how many seconds it is not.

        Fractional bits, and how many octaves the rows span, are known only later; these are the
        usual ones.
        """
        words = torch.empty((outputs, inputs), dtype=torch.int64, device="meta")
        weight = Weight(words, words, words, FRACTIONAL_BITS)

        def weigh(count: int, most: int) -> float:
            rows = Shared(words.new_empty((count, inputs)), 2 * FRACTIONAL_BITS)
            given = (rows, weight, None, 1e-6)
            more: dict[str, Any] = {"kept": 24, "rows": most}
            cost = op.cost(*given, **more, fixed=FRACTIONAL_BITS)
            dealt = call_dealt(op, FRACTIONAL_BITS, False, *given, **more)
            return self.info.network.weight(cost, dealt)

        return rows_that_pay(weigh)


def _ops() -> list[type[NormedLinear]]:
    return [op for op in REGISTRY.values() if issubclass(op, NormedLinear)]


def _product(norm: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
    """Moves of whole rows behind a norm, and the product that reads them if nothing else does."""
    moves: list[fx.Node] = []
    node = norm
    while len(node.users) == 1:
        (user,) = node.users
        if calls(user, target("linear")):
            return moves, user if user.args[0] is node else None
        if not keeps_rows(user):
            break
        moves.append(user)
        node = user
    return moves, None
