"""What a graph must consist of before it can be lowered."""

from __future__ import annotations

from torch import fx

from mergec.compiler.errors import CompileError
from mergec.runtime.core.op import REGISTRY
from mergec.runtime.core.spec import Vis
from mergec.runtime.core.structural import MOVE_NAMES, TABLE, target_name


def verify_dialect(graph_module: fx.GraphModule) -> None:
    """Raise CompileError that names every node which no party could run."""
    bad = unlowerable(graph_module)
    if bad:
        many = f"{len(bad)} ops" if len(bad) > 1 else "an op"
        raise CompileError(f"the model has {many} that cannot be lowered", bad)


def unlowerable(graph_module: fx.GraphModule) -> dict[fx.Node, str]:
    """Every node which no party could run, and why.

    A shared value must come from an op of the dialect, or from a movement of data; a value that is
    public or held by one party from any function of `runtime.core.structural`.
    """
    bad: dict[fx.Node, str] = {}
    for node in graph_module.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        name = target_name(node.target)
        if node.op != "call_function":
            bad[node] = f"a {node.op} node cannot be compiled; export the model with torch.export"
        elif name.startswith("mpc."):
            if name[4:] not in REGISTRY:
                bad[node] = f"{name} is no op of the dialect"
        elif node.meta.get("vis") is Vis.SHARED and name not in MOVE_NAMES:
            bad[node] = (
                f"{name} has no protocol on secret values; add runtime/ops/<op>.py and a pass that "
                "makes it, or rewrite the model with ops of the dialect"
            )
        elif name not in TABLE:
            bad[node] = f"{name} is no function that a program may call"
        if node in bad and (maker := node.meta.get("pass")):
            bad[node] += f"; made by the pass {maker}"
    return bad
