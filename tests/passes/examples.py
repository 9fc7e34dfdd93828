"""Runs a pass on a graph given as text, and checks the example in a pass's docstring."""

from __future__ import annotations

import difflib
import inspect
import itertools
from dataclasses import dataclass
from typing import Any

import torch

from mergec.compiler.graph.contract import TOLERANCE, Wide
from mergec.compiler.graph.parse import Parsed, ParseError, parse
from mergec.compiler.graph.rewriting import GraphInfo, Pass
from mergec.compiler.text import dump
from mergec.runtime.core.network import NETWORKS
from mergec.runtime.core.spec import Vis
from mergec.runtime.ops import load_all

load_all()

LENGTHS = {"new": 3, "past": 4, "source": 6}
CALIBRATION = ((5, 17, 3, 88, 41, 9), (2, 60, 71, 8))
"""For passes that observe the graph; tokens of a vocabulary of 97."""


@dataclass(frozen=True)
class Ran:
    """The effect of a pass on a graph: its text before and after, the skips, and the values."""

    sites: int
    given: str
    text: str
    skips: list[tuple[str, str]]
    before: list[torch.Tensor]
    after: list[torch.Tensor]

    @property
    def same_values(self) -> bool:
        """Whether the graph computes the same as before, up to rounding."""
        return all(
            a.shape == b.shape
            and torch.allclose(
                a.double(), b.double(), rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True
            )
            for a, b in zip(self.before, self.after, strict=True)
        )


def run(kind: type[Pass], text: str, reveal: str = "logits") -> Ran:
    """Run a pass on a graph, and the graph before and after it on random inputs."""
    parsed = _parsed(kind, text)
    given = dump(parsed.graph_module)
    inputs = {spec.name: value for spec, value in zip(parsed.inputs, _inputs(parsed), strict=True)}
    before = _values(parsed, inputs)
    network = NETWORKS["wan"]  # Where passes that save rounds have the most to do.
    info = GraphInfo(parsed.inputs, parsed.constants, CALIBRATION, reveal, network=network)
    made = kind(info)
    made(parsed.graph_module)
    return Ran(
        made.sites,
        given,
        dump(parsed.graph_module),
        [(skip.node, skip.reason) for skip in made.explained],
        before,
        _values(parsed, inputs) if kind.exact else before,
    )


def _parsed(kind: type[Pass], text: str) -> Parsed:
    """The graph of a text; fails with the name of the pass if it is not one."""
    try:
        return parse(text)
    except ParseError as error:
        raise AssertionError(
            f"{kind.name()}: {error}, in this graph of its docstring or golden file:\n{text}"
        ) from error


def check_example(kind: type[Pass]) -> None:
    """Fail unless the pass turns the `Before:` of its docstring into the `After:`, exactly.

    `After:` need not repeat the declarations of `Before:`, nor the types of calls. An exact pass
    has to compute the same values in float64, and no pass may find anything the second time.
    """
    before, after = example(kind)
    ran = run(kind, before)
    assert ran.sites > 0, f"{kind.name()} finds nothing in the Before of its docstring"
    again = run(kind, _declared(before, after))
    wanted, made = again.given, ran.text
    difference = "\n".join(
        difflib.unified_diff(wanted.splitlines(), made.splitlines(), "After", "made", "", "", 9)
    )
    assert wanted == made, f"{kind.name()} does not do what its docstring says:\n{difference}"
    assert ran.same_values, f"{kind.name()} changes a value of the example in its docstring"
    assert again.sites == 0, f"{kind.name()} changes the After of its docstring once more"


def example(kind: type[Pass]) -> tuple[str, str]:
    """The texts of `Before:` and `After:`."""
    lines = inspect.cleandoc(kind.__doc__ or "").splitlines()
    assert {"Before:", "After:"} <= set(lines), f"{kind.name()} shows no Before: and After:"

    def section(title: str) -> str:
        following = lines[lines.index(title) + 1 :]
        return "\n".join(itertools.takewhile(lambda li: li.startswith("    "), following)) + "\n"

    return section("Before:"), section("After:")


def _declared(before: str, after: str) -> str:
    """The text of `After`, with the declarations of `Before` that it does not repeat.

    Those are the inputs, unless it lists its own, and the constants that it uses.
    """
    own = after.splitlines()
    given = {line.split()[0] for line in own}
    inputs = [line for line in own if " = input : " in line]
    inputs = inputs or [line for line in before.splitlines() if " = input : " in line]
    constants = [
        line
        for line in before.splitlines()
        if " = constant" in line
        and line.split()[0] not in given
        and any(f"{line.split()[0]}{end}" in after for end in ",)]")
    ]
    return "\n".join([*inputs, *constants, *(line for line in own if line not in inputs)])


def _inputs(parsed: Parsed) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    made = []
    for spec in parsed.inputs:
        shape = [LENGTHS[size] if isinstance(size, str) else size for size in spec.shape]
        if spec.vis is Vis.CLIENT:
            made.append(torch.randint(0, 97, shape, generator=random))
        else:
            dtype = getattr(torch, spec.dtype.removeprefix("torch."))
            value = torch.randn(shape, generator=random, dtype=torch.float64)
            made.append(value.to(dtype))
    return made


def _values(parsed: Parsed, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """The graph's results. An input that a pass has added is zero, which changes nothing."""
    zero = torch.zeros(1, dtype=torch.int64)
    given = (inputs.get(spec.name, zero).clone() for spec in parsed.inputs)
    with torch.no_grad():
        return list(Wide(parsed.graph_module).run(*given))
