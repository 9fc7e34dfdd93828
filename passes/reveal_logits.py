"""Open the logits to the client, as early as nothing else is learned by it; or the token alone."""

from __future__ import annotations

from torch import fx

from mergec.compiler.graph.ir import aten, calls, is_shared
from mergec.compiler.graph.rewriting import Pass
from mergec.compiler.graph.shapes import insert_call
from mergec.runtime.core.op import target

_INVERTIBLE = (aten.tanh.default, aten.neg.default)
_BY_NUMBER = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor)


class RevealLogits(Pass):
    """What the client computes from revealed numbers alone, it computes in the clear.

    A final softcap (gemma2) is an invertible function of each logit: the client would learn the
    same from its result. Where the client is to learn the token alone, `mpc.reveal_token` takes the
    last logits in place of all this.

    Before:
        %x = input : shared 1x1x8
        %weight = constant : server 97x8
        %1 = aten.linear.default(%x, %weight)
        %2 = aten.div.Tensor(%1, 30.0)
        %3 = aten.tanh.default(%2)
        %4 = aten.mul.Tensor(%3, 30.0)
    After:
        %1 = aten.linear.default(%x, %weight)
        %1.2 = mpc.reveal(%1)
        %2 = aten.div.Tensor(%1.2, 30.0)
        %3 = aten.tanh.default(%2)
        %4 = aten.mul.Tensor(%3, 30.0)
    """

    stage = "canonicalize"
    after = ("unify_spellings",)

    def run(self, graph_module: fx.GraphModule) -> int:
        (output,) = [node for node in graph_module.graph.nodes if node.op == "output"]
        logits = output.args[0][0]
        if not is_shared(logits):
            return 0
        if self.info.reveal == "token":
            output.replace_input_with(logits, insert_call(output, target("reveal_token"), logits))
            return 1
        while len(logits.users) == 1 and _scalar(logits):
            logits = logits.args[0]
        users = list(logits.users)
        with graph_module.graph.inserting_after(logits):
            revealed = graph_module.graph.call_function(target("reveal"), (logits,))
        revealed.meta = dict(logits.meta)
        for user in users:
            user.replace_input_with(logits, revealed)
        return 1


def _scalar(node: fx.Node) -> bool:
    """Whether the node's operand follows from its result, number by number."""
    if calls(node, *_INVERTIBLE, aten.reshape.default):
        return True
    if calls(node, aten.slice.Tensor):
        # A choice of rows comes before the opening: the other rows are nobody's business.
        whole: fx.Node = node.args[0]  # type: ignore[assignment]
        return list(map(str, whole.meta["val"].shape)) == list(map(str, node.meta["val"].shape))
    return (
        calls(node, *_BY_NUMBER) and isinstance(node.args[1], (int, float)) and bool(node.args[1])
    )
