"""Fractional bits and openings: the last rewrite before lowering, made explicit in the graph.

Each op states in which form its protocol takes a shared operand (`Op.forms`). This module assigns
every shared value (every wire) its number of fractional bits. Where a consumer needs another form,
it inserts the op that converts the value: a truncation, an opening to both parties, or one to the
server. A wire is converted to a form once for all consumers, so that its mask is opened once.
Products stay untruncated as long as their consumers allow: sums of products, residual additions and
rotary embeddings work at full scale, and one truncation follows instead of one each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from mergec.compiler.errors import CompileError
from mergec.compiler.graph.ir import absmax, aten, bind, calls, constant, op_of
from mergec.compiler.graph.moves import is_move, known_size
from mergec.runtime.core.op import Form, Op, target
from mergec.runtime.core.spec import (
    FRACTIONAL_BITS,
    HEADROOM_BITS,
    RANGE_MARGIN_BITS,
    SHARE_FRAC,
    WINDOW_FRAC,
    Vis,
)
from mergec.runtime.engine.plan import LATER, Planned
from mergec.runtime.ops.attention import ScoredAttention
from mergec.runtime.ops.embedding import Embedding
from mergec.runtime.ops.gelu import ALONE_FRAC, Gelu
from mergec.runtime.ops.linear import Linear
from mergec.runtime.ops.normed_linear import NormedLinear
from mergec.runtime.ops.open import Open
from mergec.runtime.ops.part import Part
from mergec.runtime.ops.scale import Scale
from mergec.runtime.ops.send import Send
from mergec.runtime.ops.truncate import Truncate
from mergec.runtime.protocols.deferred import LARGEST
from mergec.runtime.protocols.normalize import SCALED_FRAC

WEIGHT_BITS = 6
"""Most fractional bits that a matrix may have beyond an activation's, if its result has room."""

SMALLEST = 2.0**-7
"""A constant of this size is rounded to the program's fractional bits by one part in 2**10."""

_UNITS_BITS = 14
"""A constant that is smaller gets so many fractional bits that it has about 2**14 units."""

_MASK = 2.0**100
"""No value of a model that works is as large; the lowest number of a type, in a mask, is."""

_ONE_SIDED = 2.0**10
"""How much further from zero masked scores reach down than up, at the least."""

_CONVERSIONS: dict[str, type[Op]] = {"masked": Open, "sent": Send}
"""The op that brings a share into a form."""


def legalize(
    graph_module: fx.GraphModule,
    fixed: int,
    exact: bool = False,
    unfused: Mapping[str, str] | None = None,
) -> None:
    """Set meta["frac"] and meta["form"] of every shared wire, and insert the conversions.

    fixed: the program's fractional bits. Needs meta["vis"]; uses meta["range"] and what
    `Op.measure` found, where calibration set them. exact: whether roundings are exact. unfused: why
    `fuse_attention` skipped a softmax, by module, for the error about a mask that stayed. Raises
    CompileError, which names every value that leaves the ring or the domain of a protocol, or whose
    protocol has no exact rounding.
    """
    _split_scales(graph_module)
    _Legalizer(graph_module, fixed, exact, unfused or {}).run()
    # Ops that move data may be unused now: their operand was converted instead of their result.
    graph_module.graph.eliminate_dead_code()
    graph_module.graph.lint()
    graph_module.recompile()


def _split_scales(graph_module: fx.GraphModule) -> None:
    """Move an attention's scale that is not a power of two into its queries.

    Its protocol can only move the binary point of the scores, not multiply them.
    """
    for node in list(graph_module.graph.nodes):
        op = op_of(node)
        if op is None or not issubclass(op, ScoredAttention):
            continue
        arguments = bind(op, node)
        if math.frexp(arguments["scale"])[0] == 0.5:
            continue
        query = arguments["q"]
        with graph_module.graph.inserting_before(node):
            scaled = graph_module.graph.call_function(
                target(Scale.name), (query, float(arguments["scale"]))
            )
        scaled.meta = {**query.meta, "module": node.meta.get("module", "")}
        node.args, node.kwargs = tuple((arguments | {"q": scaled, "scale": 1.0}).values()), {}


def _by_protocol(node: fx.Node, op: type[Op]) -> bool:
    """Whether a call needs the protocol, because nobody can compute it alone."""
    operands = [n.meta["vis"] for n in node.all_input_nodes if "vis" in n.meta]
    return op.known_to(*operands) is None


class _Legalizer:
    def __init__(
        self, graph_module: fx.GraphModule, fixed: int, exact: bool, unfused: Mapping[str, str]
    ) -> None:
        self.graph = graph_module.graph
        self.fixed = fixed
        self.exact = exact
        self.unfused = unfused
        self.room = _room(graph_module)
        self.tensors = _constants(graph_module)
        self.single = _used_once(graph_module)
        self.tied = self.bits_of_tied()
        self.wants = self.needed_forms()
        self.made: dict[tuple[fx.Node, str], fx.Node] = {}
        self.fine: dict[fx.Node, bool] = {}
        self.failures: dict[fx.Node, str] = {}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            op = op_of(node)
            if node.op == "placeholder" and node.meta["vis"] is Vis.SHARED:
                self.mark(node, self.cache_form(node), self.fixed)
            elif node.op == "get_attr" and node.meta["vis"] is Vis.SHARED:
                self.mark(node, "share", self.fixed)
            elif op is not None and _by_protocol(node, op):
                self.visit(node, op)
            elif node.meta.get("vis") is Vis.SHARED and node.op == "call_function":
                self.pass_through(node)
            elif node.op == "output":
                self.finish(node)
        if self.failures:
            raise CompileError("values that the ring cannot hold", self.failures)

    def needed_forms(self) -> dict[fx.Node, set[str]]:
        """The forms in which each shared value is needed as a whole.

        Either its consumers need the form, or the consumers of its parts do, if all parts are
        needed in the same form. Any other part is then cut from the converted value, without a
        separate opening.
        """
        wants: dict[fx.Node, set[str]] = {}
        for node in reversed(self.graph.nodes):
            if node.meta.get("vis") is not Vis.SHARED:
                continue
            found: set[str] = set()
            for user in node.users:
                op = op_of(user)
                if op is not None and _by_protocol(user, op):
                    arguments = bind(op, user)
                    forms = self.forms(op, arguments)
                    found |= {forms.get(k, "fixed") for k, v in arguments.items() if v is node}
            parts = [user for user in node.users if is_move(user) and user.args[0] is node]
            if len(parts) == len(node.users) > 0 and sum(map(_count, parts)) == _count(node):
                found |= set.intersection(*(wants[part] for part in parts))
            if found & set(_CONVERSIONS):
                found.add("fixed")
            wants[node] = found - {"share"}
        return wants

    def forms(self, op: type[Op], arguments: dict[str, Any]) -> Mapping[str, Form]:
        """The form in which a call takes each argument; "cache" is resolved here."""
        forms = op.forms(*map(self.known, arguments.values()))
        if op.result != "cache":
            return forms
        form = self.cache_form(arguments[op.tensors[0]])
        return {name: form if asked == "cache" else asked for name, asked in forms.items()}

    def visit(self, node: fx.Node, op: type[Op]) -> None:
        arguments = bind(op, node)
        forms = self.forms(op, arguments)
        for parameter, value in arguments.items():
            if isinstance(value, fx.Node) and value.meta.get("vis") is Vis.SHARED:
                form = forms.get(parameter, "fixed")
                fine = op is Linear and self.fits_products(value)
                arguments[parameter] = self.convert(value, form, fine)
        if self.too_fine(node, op, arguments):
            for parameter, value in arguments.items():
                if isinstance(value, fx.Node) and value.meta.get("form") == "share":
                    arguments[parameter] = self.convert(value, "fixed")
        node.args, node.kwargs = tuple(arguments.values()), {}
        self.check_domain(node, op)
        self.check_measured(node, op, arguments)
        arguments |= op.calibrate(node.meta, arguments)
        if self.exact:
            # With exact rounding functions have finer tables, which need keys.
            arguments |= dict.fromkeys({"reach", "coarse"} & set(arguments), 0)
        if arguments.get("alone") and (
            self.exact or (op is Gelu and not self.has_room(node, ALONE_FRAC))
        ):
            arguments |= dict.fromkeys({"alone", "span"} & set(arguments), 0)
        optional = set(LATER)
        if issubclass(op, NormedLinear):
            arguments |= self.deferral(node, op, arguments)
            optional |= {"columns", "wide"}
        elif op is Linear:
            arguments |= self.weight_bits(node, arguments["x"].meta["frac"])
            optional |= {"parts"}
        elif "bits" in arguments:
            arguments["bits"] = self.constant_bits(node, op, arguments)
            optional |= {"bits", "columns"}
        arguments = Planned.written(arguments, optional)
        node.args = tuple(arguments.values())
        frac = op.scale(*(self.seen(value) for value in arguments.values()), fixed=self.fixed)
        if op.result == "cache":
            self.mark(node, forms[op.tensors[0]], frac)
        else:
            self.mark(node, "share" if op.result == "revealed" else op.result, frac)

    def cache_form(self, cache: fx.Node) -> Form:
        """The form of a cache: opened to the server alone if no reader needs more."""
        readers = [op_of(user) for user in cache.users]
        appended = any(op is not None and op.result == "cache" for op in readers)
        return "sent" if appended and self.asked(cache) == {"sent"} else "masked"

    def asked(self, value: fx.Node) -> set[str]:
        """The forms in which ops take a value, directly or after it was moved."""
        found: set[str] = set()
        for user in value.users:
            op = op_of(user)
            if op is not None and op.result != "cache":
                arguments = bind(op, user)
                forms = op.forms(*map(self.known, arguments.values()))
                found |= {forms.get(k, "fixed") for k, v in arguments.items() if v is value}
            elif user.op == "call_function" and user.meta.get("vis") is Vis.SHARED:
                found |= self.asked(user)
        return found

    @staticmethod
    def known(value: Any) -> Any:
        """The value that `Op.forms` gets for an argument."""
        return value.meta.get("vis", Vis.PUBLIC) if isinstance(value, fx.Node) else value

    def seen(self, value: Any) -> Any:
        """The value that `Op.scale` gets for an argument."""
        if not isinstance(value, fx.Node):
            return value
        vis = value.meta.get("vis", Vis.PUBLIC)
        return value.meta["frac"] if vis is Vis.SHARED else vis

    def too_fine(self, node: fx.Node, op: type[Op], arguments: dict[str, Any]) -> bool:
        """Whether a local op's result would leave the ring, so that its operands are truncated.

        Rows scaled by a gain carry 48 fractional bits, for example, and a rotary embedding adds 16.
        """
        if not op.local:
            return False
        largest = absmax(node)
        most = _fitting(largest) if largest else SHARE_FRAC
        frac = op.scale(*(self.seen(value) for value in arguments.values()), fixed=self.fixed)
        return frac > 2 * self.fixed and frac > most

    def fits_products(self, node: fx.Node) -> bool:
        """Whether all products of a wire with weights can hold its fractional bits untruncated."""
        while is_move(node):
            node = node.args[0]  # type: ignore[assignment]
        if node not in self.fine:
            # Decided once: after the wire is opened for its products, they no longer use it.
            self.fine[node] = self.has_room(node, node.meta["frac"])
        return self.fine[node]

    def has_room(self, node: fx.Node, frac: int) -> bool:
        """Whether all products of a wire with weights can hold so many fractional bits of it."""
        frac += self.fixed
        return all(
            frac + self.least_bits(product) <= self.room[product] for product in _products(node)
        )

    def pass_through(self, node: fx.Node) -> None:
        """A structural op keeps form and scale; several inputs are first brought to one."""
        inputs = [n for n in node.all_input_nodes if n.meta.get("vis") is not Vis.PUBLIC]
        states = {(n.meta.get("form"), n.meta.get("frac")) for n in inputs}
        if len(states) > 1:
            for n in inputs:
                if n.meta["vis"] is Vis.SHARED:
                    node.replace_input_with(n, self.convert(n, "fixed"))
            self.mark(node, "share", self.fixed)
        else:
            form, frac = states.pop()
            self.mark(node, form or "share", self.fixed if frac is None else frac)

    def finish(self, node: fx.Node) -> None:
        """Open the outputs: a cache leaves a step in the form in which it enters the next one."""
        for value in node.all_input_nodes:
            if value.meta.get("vis") is Vis.SHARED and value.meta["form"] != "sent":
                node.replace_input_with(value, self.convert(value, "masked"))

    def convert(self, node: fx.Node, form: str, fine: bool = False) -> fx.Node:
        """The node in the wanted form, converted once. `fine`: opened without truncation."""
        if form == "share" or node.meta["form"] == form:
            return node
        if node.meta["form"] == "masked" and form in ("fixed", "window"):
            return node
        if form == "window":
            if node.meta["frac"] <= WINDOW_FRAC:
                return node
            form = "fixed"
        if form == "fixed" and node.meta["frac"] == self.fixed:
            return node
        if is_move(node) and form in self.wants[node.args[0]]:  # type: ignore[index]
            return self.move(node, form, fine)
        if form == "fixed":
            return self.insert(node, Truncate, "share")
        if not fine:
            node = self.convert(node, "fixed")
        return self.insert(node, _CONVERSIONS[form], form)

    def move(self, node: fx.Node, form: str, fine: bool) -> fx.Node:
        """The same move on its operand in the wanted form, which exists in any case."""
        source: Any = node.args[0]
        key = (node, form)
        if key not in self.made:
            converted = self.convert(source, form, fine)
            with self.graph.inserting_after(node):
                args = (converted, *node.args[1:])
                new = self.graph.call_function(node.target, args, node.kwargs)  # type: ignore[arg-type]
            new.meta = {k: v for k, v in node.meta.items() if k != "name"}
            self.mark(new, converted.meta["form"], converted.meta["frac"])
            self.made[key] = new
        return self.made[key]

    def insert(self, node: fx.Node, op: type[Op], form: str) -> fx.Node:
        key = (node, op.name)
        if key not in self.made:
            with self.graph.inserting_after(node):
                new = self.graph.call_function(target(op.name), (node,))
            new.meta = {k: v for k, v in node.meta.items() if k != "name"}
            self.mark(new, form, self.fixed if op is Truncate else node.meta["frac"])
            self.made[key] = new
        return self.made[key]

    def deferral(
        self, node: fx.Node, op: type[NormedLinear], arguments: dict[str, Any]
    ) -> dict[str, Any]:
        """Fractional bits of the matrix and of the rows in a product of normalized rows.

        If the product has no room in the ring before it is scaled, the norm runs before it. The
        bits of the rows come first, as far as a normalized row has them, then those of the matrix.
        """
        least = self.least_bits(node)
        fine = SCALED_FRAC + self.fixed + least <= self.room[node]
        rows, room, limit, needed = arguments["rows"], 0, SHARE_FRAC, 0
        if rows and node.meta.get("unscaled") and absmax(node):
            room = math.floor(HEADROOM_BITS - RANGE_MARGIN_BITS - math.log2(node.meta["unscaled"]))
            factor = op.factor(arguments["weight"].meta["val"].shape[-1])
            frac = math.ceil(arguments["x"].meta["frac"] + math.log2(factor))
            # Scaled up, the bits that are left off are at most one unit of a normalized row.
            needed = min(frac, self.fixed + max(0, math.ceil(math.log2(node.meta["factor"]))))
            limit = room - needed - self.fixed
        if limit < least or absmax(node) * 2.0**RANGE_MARGIN_BITS > 2.0**LARGEST:
            rows, limit = 0, SHARE_FRAC
        found = self.weight_bits(node, SCALED_FRAC if fine else self.fixed, limit)
        kept = room - self.fixed - found["bits"] - max(found["parts"][1::2], default=0)
        if not rows or kept < needed:
            return found | {"fine": fine, "kept": 0, "rows": 0}
        return found | {"fine": fine, "kept": min(kept, frac), "rows": rows}

    def weight_bits(self, node: fx.Node, frac: int, limit: int = SHARE_FRAC) -> dict[str, Any]:
        """How many more bits a matrix can have that nothing else uses, and each of its parts.

        frac: fractional bits of the rows that it is multiplied by. limit: the most for any part.
        Several layers in one product each get the bits that their own result has room for.
        `mpc.part` then takes out the parts of the product that have more bits than the rest.
        """
        weight: Any = node.args[1]
        if weight.op != "get_attr" or weight.target not in self.single:
            return {"bits": self.tied.get(str(weight.target), 0), "parts": []}
        columns = _columns(node)
        matrix = self.tensors[weight.target]
        most = [
            min(limit, self.spare_bits(frac, part, matrix[start:end]))
            for part, (start, end) in columns.items()
        ]
        bits = min(most, default=min(limit, self.spare_bits(frac, node, matrix)))
        if max(most, default=bits) == bits:
            return {"bits": bits, "parts": []}
        parts = []
        for (part, (start, end)), own in zip(columns.items(), most, strict=True):
            parts += [end - start, own - bits]
            part.target, part.args = target(Part.name), (node, start, end, own - bits)
        return {"bits": bits, "parts": parts}

    def spare_bits(self, frac: int, result: fx.Node, matrix: torch.Tensor) -> int:
        """How many extra bits a layer's matrix can have for this part of its result."""
        frac += self.fixed
        wanted = max(WEIGHT_BITS, _needed_bits(matrix, self.fixed + WEIGHT_BITS) + WEIGHT_BITS)
        most = min(wanted, math.floor(self.room[result]) - frac)
        if "window" in self.wants[result]:
            most = min(most, WINDOW_FRAC - frac)
        return max(0, most)

    def least_bits(self, linear: fx.Node) -> int:
        """How many extra bits a layer's matrix has at least: those of a tied or very small one."""
        weight: Any = linear.args[1]
        if weight.op != "get_attr":
            return 0
        if weight.target not in self.single:
            return self.tied.get(str(weight.target), 0)
        return _needed_bits(self.tensors[weight.target], self.fixed)

    def constant_bits(self, node: fx.Node, op: type[Op], arguments: dict[str, Any]) -> int:
        """How many extra bits the constant of an embedding, a norm or a product needs, if any.

        A small constant keeps its precision this way. So does what is computed from it until the
        next truncation, such as a residual stream from its embedding on.
        """
        names = [name for name in op.weights if isinstance(arguments[name], fx.Node)]
        held = [arguments[name] for name in names if arguments[name].op == "get_attr"]
        if len(held) != 1:
            return 0
        (weight,) = held
        if weight.target in self.tied:
            return self.tied[weight.target]
        fixed = op.scale(*(self.seen(value) for value in arguments.values()), fixed=self.fixed)
        return self._bits(node, self.needed(op, arguments, weight), fixed)

    def _bits(self, node: fx.Node, needed: int, frac: int) -> int:
        return max(0, min(needed, math.floor(self.room[node]) - frac))

    def needed(self, op: type[Op], arguments: dict[str, Any], weight: fx.Node) -> int:
        """How many extra bits would do for a constant, whatever there is room for."""
        tensor = self.tensors[str(weight.target)]
        if op is Embedding:
            return _needed_bits(tensor, self.fixed, rows=True)
        return _needed_bits(tensor + arguments.get("offset", 0.0), self.fixed)

    def bits_of_tied(self) -> dict[str, int]:
        """The extra bits of constants that several ops use, which are encoded once for all.

        As many as the use needs that needs most, and as every use has room for.
        """
        needs: dict[str, int] = {}
        rooms: dict[str, int] = {}
        for node in self.graph.nodes:
            op = op_of(node)
            if op is None or not _by_protocol(node, op):
                continue
            arguments = bind(op, node)
            for name in op.weights:
                weight = arguments[name]
                if not isinstance(weight, fx.Node) or weight.op != "get_attr":
                    continue
                key = str(weight.target)
                if key in self.single or key not in self.tensors:
                    continue
                needed = self.needed(op, arguments, weight) if "bits" in arguments else 0
                needs[key] = max(needed, needs.get(key, 0))
                room = self.tied_room(node, op, needed) if "bits" in arguments else 0
                rooms[key] = min(room, rooms.get(key, room))
        return {key: max(0, min(needs[key], rooms[key])) for key in needs}

    def tied_room(self, node: fx.Node, op: type[Op], needed: int) -> int:
        """How many extra bits a use of a tied constant has room for, before wires are scaled."""
        room = math.floor(self.room[node])
        if op is Embedding:
            return room - self.fixed
        if op is Linear:
            # What only another use needs must not cost the input its fractional bits.
            spare = room - 3 * self.fixed
            return max(spare, min(needed, room - 2 * self.fixed))
        return room - 3 * self.fixed

    def mark(self, node: fx.Node, form: str, frac: int) -> None:
        node.meta["form"], node.meta["frac"] = form, frac
        self.check(node, HEADROOM_BITS, frac)

    def check(self, node: fx.Node, bits: int, frac: int) -> None:
        largest = absmax(node)
        if frac > SHARE_FRAC:
            self.failures[node] = (
                f"has {frac} fractional bits; protocols are tested with up to {SHARE_FRAC}"
            )
        elif largest and math.log2(largest) + frac + RANGE_MARGIN_BITS > bits:
            self.failures[node] = self.masked(node) or (
                f"reaches {largest:.3g} in calibration, which with {frac} fractional bits leaves "
                f"no room in {bits} bits; check this module's weights"
            )

    def masked(self, node: fx.Node) -> str:
        """What to do about scores to which a model adds a mask; empty if they are none."""
        least, most = node.meta["range"]
        reason = self.unfused.get(node.meta.get("module", ""))
        if most * _ONE_SIDED > -least or not (reason or least < -_MASK):
            return ""
        return (
            f"reaches {least:.3g} in calibration, {'' if reason else 'probably '}"
            "because a mask is added to scores of an attention that the pass fuse_attention did "
            f"not recognize{f' ({reason})' if reason else ''}; write the attention as "
            "softmax(scale * q @ k.T + mask) @ v, or add -10000 where the mask hides"
        )

    def check_domain(self, node: fx.Node, op: type[Op]) -> None:
        """Record a failure if the first operand comes near to an end of the op's domain."""
        operand = node.args[0]
        if not isinstance(operand, fx.Node) or "range" not in operand.meta:
            return
        least, most = operand.meta["range"]
        low, high = op.domain
        margin = 2.0**RANGE_MARGIN_BITS
        if least * (1 / margin if least > 0 else margin) < low or most * margin > high:
            self.failures[node] = (
                f"its operand ranges from {least:.3g} to {most:.3g} in calibration, and beyond it "
                f"may grow by {margin:g}; its protocol supports {low:g} to {high:g}"
            )

    def check_measured(self, node: fx.Node, op: type[Op], arguments: dict[str, Any]) -> None:
        """Record a failure if the op's protocol cannot run on what calibration measured."""
        reason = op.refusal(node.meta, arguments)
        if self.exact and (inexact := op.inexact(arguments)):
            reason = f"{inexact}; compile with rounding='public'"
        if reason:
            self.failures[node] = reason


def _constants(graph_module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """The real-valued constants of a graph, by name."""
    names = {str(node.target): node for node in graph_module.graph.nodes if node.op == "get_attr"}
    found = {name: constant(graph_module, node) for name, node in names.items()}
    return {k: v for k, v in found.items() if v is not None and v.is_floating_point()}


def _needed_bits(values: torch.Tensor, frac: int, *, rows: bool = False) -> int:
    """Fractional bits beyond `frac` that a constant needs; 0 if it is not small.

    rows: whether the smallest row decides, because a norm may make it as large as the others. Rows
    and entries that are zero do not count.
    """
    norms = values.detach().reshape(-1, values.shape[-1] if values.dim() else 1).norm(dim=-1)
    present = norms > 0
    if not bool(present.any()):
        return 0
    if rows:
        # A row that is far smaller than the largest one needs no more than that one's precision.
        size = max(float(norms[present].min()), float(norms.max()) * 2.0**-_UNITS_BITS)
        size /= math.sqrt(values.shape[-1])
    else:
        entries = int(torch.count_nonzero(values))
        size = float(norms.double().norm()) / math.sqrt(entries)
    if size * 2.0**frac >= SMALLEST * 2.0**FRACTIONAL_BITS:
        return 0
    return math.ceil(_UNITS_BITS - frac - math.log2(size))


def _products(node: fx.Node) -> Iterator[fx.Node]:
    """The linear layers that read a wire, directly or after it was moved."""
    for user in node.users:
        op = op_of(user)
        if op is Linear and user.args[0] is node:
            yield user
        elif is_move(user):
            yield from _products(user)


def _columns(node: fx.Node) -> dict[fx.Node, tuple[int, int]]:
    """The slices that cut a product into blocks of columns, in order; none if it is used whole."""
    shape = node.meta["val"].shape
    found: dict[fx.Node, tuple[int, int]] = {}
    for user in node.users:
        if not calls(user, aten.slice.Tensor) or len(user.args) != 4:
            return {}
        _, dim, start, end = user.args
        if dim not in (-1, len(shape) - 1):
            return {}
        found[user] = (start, end)  # type: ignore[assignment]
    blocks = sorted(found.items(), key=lambda item: item[1])
    starts, ends = [start for _, (start, _) in blocks], [end for _, (_, end) in blocks]
    return dict(blocks) if [*starts, shape[-1]] == [0, *ends] else {}


def _count(node: fx.Node) -> int:
    """Number of elements, at the lengths with which the graph was captured."""
    return math.prod(map(known_size, node.meta["val"].shape))


def _used_once(graph_module: fx.GraphModule) -> set[str]:
    """Constants that a single node uses; a tied one has several get_attr nodes."""
    nodes = [node for node in graph_module.graph.nodes if node.op == "get_attr"]
    users = Counter(str(node.target) for node in nodes for _ in node.users)
    return {name for name, count in users.items() if count == 1}


def _room(graph_module: fx.GraphModule) -> dict[fx.Node, float]:
    """The most fractional bits that each value can have until it is truncated.

    A value passes at full scale through movements and local ops, such as sums and rotary
    embeddings, and through the steps of a protocol before its first truncation (`Op.inner_bits`).
    It must fit into the ring everywhere on that path. If the range is unknown, there are no spare
    bits.
    """
    room: dict[fx.Node, float] = {}
    for node in reversed(graph_module.graph.nodes):
        largest = absmax(node)
        room[node] = _fitting(largest) if largest else 0.0
        for user in node.users:
            op = op_of(user)
            if user.meta.get("vis") is not Vis.SHARED:
                continue
            if op is None:
                left = room[user]
            elif op.local:
                left = room[user] - _added_bits(node, user, op)
            elif isinstance(node.meta["val"], torch.Tensor):
                left = room[node] - op.inner_bits(node.meta["val"].shape)
            else:
                continue
            room[node] = min(room[node], left)
    return room


def _added_bits(node: fx.Node, user: fx.Node, op: type[Op]) -> float:
    """Fractional bits that a local op adds to an operand; 0 if the operand is truncated first."""
    arguments = bind(op, user)
    known = [_Legalizer.known(value) for value in arguments.values()]
    forms = op.forms(*known)
    if not any(forms.get(k, "fixed") == "share" for k, v in arguments.items() if v is node):
        return -math.inf
    return op.scale(*(0 if isinstance(v, Vis) else v for v in known), fixed=0)


def _fitting(largest: float) -> float:
    """Fractional bits with which values up to `largest` fit into the ring, `SHARE_FRAC` at most."""
    return min(SHARE_FRAC, HEADROOM_BITS - RANGE_MARGIN_BITS - math.log2(largest))
