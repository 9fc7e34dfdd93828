"""Merge an attention's output projection with the first products of the following MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mergec.compiler.graph.ir import add_constant, aten, calls, constant, insert, rank, replace
from mergec.compiler.graph.rewriting import Pass
from mergec.passes.simplify_norms import constant_norms, put_affine
from mergec.runtime.core.op import target
from mergec.runtime.core.spec import Vis
from mergec.runtime.core.structural import MOVE_NAMES, target_name


@dataclass
class _Site:
    """outs: the output projections. residual: what they are added to. firsts: the products that
    read the norm. sums: what else reads it, as the residual stream of a post-norm layer."""

    outs: list[fx.Node]
    residual: fx.Node
    norm: fx.Node
    firsts: list[fx.Node]
    sums: list[fx.Node]


class MergeProjections(Pass):
    """Merges the output projection of a constant attention with the first products of the MLP.

    Lossy. This is the merge module of MERGE (Liang et al., AAAI 2024): constant attention,
    concatenation, linear, activation, linear, norm. With a the concatenated heads, x the residual
    stream, O the output projection and W a first product of the MLP, a pre-norm decoder computes

        h = x + O a,    m = W norm(h),    y = h + V act(m).

    The only approximation: the norm in between gets constant statistics, trained or estimated as
    in `simplify_norms`, so that norm(h) = gain * h + shift. The rest is algebra:
    m = (W gain O) a + (W gain) x + constant, with W gain O merged at compile time. The residual
    stream, which MERGE's module drops there, is kept in both places. The pass saves the norm with
    its rounds; a and x are sent to the server in the same round. It is exact if all rows of h have
    the same mean and deviation. The value projection stays. It could be merged too, because the
    heads' sums commute with it, but then the whole width instead of a head's would go through the
    table for each head, and bytes would grow by that factor.

    Where a pre-norm decoder also has a cross-attention (T5), constant attention needs no queries,
    so nothing reads the norm between the two: h = x + O a + O' a', and both projections are merged.
    A post-norm layer (BART) goes on from the norm, y = norm'(norm(h) + V act(m)): the norm becomes
    gain * h + shift there as well.

    Before:
        %ids = input : client int64 1xnew
        %cache = input : shared 1x1xpastx8
        %table = constant : server 97x8
        %positions = constant : server 1x32x32
        %o = constant : server 8x8
        %weight = constant : server 8
        %bias = constant : server 8
        %w = constant : server 16x8
        %x = mpc.embedding(%ids, %table)
        %v = aten.unsqueeze.default(%x, 1)
        %new = aten.sym_size.int(%ids, 1)
        %values = mpc.cache_append(%cache, %v)
        %heads = mpc.constant_attention(%values, %positions, %new)
        %a = aten.squeeze.dim(%heads, 1)
        %1 = mpc.linear(%a, %o, None)
        %2 = mpc.add(%x, %1)
        %3 = mpc.layer_norm(%2, %weight, %bias, 1e-05)
        %fc = mpc.linear(%3, %w)
        return [%fc, %2, %values]
    After:
        %fc.merged_weight = constant : server 16x8
        %fc.merged_bias = constant : server 16
        %fc.residual_weight = constant : server 16x8
        %x = mpc.embedding(%ids, %table)
        %v = aten.unsqueeze.default(%x, 1)
        %new = aten.sym_size.int(%ids, 1)
        %values = mpc.cache_append(%cache, %v)
        %heads = mpc.constant_attention(%values, %positions, %new)
        %a = aten.squeeze.dim(%heads, 1)
        %1 = mpc.linear(%a, %o, None)
        %2 = mpc.add(%x, %1)
        %linear = mpc.linear(%a, %fc.merged_weight, %fc.merged_bias)
        %linear.2 = mpc.linear(%x, %fc.residual_weight, None)
        %fc = mpc.add(%linear, %linear.2)
        return [%fc, %2, %values]
    """

    stage = "dialect"
    # It matches products and sums as ops of the dialect. Its statistics are those of the steps that
    # will run, also with resent hidden states.
    after = ("arithmetic_to_dialect", "linear_to_dialect", "resend_hidden")
    exact = False

    def run(self, graph_module: fx.GraphModule) -> int:
        found = self._sites(graph_module)
        if not found:
            return 0
        norms = constant_norms(self.info, graph_module, [site.norm for site in found])
        for site in found:
            for first in site.firsts:
                self._merge(graph_module, site, first, *norms[site.norm])
        # Last, as it replaces nodes.
        for site in found:
            if site.sums:
                ops = target("mul"), target("add")
                put_affine(self.info, site.norm, *norms[site.norm], *ops)
        return len(found)

    def loosen(self, graph_module: fx.GraphModule) -> int:
        """Only replace the norms in between by affine maps, which training can change.

        The graph then computes what it computes after `run`; returns the number of norms.
        """
        found = self._sites(graph_module)
        if found:
            norms = constant_norms(self.info, graph_module, [site.norm for site in found])
            for norm, (gain, shift) in norms.items():
                put_affine(self.info, norm, gain, shift)
        return len(found)

    def _sites(self, graph_module: fx.GraphModule) -> list[_Site]:
        found, reasons = [], {}
        for node in graph_module.graph.nodes:
            if calls(node, target("constant_attention")):
                matched = _match(graph_module, node)
                if isinstance(matched, str):
                    reasons[node] = matched
                elif matched is not None:
                    found.append(matched)
        merged = {out for site in found for out in site.outs}
        for node, reason in reasons.items():
            if _following(node, "linear") not in merged:
                self.skip(node, reason)
        return found

    def _merge(
        self,
        graph_module: fx.GraphModule,
        site: _Site,
        first: fx.Node,
        gain: torch.Tensor,
        shift: torch.Tensor | None,
    ) -> None:
        def numbers(node: Any) -> torch.Tensor | None:
            value = constant(graph_module, node)
            return None if value is None else value.to(torch.float64)

        weight: Any = numbers(first.args[1])
        scaled = weight * gain.to(torch.float64)
        bias = torch.zeros(len(weight), dtype=torch.float64)
        for given, factor in ((_bias(first), None), *((_bias(out), scaled) for out in site.outs)):
            value = numbers(given)
            if value is not None:
                bias = bias + (value if factor is None else factor @ value)
        if shift is not None:
            bias = bias + weight @ shift.to(torch.float64)
        place = first.meta.get("module") or first.name
        dtype = first.meta["val"].dtype

        def held(name: str, value: torch.Tensor) -> fx.Node:
            value = value.to(dtype)
            return add_constant(first, self.info.constants, f"{place}.{name}", value, Vis.SERVER)

        stream = site.residual.meta["val"]
        val = stream[..., :1].expand(*stream.shape[:-1], len(weight))
        terms = []
        for number, out in enumerate(site.outs):
            name = f"merged_weight_{number + 1}" if number else "merged_weight"
            merged = held(name, scaled @ numbers(out.args[1]))
            added = None if number else held("merged_bias", bias)
            arguments: tuple[Any, ...] = (_rows(out.args[0]), merged, added)
            terms.append(insert(first, target("linear"), arguments, val, Vis.SHARED))
        arguments = (site.residual, held("residual_weight", scaled), None)
        terms.append(insert(first, target("linear"), arguments, val, Vis.SHARED))
        *others, last = terms
        total = others[0]
        for term in others[1:]:
            total = insert(first, target("add"), (total, term), val, Vis.SHARED)
        if rank(first) == 3:
            replace(first, target("add"), (total, last))
            return
        whole = insert(first, target("add"), (total, last), val, Vis.SHARED)
        replace(first, aten.reshape.default, (whole, [-1, len(weight)]))


def _match(graph_module: fx.GraphModule, attention: fx.Node) -> _Site | str | None:
    """What to merge after a constant attention, or why nothing; None if it was merged before."""
    out = _following(attention, "linear")
    if out is None or constant(graph_module, out.args[1]) is None:
        return None
    total = _following(out, "add")
    if total is None:
        return "its projection is not added directly to the residual stream"
    residual = _other(total, _last_move(out))
    norms = [reader for reader in _readers(total) if _is_norm(reader)]
    readers = _readers(norms[0]) if len(norms) == 1 else []
    firsts = [reader for reader in readers if calls(reader, target("linear"))]
    sums = [reader for reader in readers if calls(reader, target("add"))]
    added = any(_following(first, "add") is not None for first in firsts)
    if not firsts or added or rank(residual) != 3:
        return "it is not followed by one norm and an MLP"
    if len(firsts) + len(sums) < len(readers):
        return "ops other than linear products and sums also read the norm after it"
    if any(constant(graph_module, first.args[1]) is None for first in firsts):
        return "the weights of the MLP after it are computed"
    outs = [out]
    while earlier := _projection(graph_module, residual, total):
        outs.append(earlier)
        residual, total = _other(residual, _last_move(earlier)), residual
    return _Site(outs, residual, norms[0], firsts, sums)


def _projection(graph_module: fx.GraphModule, stream: fx.Node, total: fx.Node) -> fx.Node | None:
    """The projection of a constant attention that a stream adds, if only `total` reads the sum."""
    if not calls(stream, target("add")) or set(stream.users) != {total}:
        return None
    for term in stream.args[:2]:
        out = _source(term)
        held = calls(out, target("linear")) and constant(graph_module, out.args[1]) is not None
        if held and calls(_source(out.args[0]), target("constant_attention")):
            return out
    return None


def _other(total: fx.Node, term: fx.Node) -> Any:
    """The operand of a sum that is not this one."""
    return total.args[1] if total.args[0] is term else total.args[0]


def _source(node: Any) -> Any:
    """What a value was before ops that only move it."""
    while isinstance(node, fx.Node) and target_name(node.target) in MOVE_NAMES:
        node = node.args[0]
    return node


def _is_norm(node: fx.Node) -> bool:
    return calls(node, target("rms_norm"), target("layer_norm"))


def _last_move(node: fx.Node) -> fx.Node:
    """Follow a value through ops that only move it, as long as each has one reader."""
    while len(node.users) == 1:
        (user,) = node.users
        if target_name(user.target) not in MOVE_NAMES:
            break
        node = user
    return node


def _following(node: fx.Node, op: str) -> fx.Node | None:
    """The only reader of a value, past ops that only move it, if it is this op."""
    users = list(_last_move(node).users)
    return users[0] if len(users) == 1 and calls(users[0], target(op)) else None


def _readers(node: fx.Node) -> list[fx.Node]:
    """All readers of a value, past ops that only move it."""
    found: list[fx.Node] = []
    for user in node.users:
        moved = target_name(user.target) in MOVE_NAMES
        found += _readers(user) if moved else [user]
    return found


def _bias(linear: fx.Node) -> Any:
    return linear.args[2] if len(linear.args) > 2 else None


def _rows(node: Any) -> Any:
    """Rows [1, N, E] before they were flattened to [N, E] (GPT-2)."""
    while rank(node) == 2 and calls(node, aten.reshape.default):
        node = node.args[0]
    return node
