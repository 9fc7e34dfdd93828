"""Use a step's hidden state as the next step's input, and decode all tokens at the end."""

from __future__ import annotations

from typing import Any

from torch import fx

from mergec.compiler.errors import CompileError
from mergec.compiler.graph.ir import ancestors, aten, calls, insert, rank
from mergec.compiler.graph.rewriting import Pass
from mergec.runtime.core.op import target
from mergec.runtime.core.spec import Vis
from mergec.runtime.core.structural import target_name


class ResendHidden(Pass):
    """Removes embedding and sampling from the loop: a step passes its hidden state to the next one.

    Lossy. This is the embedding resending of MERGE (Liang et al., AAAI 2024), which trains models
    for it. The head's input, which is the result of the final norm (and of a projection to the
    embedding's size, as in OPT), replaces the next token's row of the embedding table. It is then
    treated as such a row: scaled (Gemma), projected (OPT), normalized (BLOOM), and added to a
    learned position. The graph still computes the same; it is cut into three phases that run
    separately (`RoleProgram.phase`): tokens to hidden state, hidden state to hidden state, and all
    hidden states to logits, which the head computes in one batch after the last step. So an answer
    has as many tokens as were requested: no stop token can end the loop. An encoder-decoder resends
    its decoder's hidden states; its encoder reads the source's tokens as before. Exact if the
    hidden state equals the next token's row.

    Before:
        %ids = input : client int64 1xnew
        %cache = input : shared 1x1xpastx8
        %table = constant : server 97x8
        %head = constant : server 97x8
        %1 = mpc.embedding(%ids, %table)
        %2 = aten.slice.Tensor(%1, 1, -1, end)
        %3 = mpc.relu(%2)
        %4 = mpc.linear(%3, %head, None)
        %5 = mpc.reveal(%4)
        return [%5, %cache]
    After:
        %1 = mpc.embedding(%ids, %table)
        %1.2 = mpc.carry(%1)
        %2 = aten.slice.Tensor(%1.2, 1, -1, end)
        %3 = mpc.relu(%2)
        %carry = mpc.carry(%3)
        %4 = mpc.linear(%carry, %head, None)
        %5 = mpc.reveal(%4)
        return [%5, %cache]
    """

    stage = "dialect"
    # The embedding and the head have to be recognized first.
    after = ("arithmetic_to_dialect", "embedding_to_dialect", "linear_to_dialect")
    exact = False

    def run(self, graph_module: fx.GraphModule) -> int:
        if any(calls(node, target("carry")) for node in graph_module.graph.nodes):
            return 0
        *_, last = (n for n in graph_module.graph.nodes if n.op == "placeholder")
        if last.meta["vis"] is Vis.CLIENT:
            raise CompileError("embedding resending needs a model with a cache; this one has none")
        ids = _tokens(graph_module)
        table = embedding_of(graph_module)
        head = head_of(graph_module)
        state: Any = head.args[0]
        if rank(state) != 3 or state.meta["val"].shape[-1] != table.meta["val"].shape[-1]:
            reason = "its hidden state does not have the shape of the embedding"
            raise CompileError("embedding resending does not fit this model", {head: reason})
        if str(state.meta["val"].shape[1]) != "1":
            last = insert(
                head, aten.slice.Tensor, (state, 1, -1), state.meta["val"][:, -1:], Vis.SHARED
            )
            head.replace_input_with(state, last)
            state = last
        leaving = insert(head, target("carry"), (state,), state.meta["val"], Vis.SHARED)
        head.replace_input_with(state, leaving)
        _keep_rows(head)
        with graph_module.graph.inserting_after(table):
            entering = graph_module.graph.call_function(target("carry"), (table,))
        entering.meta = dict(table.meta)
        table.replace_all_uses_with(entering, lambda user: user is not entering)
        _measure(ids, entering)
        return 1


def embedding_of(graph_module: fx.GraphModule) -> fx.Node:
    """The one embedding lookup by the client's tokens; of an encoder-decoder, by the answer's."""
    ids = _tokens(graph_module)
    found = [
        node
        for node in graph_module.graph.nodes
        if calls(node, target("embedding"))
        and node.args[0].meta["vis"] is Vis.CLIENT
        and ids in ancestors(node.args[0])
    ]
    if len(found) != 1:
        reason = "embedding resending needs one embedding of the tokens"
        raise CompileError(reason, dict.fromkeys(found, "reads the tokens"))
    return found[0]


def _tokens(graph_module: fx.GraphModule) -> fx.Node:
    """The tokens that a step adds; an encoder-decoder has those of its source before them."""
    inputs = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    return [node for node in inputs if node.meta["vis"] is Vis.CLIENT][-1]


def head_of(graph_module: fx.GraphModule) -> fx.Node:
    """The last product before the logits are revealed."""
    revealed = [n for n in graph_module.graph.nodes if calls(n, target("reveal"))]
    if not revealed:
        raise CompileError(
            "embedding resending lets the client choose all tokens at the end; compile it with "
            'reveal="logits"'
        )
    node: Any = revealed[0]
    while not calls(node, target("linear")):
        operands = [n for n in node.all_input_nodes if n.meta["vis"] is Vis.SHARED]
        if len(operands) != 1:
            reason = "the logits do not come from a linear head"
            raise CompileError("embedding resending does not fit this model", {node: reason})
        (node,) = operands
    return node


def _keep_rows(head: fx.Node) -> None:
    """Remove the selection that would reduce the logits of many steps to those of the last."""
    following = list(head.users)
    while following:
        node = following.pop()
        following += node.users
        if calls(node, aten.slice.Tensor) and node.args[1] == 1:
            rows: Any = node.args[0]
            node.replace_all_uses_with(rows)


def _measure(ids: fx.Node, entering: fx.Node) -> None:
    """Read the number of new tokens from the hidden state that enters, not from the tokens.

    Raises CompileError for any other use of the tokens: later steps have none.
    """
    before = ancestors(entering)
    nodes = list(ids.graph.nodes)
    # All other users of the size come after the value that enters.
    place = [node for node in nodes if node.op == "placeholder"][-1]
    for node in nodes:
        if node in before and node.op != "placeholder":
            place.append(node)
            place = node
    sizes = [n for n in nodes if calls(n, aten.sym_size.int) and n.args[0] is ids]
    for size in sizes:
        with ids.graph.inserting_after(entering):
            new = ids.graph.call_function(aten.sym_size.int, (entering, 1))
        new.meta = dict(size.meta)
        size.replace_all_uses_with(new, lambda user: user not in before)
    bad = {
        user: f"{target_name(user.target)} reads the tokens besides the embedding"
        for user in ids.users
        if user not in before and user.users
    }
    if bad:
        raise CompileError("embedding resending does not fit this model", bad)
