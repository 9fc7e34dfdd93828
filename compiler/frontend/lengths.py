"""The lengths of text for which a captured step computes what the model does.

torch.export follows a branch on a length as an example takes it, and notes the condition as a
guard. Beyond a guard, the graph is not the model. Some guards are limits of the model itself, such
as the size of a table or an assertion; others are branches. To tell which, the model runs on the
first lengths beyond.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import operator
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import sympy
import torch
import torch.fx.experimental._config
from torch import fx, nn
from torch.utils._sympy.printers import PythonPrinter

from mergec.compiler.config import DEFAULT_LENGTH, MAX_LENGTH
from mergec.compiler.errors import CompileError
from mergec.runtime.program.program import InputSpec

_DECLARED = (
    "max_position_embeddings",
    "max_target_positions",
    "n_positions",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "max_context_length",
    "context_length",
    "block_size",
    "seq_length",
    "n_ctx",
)
"""Names under which configurations state the longest text; the first that a configuration has."""

_LOOKUPS = (
    torch.ops.aten.embedding.default,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_select.default,
    torch.ops.aten.gather.default,
    torch.ops.aten.select.int,
)
"""Ops that fail if an index is beyond a table's end."""

_TRAINED = "original_max_position_embeddings"
_TORCH = str(Path(torch.__file__).parent)
_COMPILER = str(Path(__file__).parents[1])
_TOLERANCE = 1e-4
"""Relative to the largest value. Graph and model call the same ops, but on other strides."""


@dataclass(frozen=True)
class Bound:
    """A number of tokens, prompt and answer together, and what happens beyond it."""

    length: int
    reason: str


@dataclass(frozen=True)
class Guard:
    """A condition on a step's lengths under which the graph was captured.

    file, line: where it was decided; empty and 0 if unknown.
    """

    code: CodeType
    file: str
    line: int

    def holds(self, new: int, past: int, source: int = 0) -> bool:
        """Whether the graph is valid for a step of these lengths, as far as this guard knows."""
        known: dict[str, Any] = {"new": new, "past": past, "source": source}
        known |= {"min": min, "max": max, "math": math}
        return bool(eval(self.code, {"__builtins__": {}}, known))  # noqa: S307

    @property
    def own(self) -> bool:
        """Whether the model's code decided it, and not torch's."""
        return bool(self.file) and not self.file.startswith(_TORCH)


Reference = Callable[..., Sequence[torch.Tensor]]
"""A step as the model computes it: logits and caches, of token ids and caches."""


def guards_of(program: Any) -> list[Guard]:
    """The guards of an exported step. Those that only protect a layout in memory are left out."""
    values = (node.meta.get("val") for node in program.graph.nodes)
    modes = (getattr(value, "fake_mode", None) for value in values)
    env = next((mode.shape_env for mode in modes if mode is not None), None)
    if env is None:
        return []
    # Buffers are placeholders too, and may have such names.
    given = set(program.graph_signature.user_inputs)
    found = [n for n in program.graph.nodes if n.name in given and n.name.endswith("_ids")]
    lengths = dict(zip(("source", "new")[-len(found) :], found, strict=True))
    sizes = {name: ids.meta["val"].shape[1] for name, ids in lengths.items()}
    # A length that the model fixes is a plain number.
    names = {size.node.expr: name for name, size in sizes.items() if not isinstance(size, int)}
    return [made for guard in env.guards if (made := _guard(guard, names)) is not None]


def _guard(guard: Any, names: Mapping[sympy.Expr, str]) -> Guard | None:
    place = guard.sloc.framework_loc
    file, line = "", 0
    if place is not None and not isinstance(place, str):
        file, line = place.filename, int(place.lineno or 0)
    # Torch compares sizes to choose between layouts, and the results are the same.
    if isinstance(guard.expr, sympy.Ne) and file.startswith(_TORCH):
        return None
    free = guard.expr.free_symbols
    if any(str(symbol).startswith("u") for symbol in free):
        return None  # depends on data; such a graph is refused elsewhere
    # All caches have one length.
    named = {symbol: names.get(symbol, "past") for symbol in free}
    condition = guard.expr.subs({s: sympy.Symbol(n, integer=True) for s, n in named.items()})
    if condition == sympy.true:
        return None
    text = PythonPrinter().doprint(condition)
    return Guard(compile(text, "<guard>", "eval"), file, line)


def declared_limit(config: Any) -> Bound | None:
    """The longest text that a configuration states, by whatever name."""
    nested = getattr(config, "get_text_config", None)
    owners = [config, *([nested(decoder=True)] if callable(nested) else [])]
    found = []
    for owner in owners:
        for name in _DECLARED:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                found.append(Bound(value, f"its configuration's {name} is {value}"))
                break
    return min(found, key=lambda bound: bound.length, default=None)


def table_limit(
    graph_module: fx.GraphModule, inputs: Sequence[InputSpec], most: int
) -> Bound | None:
    """The longest text, below `most`, for which every look-up of positions is within its table."""
    nodes = _lookups(graph_module.graph)
    if not nodes or (culprit := _beyond(graph_module, nodes, inputs, most)) is None:
        return None
    good, bad = 0, most
    while bad - good > 1:
        middle = (good + bad) // 2
        found = _beyond(graph_module, nodes, inputs, middle)
        good, bad, culprit = (middle, bad, culprit) if found is None else (good, middle, found)
    return Bound(good, _table(graph_module, culprit))


def _lookups(graph: fx.Graph) -> list[fx.Node]:
    """Look-ups at places that depend on lengths alone, and all that they are computed from."""
    lengths = [
        n
        for n in graph.nodes
        if n.target is torch.ops.aten.sym_size.int and n.args[0].op == "placeholder"
    ]
    secret: set[fx.Node] = set()
    by_length = set(lengths)
    for node in graph.nodes:
        operands = set(node.all_input_nodes)
        if node.op == "placeholder" or (operands & secret and node not in by_length):
            secret.add(node)
        elif operands & by_length:
            by_length.add(node)
    asked = [n for n in by_length - secret if n.target in _LOOKUPS]
    needed: set[fx.Node] = set()
    while asked:
        node = asked.pop()
        if node not in needed:
            needed.add(node)
            asked += [] if node in lengths else node.all_input_nodes
    return [node for node in graph.nodes if node in needed]


def _beyond(
    graph_module: fx.GraphModule, nodes: Sequence[fx.Node], inputs: Sequence[InputSpec], total: int
) -> fx.Node | None:
    """The look-up that fails in a text of `total` tokens, as a prompt or at its last token."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    specs = dict(zip(placeholders, inputs, strict=True))
    # Tables of pairs of positions are large, so each value goes after its last use.
    last = {operand: node for node in nodes for operand in node.all_input_nodes}
    for sizes in _step_sizes(total, inputs):
        values: dict[fx.Node, Any] = {}
        for node in nodes:
            if node.op == "get_attr":
                value = operator.attrgetter(str(node.target))(graph_module)
                written = any(_writes(user) for user in node.users)
                values[node] = value.clone() if written else value
                continue
            source: Any = node.args[0] if node.args else None
            if isinstance(source, fx.Node) and source in specs:
                size = specs[source].shape[int(node.args[1])]  # type: ignore[arg-type]
                values[node] = sizes[size] if isinstance(size, str) else size
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            try:
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            except (IndexError, RuntimeError):
                if node.target in _LOOKUPS:
                    return node
                raise
            for operand in node.all_input_nodes:
                if last[operand] is node:
                    values.pop(operand, None)
    return None


def _step_sizes(total: int, inputs: Sequence[InputSpec]) -> list[dict[str, int]]:
    """The lengths of the steps whose look-ups reach the furthest in a text of `total` tokens."""
    cached = any("past" in spec.shape for spec in inputs)
    if has_source(inputs):
        new = 1 if cached else total
        return [{"source": total, "new": new, "past": total - new}]
    return [{"new": new, "past": past} for new, past in _steps(total, cached)[:2]]


def has_source(inputs: Sequence[InputSpec]) -> bool:
    """Whether a step reads a source text, too: that of an encoder-decoder."""
    return any("source" in spec.shape for spec in inputs)


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _table(graph_module: fx.GraphModule, node: fx.Node) -> str:
    """The table of a look-up, in words."""
    source: Any = node.args[0]
    while source.op != "get_attr" and source.all_input_nodes:
        source = source.all_input_nodes[0]
    if source.op != "get_attr":
        return f"a table of positions ends there ({node.meta.get('source', '')})"
    rows = "x".join(map(str, operator.attrgetter(source.target)(graph_module).shape))
    return f"{source.target} is a table of {rows}"


def _steps(total: int, cached: bool) -> list[tuple[int, int]]:
    """New and past tokens of steps that end with the token number `total`: the prompt first."""
    if not cached or total == 1:
        return [(total, 0)]
    half = total // 2
    return [*dict.fromkeys([(total, 0), (1, total - 1), (total - 1, 1), (total - half, half)])]


class Comparison:
    """Compares a captured step with its model, on random tokens."""

    def __init__(
        self,
        reference: Reference,
        graph_module: fx.GraphModule,
        inputs: Sequence[InputSpec],
        vocab_size: int,
        empty: Sequence[torch.Tensor],
    ) -> None:
        """empty: the caches of no tokens."""
        self._reference = reference
        self._graph_module = graph_module
        self.encodes = has_source(inputs)
        self.cached = bool(empty)
        self._vocab_size = vocab_size
        self._empty = list(empty)

    def same(self, *pieces: int) -> bool:
        """Whether both return the same for a text that is fed in pieces of these lengths.

        Of an encoder-decoder, the first piece is the source. Raises what the model raises.
        """
        generator = torch.Generator().manual_seed(len(pieces))
        wanted: list[torch.Tensor] = []
        caches, source = self._empty, []
        for place, count in enumerate(pieces):
            ids = torch.randint(0, self._vocab_size, (1, count), generator=generator)
            if self.encodes and place == 0:
                source = [ids]
                continue
            given = [*source, ids, *caches]
            wanted = list(self._reference(*given))
            caches = wanted[1 : 1 + len(self._empty)]
        # Only the last piece is compared: those before it are shorter, and come before it.
        try:
            found = list(self._graph_module(*given))
        except (RuntimeError, IndexError):
            return False
        return len(found) == len(wanted) and all(map(_close, found, wanted))


def _close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    finite = wanted[torch.isfinite(wanted)]
    scale = float(finite.abs().max()) if finite.numel() else 1.0
    return torch.allclose(found, wanted, rtol=0.0, atol=_TOLERANCE * scale, equal_nan=True)


def short_steps(comparison: Comparison) -> Iterator[tuple[int, ...]]:
    """Texts that torch.export takes for granted, in pieces: it assumes that lengths are over 1."""
    if comparison.encodes:
        yield from ((3, 1), (1, 1))
        yield from ((1, 1, 1), (3, 1, 1)) if comparison.cached else ((1, 3),)
    else:
        yield from ((3,), (1,), (1, 1)) if comparison.cached else ((1,), (2,))


def find_bounds(
    guards: Sequence[Guard],
    limit: Bound | None,
    comparison: Comparison,
    model: nn.Module,
) -> tuple[Bound | None, Bound | None]:
    """The model's own limit, and the longest text for which the graph is the model.

    limit: what is known of the first.
    """
    branch: Bound | None = None
    for guard in guards:
        most = min([bound.length for bound in (limit, branch) if bound], default=MAX_LENGTH)
        for total, pieces in _failures(guard, comparison, min(most, MAX_LENGTH)):
            try:
                # So long a text takes too long to try. Whatever it is, the graph ends here.
                same = total <= DEFAULT_LENGTH and comparison.same(*pieces)
            except Exception as error:  # noqa: BLE001  (a model raises anything)
                limit = Bound(total - 1, f"on {total} tokens it fails: {one_line(error)}")
                break
            if not same:
                place = _place(guard, model)
                reason = f"beyond {total - 1} tokens it computes something else{place}"
                if total > DEFAULT_LENGTH:
                    reason = f"it was captured for at most {total - 1} tokens{place}"
                branch = Bound(total - 1, reason)
                break
    return limit, branch


def branch_place(
    again: Callable[[], Any], pieces: tuple[int, ...], model: nn.Module, encodes: bool = False
) -> str:
    """Where a model decides by a length that torch.export takes for granted; empty if unknown.

    again: exports the step once more. pieces: a text for which the decision is another one, as
    `Comparison.same` takes it. encodes: whether the first piece is a source.
    """
    try:
        # Then torch.export assumes nothing of a length.
        with torch.fx.experimental._config.patch(  # type: ignore[attr-defined]
            backed_size_oblivious=True
        ):
            guards = guards_of(again())
    except Exception:  # noqa: BLE001  (the place is only for the message)
        return ""
    for guard in guards:
        source, *fed = pieces if encodes else (0, *pieces)
        if guard.own and not guard.holds(fed[-1], sum(fed[:-1]), source):
            return _place(guard, model)
    return ""


def fixing_place(again: Callable[[], Any], model: nn.Module) -> str:
    """Where a model takes one length for granted, as `_place`; empty if unknown.

    again: exports the step with lengths that the model may fix.
    """
    try:
        guards = guards_of(again())
    except Exception:  # noqa: BLE001  (the place is only for the message)
        return ""
    others = [(n, n, n) for n in (101, 103)]
    fixing = (g for g in guards if g.own and not any(g.holds(*lengths) for lengths in others))
    return next((_place(guard, model) for guard in fixing), "")


@contextlib.contextmanager
def fixed_rotary(model: nn.Module) -> Iterator[Bound | None]:
    """Keep rotary frequencies from changing with the length, as those of some Llama and Phi do.

    Yields the longest text for which the model does not change them, if that is less than what its
    configuration states.
    """
    bound = None
    kept: list[tuple[Any, Any, dict[str, torch.Tensor]]] = []
    module: Any
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        named = kinds if isinstance(kinds, dict) else {"": kinds}
        scaled = {k: v for k, v in named.items() if v in ("dynamic", "longrope")}
        if not scaled or not hasattr(module, "config"):
            continue
        buffers: dict[str, torch.Tensor] = {}
        for layer, kind in scaled.items():
            prefix = f"{layer}_" if layer else ""
            name, first = f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq")
            buffers[name] = getattr(module, name)
            module._buffers[name] = first.clone()
            if kind == "longrope":
                settings: Any = module.config.rope_parameters
                length = int((settings[layer] if layer else settings)[_TRAINED])
                reason = f"beyond {length} tokens its rotary frequencies are others (longrope)"
                bound = Bound(length, reason)
        kept.append((module, kinds, buffers))
        fixed = {k: "default" if k in scaled else v for k, v in named.items()}
        module.rope_type = fixed if isinstance(kinds, dict) else fixed[""]
    try:
        yield bound
    finally:
        for module, kinds, buffers in kept:
            module.rope_type = kinds
            module._buffers.update(buffers)


def _failures(guard: Guard, comparison: Comparison, most: int) -> list[tuple[int, list[int]]]:
    """Texts beyond a guard, as their length and in pieces: the first of each kind, and one further
    on."""
    found: dict[int, tuple[int, list[int]]] = {}
    last: tuple[int, list[int]] | None = None
    for total in range(1, most + 1):
        for kind, (new, past, source) in enumerate(_lengths(total, comparison)):
            if guard.holds(new, past, source):
                continue
            text = total, [n for n in (source, past, new) if n]
            found.setdefault(kind, text)
            first = min(length for length, _ in found.values())
            if total <= min(max(2 * first, first + 8), max(first, DEFAULT_LENGTH)):
                last = text
    ordered = sorted(found.values(), key=lambda text: text[0])
    return ordered if last is None or last in ordered else [*ordered, last]


def _lengths(total: int, comparison: Comparison) -> list[tuple[int, int, int]]:
    """New and past tokens, and those of the source, of steps that end with token number `total`.

    Source and answer of an encoder-decoder count together, so each is tried at all lengths with the
    other one short, and both at half.
    """
    if not comparison.encodes:
        return [(new, past, 0) for new, past in _steps(total, comparison.cached)]
    half = max(1, total // 2)
    splits = [(1, 0, total), (1, 1, total), (1, total, 1), (1, half, half)]
    if not comparison.cached:
        splits = [(1, 0, total), (total, 0, 1), (half, 0, half)]
    return [*dict.fromkeys(splits)]


def one_line(error: BaseException) -> str:
    """The first line of an error's message; its class if there is none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def does_not_run(model: nn.Module, error: BaseException, tokens: str = "token ids") -> CompileError:
    """The error for what a model raises when it runs as it is, and not as it was captured.

    tokens: what it ran on, in words.
    """
    said = f"{type(model).__name__} does not run on {tokens}: {one_line(error)}{_raised_at(error)}"
    if not isinstance(error, TypeError | AttributeError):  # It takes or returns something else.
        said += "; the model itself raises this in plain PyTorch, so check its config"
    return CompileError(said)


def _raised_at(error: BaseException) -> str:
    """The line of the model's code that led to an error, in brackets; empty if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((_TORCH, _COMPILER, "<"))]
    return f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""


def _place(guard: Guard, model: nn.Module) -> str:
    """The line and the module that decided a guard, in brackets; empty if torch did."""
    if not guard.own:
        return ""
    module = _module_at(guard, model)
    inside = f" in {module}" if module else ""
    return f" ({Path(guard.file).name}:{guard.line}{inside})"


def _module_at(guard: Guard, model: nn.Module) -> str:
    """The path of the first module whose code decided a guard; empty if unknown."""
    for path, module in model.named_modules():
        for kind in type(module).__mro__:
            codes = (
                getattr(inspect.unwrap(f), "__code__", None)
                for f in vars(kind).values()
                if callable(f)
            )
            for code in codes:
                if (
                    code is not None
                    and code.co_filename == guard.file
                    and guard.line in {line for *_, line in code.co_lines()}
                ):
                    return path
    return ""
