"""Refuses programs whose fixed-point numbers are too coarse for what the model computes.

Ranges say whether a value fits into the ring from above. Whether it fits from below depends on what
becomes of it: a norm makes small rows large, and a residual stream hides small terms. So the
legalized graph is run in the clear with a deviation at every place where the parties round, and its
logits are compared with those of exact numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx

from mergec.compiler.config import Sample, as_pair
from mergec.compiler.errors import CompileError
from mergec.compiler.graph.extremes import extreme_tokens
from mergec.compiler.graph.ir import bind, is_shared, op_of
from mergec.compiler.graph.ranges import prompt
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import FRACTIONAL_BITS, Vis
from mergec.runtime.ops.embedding import Embedding
from mergec.runtime.ops.reveal import REVEALED_FRAC
from mergec.runtime.program.program import InputSpec

TOLERANCE = 0.03
"""How far rounding may move a logit, in standard deviations of the logits of one place.

Here roundings fall once. In private runs they fall otherwise each time, and moved a logit up to 2.8
times as far.
"""

LOSSY_TOLERANCE = 0.5
"""The same for lossy programs, whose squares and unbounded rows enlarge what rounding does."""

_WHOLE = 1e-3
"""A number of units this close to a whole number is one."""


def check_rounding(
    graph_module: fx.GraphModule,
    inputs: Sequence[InputSpec],
    sequences: Sequence[Sample],
    *,
    lossy: bool = False,
) -> None:
    """Raise CompileError if rounding changes the logits, which names the value that is too coarse.

    Runs the legalized graph on the first sequence, and unless it is lossy on the tokens with the
    most extreme rows of the embedding (`graph.extremes`), each as a prompt. In long prompts
    attention averages the roundings of values, so a first token, the largest and the smallest row
    also make a prompt each.
    """
    tolerance = LOSSY_TOLERANCE if lossy else TOLERANCE
    source = as_pair(sequences[0]).source
    start = prompt(graph_module, inputs, source[:1])
    extremes = [] if lossy else extreme_tokens(graph_module, start)[: len(source)]
    samples: list[Sample] = [sequences[0]]
    if not lossy:
        samples.append(source[:1])
    if extremes:
        samples += [extremes, extremes[::-1], extremes[:1], extremes[-1:]]
    for sample in samples:
        trial = _Trial(graph_module, prompt(graph_module, inputs, sample))
        moved = trial.moved()
        if moved > tolerance:
            node = trial.culprit(tolerance)
            reason = (
                f"{node.meta['frac']} fractional bits are too few: its values are about "
                f"{trial.size(node):.0e} in calibration; check the size of this module's weights"
            )
            raise CompileError(
                f"rounding to fixed point would move logits by {moved:.2g} of their standard "
                "deviation",
                {node: reason},
            )


class _Trial:
    """A legalized graph on one prompt, exact and rounded."""

    def __init__(self, graph_module: fx.GraphModule, given: Sequence[torch.Tensor]) -> None:
        self.graph_module, self.given = graph_module, given
        self.rounded = [
            node
            for node in graph_module.graph.nodes
            if node.op == "call_function" and (op_of(node) and "frac" in node.meta)
        ]
        self.exact = self._run(0).logits

    def moved(self, count: int | None = None) -> float:
        """The largest change of a logit by the first roundings, in standard deviations."""
        change = float((self._run(count).logits - self.exact).abs().max())
        spread = float(self.exact.std(correction=0))
        return change / spread if spread else 0.0

    def culprit(self, tolerance: float) -> fx.Node:
        """The first node whose rounding, with those before it, moves the logits too far.

        Found by bisection, in about eight runs.
        """
        low, high = 1, len(self.rounded)
        while low < high:
            middle = (low + high) // 2
            if self.moved(middle) > tolerance:
                high = middle
            else:
                low = middle + 1
        return self.rounded[low - 1]

    def size(self, node: fx.Node) -> float:
        """The root of the mean square of a node's exact values."""
        return float(self._run(0, node).kept.double().square().mean().sqrt())

    def _run(self, count: int | None = None, keep: fx.Node | None = None) -> _Rounded:
        interpreter = _Rounded(self.graph_module, set(self.rounded[:count]), keep)
        with torch.inference_mode():
            interpreter.run(*self.given)
        return interpreter


class _Rounded(fx.Interpreter):
    """Runs a legalized graph in the clear, with the roundings of some of its nodes.

    logits: those of the last position [V] in float64, before a token is chosen from them. kept: the
    value of the node `keep`.
    """

    def __init__(
        self, module: fx.GraphModule, rounded: Collection[fx.Node], keep: fx.Node | None
    ) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.rounded, self.keep = rounded, keep
        self.kept = self.logits = torch.zeros(())
        self.random = torch.Generator().manual_seed(0)

    def run_node(self, n: fx.Node) -> Any:
        op = op_of(n)
        result = self._call(n, op) if n in self.rounded and op else super().run_node(n)
        if n is self.keep:
            self.kept = result
        if op is not None and op.result == "revealed":
            logits = self.env[n.args[0]]  # type: ignore[index]
            if n in self.rounded:
                logits = self._round(logits, REVEALED_FRAC)
            self.logits = logits.double().reshape(-1, logits.shape[-1])[-1]
        return result

    def _call(self, node: fx.Node, op: type[Op]) -> Any:
        """The op on rounded weights and windows, with the roundings inside of its protocol."""
        arguments = bind(op, node)
        forms = op.forms(*map(_form_argument, arguments.values()))
        values, fracs = {}, {}
        for name, argument in arguments.items():
            value = fx.map_arg(argument, self.env.__getitem__)
            if isinstance(argument, fx.Node) and isinstance(value, torch.Tensor):
                fracs[name] = argument.meta.get("frac", FRACTIONAL_BITS)
                if name in op.weights and (argument.op == "get_attr" or not is_shared(argument)):
                    # The rows of a table are rounded as they are read.
                    if op is not Embedding:
                        value = _encoded(value, arguments)
                elif forms.get(name) == "window":
                    value = self._round(value, FRACTIONAL_BITS)
            values[name] = value
        result = op.rounded(fracs, values)
        return self._round(result, node.meta["frac"])

    def _round(self, value: torch.Tensor, frac: int) -> torch.Tensor:
        """Half a unit more or less, at random, but for whole numbers of units.

        A truncation rounds to the next unit, up with the probability that makes it right in the
        mean. Half a unit is the most that this deviates in the root of the mean square. Numbers far
        below a unit are rarely rounded up; one draw would miss that, and what it does.
        """
        if not value.is_floating_point():
            return value
        scaled = value.double() * 2.0**frac
        signs = torch.randint(0, 2, value.shape, generator=self.random)
        whole = scaled.round()
        # Products of whole numbers are whole numbers, but for the precision of floats.
        rounded = torch.where((scaled - whole).abs() < _WHOLE, whole, scaled + (signs - 0.5))
        return (rounded * 2.0**-frac).to(value.dtype)


def _form_argument(value: Any) -> Any:
    """The value that `Op.forms` gets for an argument."""
    return value.meta.get("vis", Vis.PUBLIC) if isinstance(value, fx.Node) else value


def _encoded(weight: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """A constant as it is encoded: with the program's fractional bits and those of the call."""
    if not weight.is_floating_point():
        return weight  # whole numbers, such as those of a mask
    frac = torch.tensor(float(FRACTIONAL_BITS + arguments.get("bits", 0)))
    if parts := arguments.get("parts"):
        more = torch.repeat_interleave(torch.tensor(parts[1::2]), torch.tensor(parts[::2]))
        frac = (frac + more).reshape(-1, *[1] * (weight.dim() - 1))
    units = torch.exp2(frac).to(weight.dtype)
    return (weight * units).round_().div_(units)
