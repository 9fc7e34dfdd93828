"""Reveal the logits to the client as early as that reveals nothing more; or the token alone."""

from __future__ import annotations

from typing import Any

from torch import fx

from mergec.compiler.graph.ir import aten, calls, is_shared, rank
from mergec.compiler.graph.rewriting import Pass
from mergec.compiler.graph.shapes import insert_call
from mergec.runtime.core.op import target

_INVERTIBLE = (aten.tanh.default, aten.neg.default)
_BY_NUMBER = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor)


class RevealLogits(Pass):
    """Reveals the logits before ops that the client can compute from them in the clear.

    A final softcap (gemma2) is an invertible function of each logit, so the client would learn the
    same from its result. If the client may learn only the token, `mpc.reveal_token` reads the last
    logits instead. With the option `logit_noise` the server adds noise, an argument of
    `mpc.reveal`. Logits of several heads, one behind the other, are revealed apart from each other,
    because they are ready at different times and have different scales.

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
        whole = calls(logits, aten.cat.default) and _by_position(logits)
        for part in logits.args[0] if whole else [logits]:
            self._reveal(graph_module, part, logits if whole else output)
        return 1

    def _reveal(self, graph_module: fx.GraphModule, logits: Any, user: fx.Node) -> None:
        """Reveal what `user` takes."""
        if self.info.reveal == "token":
            user.replace_input_with(logits, insert_call(user, target("reveal_token"), logits))
            return
        while len(logits.users) == 1 and _scalar(logits):
            logits = logits.args[0]
        noise = (self.info.logit_noise,) if self.info.logit_noise else ()
        users = list(logits.users)
        with graph_module.graph.inserting_after(logits):
            revealed = graph_module.graph.call_function(target("reveal"), (logits, *noise))
        revealed.meta = dict(logits.meta)
        for user in users:
            user.replace_input_with(logits, revealed)


def _by_position(cat: fx.Node) -> bool:
    """Whether a `cat` of logits puts whole rows one behind the other."""
    dim: Any = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
    return dim % rank(cat) != rank(cat) - 1


def _scalar(node: fx.Node) -> bool:
    """Whether each number of the node's operand can be computed from its result."""
    if calls(node, *_INVERTIBLE, aten.reshape.default):
        return True
    if calls(node, aten.slice.Tensor):
        # Rows are selected before the opening: the client must not learn the others.
        whole: fx.Node = node.args[0]  # type: ignore[assignment]
        return list(map(str, whole.meta["val"].shape)) == list(map(str, node.meta["val"].shape))
    return (
        calls(node, *_BY_NUMBER) and isinstance(node.args[1], (int, float)) and bool(node.args[1])
    )
