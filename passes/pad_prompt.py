"""Let the client hide the tokens that it pads a prompt with."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mergec.compiler.errors import CompileError
from mergec.compiler.graph.extremes import evaluated
from mergec.compiler.graph.ir import aten, bind, calls, constant, is_public, is_shared
from mergec.compiler.graph.rewriting import Pass
from mergec.compiler.graph.shapes import fake_mode, insert_call
from mergec.runtime.core.op import REGISTRY, target
from mergec.runtime.core.spec import Vis
from mergec.runtime.engine.plan import LATER, Planned
from mergec.runtime.program.program import PADS, InputSpec, is_text

_STEPS = ((3, 0), (2, 5))
"""New and past tokens for which row numbers are compared with positions."""


class PadPrompt(Pass):
    """Adds the number of padded tokens on the left, which only the client knows, to attention.

    The client subtracts a large number from its own share of the scores of so many first keys. So
    what follows the padding is computed as without it, and nobody else learns where that begins:
    shapes, rounds and bytes follow from the padded length. Masks, rotary positions and biases by
    distance stay public, as they depend on differences of positions alone. Rows of a table of
    positions are looked up by the client, which counts from where the padding ends; with each new
    token that costs 8 bytes for each row of the table.

    Before:
        %ids = input : client int64 1xnew
        %key = input : shared 1x2xpastx8
        %q = input : shared 1x2xnewx8
        %table = constant : server 16x8
        %rows = constant : server 97x8
        %new = aten.sym_size.int(%ids, 1)
        %past = aten.sym_size.int(%key, 2)
        %end = sym.add(%past, %new)
        %at = aten.arange.start(%past, %end)
        %place = aten.embedding.default(%table, %at)
        %word = aten.embedding.default(%rows, %ids)
        %x = aten.add.Tensor(%word, %place)
        %1 = mpc.attention(%q, %key, %key, None, 0.5)
        return [%x, %1]
    After:
        %ids = input : client int64 1xnew
        %key = input : shared 1x2xpastx8
        %q = input : shared 1x2xnewx8
        %pads = input : client int64 1
        %new = aten.sym_size.int(%ids, 1)
        %past = aten.sym_size.int(%key, 2)
        %end = sym.add(%past, %new)
        %at = aten.arange.start(%past, %end)
        %sub = mpc.sub(%at, %pads)
        %clamp = aten.clamp.default(%sub, 0)
        %place = aten.embedding.default(%table, %clamp)
        %word = aten.embedding.default(%rows, %ids)
        %x = aten.add.Tensor(%word, %place)
        %1 = mpc.attention(%q, %key, %key, None, 0.5, 0.0, 'pairs', None, 0, %pads)
        return [%x, %1]
    """

    # Lossy passes before it put other ops in place of attention, which are refused. Look-ups become
    # ops of the dialect after it.
    stage = "approximate"
    after = ("fix_attention", "simplify_norms", "softmax_2quad", "softmax_2relu")
    option = "pad_prompt"

    def run(self, graph_module: fx.GraphModule) -> int:
        nodes = list(graph_module.graph.nodes)
        attentions = [node for node in nodes if calls(node, target("attention"))]
        if any(spec.name == PADS for spec in self.info.inputs):
            return 0
        _check(nodes, self.info.inputs)
        if not attentions:
            return 0
        tables = [node for node in nodes if self._is_by_position(graph_module, node)]
        pads = _added_input(graph_module, self.info.inputs)
        for node in attentions:
            node.args, node.kwargs = _with_pads(node, pads), {}
        for node in tables:
            places = insert_call(node, target("sub"), node.args[1], pads)
            # Rows of padding may be any; a row number below 0 is none.
            node.update_arg(1, insert_call(node, aten.clamp.default, places, 0))
        return len(attentions) + len(tables)

    def _is_by_position(self, graph_module: fx.GraphModule, node: fx.Node) -> bool:
        """Whether a call looks up the rows of a secret table at the positions of new tokens."""
        if not calls(node, aten.embedding.default) or is_public(node):
            return False
        index: Any
        table, index = node.args[:2]
        if constant(graph_module, table) is None or not is_public(index):
            return False
        first = set()
        for new, past in _STEPS:
            found = evaluated(graph_module, index, self._inputs(graph_module, new, past))
            first |= {int(row) - past - i for i, row in enumerate(found.reshape(-1))}
            if found.numel() != new:
                self.skip(node, "its rows are not those of the positions of new tokens")
                return False
        if len(first) > 1 or min(first) < 0:
            self.skip(node, "its rows do not go on with the positions of new tokens")
            return False
        return True

    def _inputs(self, graph_module: fx.GraphModule, new: int, past: int) -> dict[fx.Node, Any]:
        """Zeros for the inputs of a step of these lengths."""
        places = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        found: dict[fx.Node, Any] = {}
        for node, spec in zip(places, self.info.inputs, strict=True):
            dtype = getattr(torch, spec.dtype.removeprefix("torch."))
            found[node] = torch.zeros(spec.shape_of(new, past), dtype=dtype)
        return found


def _check(nodes: list[fx.Node], inputs: list[InputSpec]) -> None:
    """Raise CompileError for a model that padding does not fit."""
    if sum(map(is_text, inputs)) > 1:
        raise CompileError(
            "the source of an encoder-decoder cannot be padded; leave out pad_prompt"
        )
    reasons = {
        target("ratio_attention"): "it gives weight to each key that is there, whatever its score",
        target("constant_attention"): "its weights follow from positions, and not from scores",
        aten.softmax.int: "this softmax was not recognized as part of an attention",
        aten._softmax.default: "this softmax was not recognized as part of an attention",
    }
    faults = {node: reasons[node.target] for node in nodes if node.target in reasons}
    shared = {n: reason for n, reason in faults.items() if is_shared(n) and not _is_of_features(n)}
    if shared:
        raise CompileError("prompts cannot be padded for this model; leave out pad_prompt", shared)


def _is_of_features(node: fx.Node) -> bool:
    """Whether a node is a softmax over a dimension of a fixed size, such as that of a router over
    experts: it takes each token for itself."""
    if not calls(node, aten.softmax.int, aten._softmax.default):
        return False
    dim: Any = node.args[1]
    return isinstance(node.meta["val"].shape[dim], int)


def _added_input(graph_module: fx.GraphModule, inputs: list[InputSpec]) -> fx.Node:
    """The number of padded tokens as a further input, the last one."""
    graph = graph_module.graph
    *_, last = (node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(last):
        pads = graph.placeholder(PADS)
    value, mode = torch.zeros(1, dtype=torch.int64), fake_mode(graph)
    pads.meta |= {"name": PADS, "vis": Vis.CLIENT, "lengths": {}, "module": "", "source": ""}
    pads.meta["val"] = mode.from_tensor(value, static_shapes=True) if mode else value
    inputs.append(InputSpec(PADS, Vis.CLIENT, str(value.dtype), tuple(value.shape)))
    return pads


def _with_pads(node: fx.Node, pads: fx.Node) -> tuple[Any, ...]:
    given = bind(REGISTRY["attention"], node) | {"pads": pads}
    return tuple(Planned.written(given, LATER).values())
