"""Runs one pass on a minimal graph, and checks what it changes and what it leaves alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from mergec.compiler.frontend.capture import from_exported
from mergec.compiler.graph.rewriting import GraphInfo, Pass
from mergec.compiler.graph.visibility import annotate_visibility
from mergec.compiler.text import dump
from mergec.passes import available
from mergec.runtime.core.spec import Vis
from mergec.runtime.core.structural import target_name
from mergec.runtime.ops import load_all
from mergec.runtime.program.program import InputSpec

load_all()

TOLERANCE = 1e-9
"""In float64, where rewritten sums are rounded in another order."""


class Fn(nn.Module):
    """A function of named constants and inputs as a module.

    weights are the server's; tables, whose names start with an underscore, are public.
    """

    def __init__(self, body: Callable[..., Any], **constants: torch.Tensor) -> None:
        super().__init__()
        self.body = body
        for name, value in constants.items():
            if name.startswith("_"):
                self.register_buffer(name[1:], value.clone(), persistent=False)
            else:
                self.register_parameter(name, nn.Parameter(value.clone()))

    def forward(self, *inputs: torch.Tensor) -> Any:
        result = self.body(self, *inputs)
        return result if isinstance(result, tuple) else (result,)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 31 * len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Graph:
    """A captured graph, its inputs (integers are the client's, the rest shared), and its value.

    dynamic: a dimension of every input whose size is a symbol. public: numbers of public inputs.
    """

    def __init__(
        self,
        body: Callable[..., Any],
        *inputs: torch.Tensor,
        dynamic: int | None = None,
        public: Sequence[int] = (),
        **constants: torch.Tensor,
    ) -> None:
        sizes = (tuple({dynamic: torch.export.Dim.DYNAMIC} for _ in inputs),) if dynamic else None
        program = torch.export.export(
            Fn(body, **constants), inputs, strict=False, dynamic_shapes=sizes
        )
        specs = []
        for i, value in enumerate(inputs):
            vis = Vis.SHARED if value.is_floating_point() else Vis.CLIENT
            vis = Vis.PUBLIC if i in public else vis
            specs.append(InputSpec(f"x{i}", vis, str(value.dtype), tuple(value.shape)))
        self.module, known = from_exported(program, specs)
        self.info = GraphInfo(specs, known)
        annotate_visibility(self.module, specs, known)
        self.inputs = inputs
        self.skips: list[str] = []
        self.before = self()

    def __call__(self) -> list[torch.Tensor]:
        with torch.no_grad():
            return list(self.module(*self.inputs))

    def run(self, name: str) -> int:
        kind: type[Pass] = available()[name]
        made = kind(self.info)
        made(self.module)
        self.skips = [reason for _, reason in made.skips]
        return made.sites

    @property
    def ops(self) -> dict[str, int]:
        """How often each function is called."""
        nodes = [node for node in self.module.graph.nodes if node.op == "call_function"]
        return dict(Counter(target_name(node.target) for node in nodes))

    @property
    def text(self) -> str:
        return dump(self.module)

    def same(self) -> bool:
        after = self()
        return all(
            a.shape == b.shape and bool((a - b).abs().max() < TOLERANCE)
            for a, b in zip(self.before, after, strict=True)
        )


def rewrites(graph: Graph, *names: str, sites: int = 1) -> dict[str, int]:
    """Run the passes; the last must change `sites` sites and no value. Returns the new ops."""
    *first, name = names
    for needed in first:
        graph.run(needed)
    assert graph.run(name) == sites
    assert graph.same()
    text = graph.text
    assert graph.run(name) == 0, "a second run finds nothing"
    assert graph.text == text
    return graph.ops


def leaves(graph: Graph, *names: str, reason: str = "") -> None:
    """Run the passes; the last must change nothing, and record `reason` for the skip."""
    *first, name = names
    for needed in first:
        graph.run(needed)
    text = graph.text
    assert graph.run(name) == 0
    assert graph.text == text
    if reason:
        assert any(reason in said for said in graph.skips), graph.skips
    else:
        assert not graph.skips
    assert graph.same()
