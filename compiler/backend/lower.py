"""Turns a legalized graph into a list of instructions. It makes no decisions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from mergec.compiler.graph.ir import calls
from mergec.compiler.text import assign_names
from mergec.runtime.core.op import target
from mergec.runtime.core.spec import ROLES, Vis
from mergec.runtime.core.structural import encode_literal, target_name
from mergec.runtime.program.program import (
    DECODE,
    FINISH,
    PROMPT,
    InputSpec,
    Instruction,
    Phase,
    Ref,
    RoleProgram,
    TensorSpec,
)

# The server shares a shared constant at the start of a session.
_KNOWN_TO = {
    "client": (Vis.PUBLIC, Vis.CLIENT),
    "server": (Vis.PUBLIC, Vis.SERVER, Vis.SHARED),
    "dealer": (Vis.PUBLIC,),
}


def lower(
    graph_module: fx.GraphModule,
    inputs: list[InputSpec],
    constants: Mapping[str, tuple[torch.Tensor, Vis]],
    fixed: int,
) -> dict[str, RoleProgram]:
    """One program per role, by name; all have the same instructions in the same order.

    A role that may not know a value runs its instruction on shapes alone. The visibilities say
    which instructions these are, so no role omits any. Only `tensors` differ: each role gets those
    that it may know. A graph that was not legalized becomes a program that can be inspected but not
    run.

    constants: tensor and visibility by name. fixed: fractional bits of caches and carried values.
    """
    graph = graph_module.graph
    names = assign_names(graph)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, spec in zip(placeholders, inputs, strict=True):
        names[node] = spec.name
    for node in graph.nodes:
        if node.op == "get_attr":
            names[node] = str(node.target)
    instructions = [_instruction(node, names) for node in graph.nodes if node.op == "call_function"]
    (output,) = [node for node in graph.nodes if node.op == "output"]
    outputs = [names[node] for node in output.args[0]]
    caches = iter(outputs[1:])
    renamed = [
        replace(spec, frac=fixed, form=node.meta.get("form", spec.form), cache_output=next(caches))
        if spec.cache_output
        else spec
        for node, spec in zip(placeholders, inputs, strict=True)
    ]
    phases = _phases(graph, names, renamed, fixed)
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    specs = [
        TensorSpec(name, vis, str(tensor.dtype), tuple(tensor.shape))
        for name, (tensor, vis) in constants.items()
        if name in used
    ]
    return {
        role: RoleProgram(
            role=role,
            instructions=instructions,
            inputs=renamed,
            outputs=outputs,
            constants=specs,
            tensors={
                spec.name: constants[spec.name][0] for spec in specs if spec.vis in _KNOWN_TO[role]
            },
            phases=phases,
        )
        for role in ROLES
    }


def _phases(
    graph: fx.Graph, names: dict[fx.Node, str], inputs: list[InputSpec], fixed: int
) -> list[Phase]:
    """The phases of a program that carries a hidden state from step to step, and of an
    encoder-decoder, whose second one takes the cross caches that the first fills; [] for others."""
    (output,) = [node for node in graph.nodes if node.op == "output"]
    carried = [node for node in graph.nodes if calls(node, target("carry"))]
    encodes = any("source" in spec.shape for spec in inputs)
    if not carried and not encodes:
        return []
    tokens, caches = inputs[encodes], inputs[1 + encodes :]
    results: Any = output.args[0]
    logits, *following = [names[node] for node in results]
    cross = [
        InputSpec(
            names[node],
            Vis.SHARED,
            caches[0].dtype,
            (1, node.meta["val"].shape[1], "source", node.meta["val"].shape[3]),
            fixed,
            names[node],
            node.meta["form"],
        )
        for node in results[1 + len(caches) :]
    ]
    if not carried:
        return [
            Phase(PROMPT, tuple(inputs), (logits, *following)),
            Phase(DECODE, (tokens, *caches, *cross), (logits, *following)),
        ]
    entry, exit_ = (
        InputSpec(
            names[node],
            Vis.SHARED,
            str(node.meta["val"].dtype),
            (1, "new", int(node.meta["val"].shape[-1])),
            fixed,
            form="share",
        )
        for node in carried
    )
    return [
        Phase(PROMPT, tuple(inputs), (exit_.name, *following)),
        Phase(DECODE, (entry, *caches, *cross), (exit_.name, *following)),
        Phase(FINISH, (exit_,), (logits,)),
    ]


def _instruction(node: fx.Node, names: dict[fx.Node, str]) -> Instruction:
    def convert(arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            return Ref(names[arg])
        if isinstance(arg, (list, tuple)):
            return [convert(item) for item in arg]
        return encode_literal(arg)

    return Instruction(
        name=names[node],
        target=target_name(node.target),
        args=tuple(convert(arg) for arg in node.args),
        kwargs={key: convert(arg) for key, arg in node.kwargs.items()},
        vis=node.meta.get("vis", Vis.PUBLIC),
        frac=node.meta.get("frac", 0),
        module=node.meta.get("module", ""),
        source=node.meta.get("source", ""),
    )
