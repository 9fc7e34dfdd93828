"""Turn LayerNorms into RMSNorms by centring what writes the residual stream."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from mergec.compiler.graph.ir import bind, calls, is_shared, op_of, replace
from mergec.compiler.graph.rewriting import Pass
from mergec.compiler.graph.shapes import insert_call
from mergec.compiler.graph.streams import Stream, streams
from mergec.compiler.graph.weights import computable, insert_folded, uses, wide
from mergec.runtime.core.op import target

_MEAN_BITS = 12
"""Bits with which the mean of an embedding's row is computed where its table cannot be centred."""


class CentreResidual(Pass):
    """Centres all that is added to a residual stream, so that its LayerNorms become RMSNorms.

    A LayerNorm subtracts a row's mean, and so may every layer that writes the row: the columns of a
    product are centred by centring those of its matrix (Ashkboos et al., "SliceGPT", ICLR 2024,
    section 3.2). A LayerNorm centres rows as d x - sum(x), which takes log2(2 d) bits of room in
    the ring. Without it, products that are added to the stream need no truncation of their factor
    before: one round and 32 bytes per element for each attention.

    All readers of the stream must be LayerNorms. A table that is used twice, such as one that is
    tied to the head, stays as it is, and its rows are centred as they are read, which is local.

    Before:
        %ids = input : client int64 1xnew
        %y = input : shared 1xnewx16
        %weight = constant : server 8x16
        %bias = constant : server 8
        %table = constant : server 97x8
        %e = mpc.embedding(%ids, %table)
        %1 = mpc.linear(%y, %weight, %bias)
        %2 = mpc.add(%e, %1)
        %3 = mpc.layer_norm(%2, None, None, 1e-05)
    After:
        %ids = input : client int64 1xnew
        %y = input : shared 1xnewx16
        %weight_folded = constant : server 8x16
        %bias_folded = constant : server 8
        %table_folded = constant : server 97x8
        %e = mpc.embedding(%ids, %table_folded)
        %1 = mpc.linear(%y, %weight_folded, %bias_folded)
        %2 = mpc.add(%e, %1)
        %3 = mpc.rms_norm(%2, None, 1e-05, 0.0)
    """

    stage = "optimize"
    # Gains and biases that fold into layers are gone then.
    after = ("fold_norm_affine",)

    def run(self, graph_module: fx.GraphModule) -> int:
        count = 0
        for stream in streams(graph_module.graph):
            if not any(calls(norm, target("layer_norm")) for norm in stream.readers):
                continue
            if not any(calls(writer, target("linear")) for writer in stream.writers):
                continue  # No product writes it: there is nothing to gain.
            reason = self._unfit(graph_module, stream)
            if reason:
                self.skip(stream.readers[0], reason)
                continue
            for writer in stream.writers:
                self._centre(graph_module, writer, stream.width)
            for norm in stream.readers:
                _as_rms_norm(norm)
            count += len(stream.readers)
        return count

    def _unfit(self, graph_module: fx.GraphModule, stream: Stream) -> str:
        """Why a stream cannot be centred; empty if it can."""
        if not all(calls(norm, target("layer_norm")) for norm in stream.readers):
            return "an RMSNorm reads the same stream"
        if stream.others:
            return f"the stream also goes to %{stream.others[0].name}"
        for writer in stream.writers:
            if calls(writer, target("linear")):
                _, weight, bias = _operands(writer)
                given = [weight] if bias is None else [weight, bias]
                if not all(computable(graph_module, node) for node in given):
                    return f"the matrix of %{writer.name} is not a constant of 32 bits or more"
                if any(user is not writer for user in uses(graph_module, weight)):
                    return f"the matrix of %{writer.name} is also used elsewhere"
            elif is_shared(writer) and not calls(writer, target("embedding")):
                return f"%{writer.name} writes the stream, which is no product with a matrix"
        return ""

    def _centre(self, graph_module: fx.GraphModule, writer: fx.Node, width: int) -> None:
        known = self.info.constants
        if calls(writer, target("linear")):
            x, weight, bias = _operands(writer)
            matrix = wide(graph_module, weight)
            made = insert_folded(graph_module, writer, weight, _centred(matrix, 0), known)
            if bias is not None:
                shift = _centred(wide(graph_module, bias), 0)
                bias = insert_folded(graph_module, writer, bias, shift, known)
            writer.args, writer.kwargs = (x, made, bias), {}
            return
        if calls(writer, target("embedding")):
            ids, table = writer.args[:2]
            alone = all(user is writer for user in uses(graph_module, table))  # type: ignore[arg-type]
            if alone and computable(graph_module, table):
                rows = _centred(wide(graph_module, table), -1)
                made = insert_folded(graph_module, writer, table, rows, known)  # type: ignore[arg-type]
                writer.args = (ids, made, *writer.args[2:])
                return
        bits = math.ceil(math.log2(width))
        bits += _MEAN_BITS if width & (width - 1) else 0
        centred = insert_call(writer.next, target("centre"), writer, bits)
        writer.replace_all_uses_with(centred, lambda user: user is not centred)


def _operands(linear: fx.Node) -> tuple[Any, Any, Any]:
    return (*linear.args, None)[:3]  # type: ignore[return-value]


def _centred(values: torch.Tensor, dim: int) -> torch.Tensor:
    return values - values.mean(dim, keepdim=True)


def _as_rms_norm(norm: fx.Node) -> None:
    """The norm of a centred row; a bias is added to it."""
    arguments = bind(op_of(norm), norm)  # type: ignore[arg-type]
    x, weight, bias, eps = list(arguments.values())[:4]
    scaled = replace(norm, target("rms_norm"), (x, weight, eps, 0.0))
    if bias is not None:
        total = insert_call(scaled.next, target("add"), scaled, bias)
        total.meta |= {key: norm.meta.get(key, "") for key in ("module", "source")}
        scaled.replace_all_uses_with(total, lambda user: user is not total)
