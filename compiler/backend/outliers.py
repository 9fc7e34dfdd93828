"""Room for massive activations: single columns of a residual stream at a scale of their own.

A few columns of a trained decoder's residual stream become a hundred times as large as all others
(Sun et al., "Massive Activations in Large Language Models", COLM 2024). A stream has one binary
point, so the largest column decides how many fractional bits its words can have. If these columns
are divided by powers of two where they are written, the words of all columns are about as large,
and the factors of the products that write them need no truncation. Norms multiply them again, as
they shift rows in any case (`columns` of `mpc.rms_norm`). Scaling single channels is known from
quantization (Xiao et al., "SmoothQuant", ICML 2023). Powers of two make it exact.

The rows of the matrices that write such a column have as many fractional bits fewer as it is
divided by. Its entries are larger by more than that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mergec.compiler.frontend.capture import Captured
from mergec.compiler.graph.ir import bind, calls, op_of
from mergec.compiler.graph.moves import is_move
from mergec.compiler.graph.shapes import insert_call
from mergec.compiler.graph.streams import Stream, streams
from mergec.compiler.graph.weights import drop_unused_constants, insert_folded, uses, wide
from mergec.runtime.core.op import target
from mergec.runtime.core.spec import HEADROOM_BITS, RANGE_MARGIN_BITS, Vis
from mergec.runtime.ops.embedding import Embedding
from mergec.runtime.ops.linear import Linear
from mergec.runtime.ops.scale import Scale
from mergec.runtime.protocols.columns import factors

MOST_BITS = 8
"""Most bits by which a column may be shrunk, which the rows that write it then lack."""

FEW = 16
"""At most one in so many columns is shrunk: beyond that the whole stream is large."""

_STEP = 4
"""Exponents are multiples of this: norms open and scale the columns of each exponent apart."""


def shrink_outliers(captured: Captured, fixed: int) -> int:
    """Shrink the largest columns of streams, in place, where that saves truncations.

    fixed: the program's fractional bits. Needs the ranges of calibration, and updates them. Returns
    the number of columns that were shrunk, over all streams.
    """
    graph_module, count = captured.graph_module, 0
    for stream in streams(graph_module.graph):
        exponents = _exponents(graph_module, stream, fixed)
        if exponents is not None:
            _shrink(captured, stream, exponents)
            count += int((exponents > 0).sum())
    if count:
        graph_module.graph.eliminate_dead_code()
        drop_unused_constants(graph_module, captured.constants)
        graph_module.graph.lint()
        graph_module.recompile()
    return count


def _exponents(graph_module: fx.GraphModule, stream: Stream, fixed: int) -> torch.Tensor | None:
    """By how many bits to shrink each column; None to leave the stream as it is."""
    if stream.others or not all(_takes_columns(norm) for norm in stream.readers):
        return None
    if not all(_shrinkable(graph_module, writer) for writer in stream.writers):
        return None
    if not all("columns" in value.meta for value in stream.values):
        return None
    finest = max((_untruncated(writer, fixed) for writer in stream.writers), default=0)
    if finest <= fixed:
        return None
    most = torch.stack([_largest(value) for value in stream.values]).amax(0)
    limit = HEADROOM_BITS - RANGE_MARGIN_BITS - finest - fixed
    bits = torch.log2(most.clamp(min=2.0**limit)) - limit
    exponents = (_STEP * torch.ceil(bits / _STEP)).long()
    shrunk = int((exponents > 0).sum())
    if not shrunk or shrunk * FEW > stream.width or int(exponents.max()) > MOST_BITS:
        return None
    return exponents


def _takes_columns(norm: fx.Node) -> bool:
    return calls(norm, target("rms_norm"), target("rms_norm_linear"))


def _shrinkable(graph_module: fx.GraphModule, writer: fx.Node) -> bool:
    """Whether a writer's columns can be divided by powers of two at no cost."""
    if writer.meta["vis"] is not Vis.SHARED:
        return True
    op = op_of(writer)
    if op is not Linear:
        return op in (Embedding, Scale)
    _, weight, bias = (*writer.args, None)[:3]
    given = [node for node in (weight, bias) if isinstance(node, fx.Node)]
    return all(
        node.op == "get_attr" and all(user is writer for user in uses(graph_module, node))
        for node in given
    )


def _untruncated(writer: fx.Node, fixed: int) -> int:
    """Fractional bits of the factor of a product that writes to a stream, before a truncation.

    0 if it is no product, or of a factor that no protocol computes.
    """
    if op_of(writer) is not Linear:
        return 0
    node: Any = writer.args[0]
    while is_move(node):
        node = node.args[0]
    op = op_of(node)
    if op is None or op.local:
        return 0

    def seen(value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        vis = value.meta.get("vis", Vis.PUBLIC)
        return fixed if vis is Vis.SHARED else vis

    return op.scale(*map(seen, bind(op, node).values()), fixed=fixed)


def _largest(value: fx.Node) -> torch.Tensor:
    least, most = value.meta["columns"]
    return torch.maximum(-least, most)


def _shrink(captured: Captured, stream: Stream, exponents: torch.Tensor) -> None:
    parts = _runs(exponents)
    divisor = factors(parts)
    for value in stream.values:
        least, most = (end / divisor for end in value.meta["columns"])
        value.meta["columns"] = least, most
        value.meta["range"] = float(least.min()), float(most.max())
    for writer in stream.writers:
        if op_of(writer) is Linear and writer.meta["vis"] is Vis.SHARED:
            _shrink_product(captured, writer, divisor)
        else:
            shrunk = insert_call(writer.next, target("shrink"), writer, parts)
            shrunk.meta |= {key: writer.meta[key] for key in ("module", "source", "range")}
            for user in [user for user in writer.users if user is not shrunk]:
                user.replace_input_with(writer, shrunk)
            least, most = (end * divisor for end in writer.meta["columns"])
            writer.meta["range"] = float(least.min()), float(most.max())
    for norm in stream.readers:
        arguments = bind(op_of(norm), norm)  # type: ignore[arg-type]
        norm.args, norm.kwargs = tuple((arguments | {"columns": parts}).values()), {}


def _shrink_product(captured: Captured, linear: fx.Node, divisor: torch.Tensor) -> None:
    """Divide the rows of the matrix, and the bias."""
    graph_module, known = captured.graph_module, captured.constants
    x, weight, bias, *rest = (*linear.args, None)[: max(3, len(linear.args))]
    matrix = wide(graph_module, weight) / divisor[:, None]
    made = insert_folded(graph_module, linear, weight, matrix, known)  # type: ignore[arg-type]
    if isinstance(bias, fx.Node):
        shrunk = wide(graph_module, bias) / divisor
        bias = insert_folded(graph_module, linear, bias, shrunk, known)
    linear.args = (x, made, bias, *rest)


def _runs(exponents: torch.Tensor) -> list[int]:
    """The exponents of columns as (columns, exponent, columns, exponent, ...)."""
    values, counts = torch.unique_consecutive(exponents, return_counts=True)
    return torch.stack([counts, values], -1).flatten().tolist()
