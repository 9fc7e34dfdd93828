"""A model as the compiler rewrites it, as a module that can be trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from mergec.compiler.config import CompileConfig, Sample, as_pair
from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.capture import Captured, capture
from mergec.compiler.frontend.experts import joins_of
from mergec.compiler.graph.ir import aten, bind, calls, constant, is_shared
from mergec.compiler.graph.manager import run_passes
from mergec.compiler.graph.rewriting import STAGES, GraphInfo
from mergec.compiler.selection import select
from mergec.compiler.text import op_of
from mergec.passes.merge_projections import MergeProjections
from mergec.passes.resend_hidden import embedding_of, head_of
from mergec.runtime.core.op import REGISTRY, target
from mergec.runtime.ops import load_all
from mergec.runtime.ops.embedding import Embedding

TABLE = ".table"
"""How names of attention tables end."""

_TRAINED = (TABLE, ".gain", ".shift")
"""How names of constants end that lossy passes make, and that can be trained."""

_TURNED = "_turned"
"""How `linear_to_dialect` names a transposed copy of a weight."""

_LEAST = 1e-6
"""Smallest weight of a table's entry when its training starts: log 0 has no gradient."""

PADDING = -1
"""What stands behind the end of a source that is shorter than others of its batch."""

_LEFT_OUT = {"merge_projections", "resend_hidden", "fold_weights"}
"""Passes of the stages that a student goes through which it does not need, or not as they are."""


@dataclass
class Result:
    """What a student computes of token ids [B, N].

    logits [B, N, V]; hidden [B, N, E], the head's input, which embedding resending sends on;
    streams: the sums that layers add to residual streams [B, N, E], in the graph's order. encoded:
    those of an encoder [B, S, E], zero behind the end of a source.
    """

    logits: torch.Tensor
    hidden: torch.Tensor
    streams: list[torch.Tensor]
    encoded: list[torch.Tensor] = field(default_factory=list)


class Student(nn.Module):
    """A model's graph after the lossy passes of a configuration, as a module with parameters.

    The graph is the compiler's own: the model's captured step, rewritten by the same passes up to
    the stage "dialect", in which every op runs by its reference. What follows in a compile is
    exact. So what is trained is what is compiled, for every family. Three things differ: there is
    no cache, because training knows all tokens; `merge_projections` only replaces its norms by
    affine maps, and merges nothing; and hidden states are resent by whoever calls (`forward`).

    Parameters are those of `model` that the graph reads, the very same tensors, and the constants
    of lossy passes: gains, shifts, and for each attention table the logits T of
    softmax(T).tril(), as in MERGE (Liang et al., AAAI 2024); an encoder and cross-attention see all
    tokens, so softmax(T). They have the names of the graph's constants, with "/" for ".".

    model: a Hugging Face decoder or encoder-decoder in float32 or float64. config: its lossy passes
    count. samples: what the constants start from; the longest text is the size of an attention's
    table. Its start is the token that answers of an encoder-decoder begin with; -1 for a decoder.
    Raises CompileError if the model cannot be captured, or lacks what a pass needs.
    """

    def __init__(self, model: nn.Module, config: CompileConfig, samples: Sequence[Sample]) -> None:
        super().__init__()
        load_all()
        # In a tuple, because it is no submodule: parameters are registered below, each once.
        self._model = (model,)
        captured = capture(model, cache=False)
        self.limit = captured.max_length
        self.start = captured.start
        self.vocab_size = captured.vocab_size
        asked = {kind.name() for kind in select(config) if not kind.exact}
        self.resends = "resend_hidden" in asked
        self.sites, self.changed = _rewrite(captured, config, samples)
        self._graph = (captured.graph_module,)
        self._logits, self._hidden, self._embedding, self._table = _places(
            captured.graph_module, resends=self.resends
        )
        self._streams, self._encoded = _sums(captured.graph_module, self._hidden)
        self._causal = _causal(captured.graph_module)
        self._head = head_of(captured.graph_module)
        self.constants: list[str] = []
        self._names: dict[str, str] = {}
        # The graph reads the experts of a mixture joined, and the model stores them apart.
        self._joins = joins_of(model)
        given = dict(model.named_parameters(remove_duplicate=False))
        for name, (value, _) in captured.tensors().items():
            self._add(name, value, given)

    def _add(self, name: str, value: torch.Tensor, given: dict[str, nn.Parameter]) -> None:
        """Register a constant of the graph: as a parameter, or as a buffer if nothing trains it."""
        key = name.replace(".", "/")
        self._names[name] = key
        source = given.get(name)
        if name in self.sites:
            if name.endswith(TABLE):
                value = value.clamp(min=_LEAST).log()
            self.constants.append(name)
            self.register_parameter(key, nn.Parameter(value.contiguous().clone()))
        elif source is not None and source.is_floating_point():
            self.register_parameter(key, source)
        else:
            # A checkpoint needs no constants, and could not hold two that share memory.
            self.register_buffer(key, value, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """That of the parameters, and of results."""
        return next(self.parameters()).dtype

    @property
    def encodes(self) -> bool:
        """Whether it is an encoder-decoder."""
        return self.start >= 0

    @property
    def model(self) -> nn.Module:
        """The model whose parameters these are."""
        return self._model[0]

    def value(self, name: str) -> torch.Tensor:
        """A constant of the graph as it is now."""
        held: torch.Tensor = getattr(self, self._names[name])
        if name in self.sites and name.endswith(TABLE):
            weights = held.softmax(-1)
            return weights.tril() if name in self._causal else weights
        return self._joins[name](held) if name in self._joins else held

    def trained(self) -> dict[str, torch.Tensor]:
        """The constants of the lossy passes as they are now, by name, for `Adaptation`."""
        return {name: self.value(name).detach().cpu().clone() for name in self.constants}

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of the embedding [B, N, E] of token ids [B, N], of an answer if there are two.

        Raises CompileError if the model has not one embedding of the tokens.
        """
        if self._table is None:
            raise CompileError("the model does not have one embedding of the tokens")
        return nn.functional.embedding(ids, self.value(self._table))

    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The matrix [V, E] of the model's head, and its bias [V] if it has one.

        Raises CompileError if they are computed from other constants.
        """
        matrix, bias = (self._constant(arg) for arg in (*self._head.args, None)[1:3])
        if matrix is None:
            raise CompileError("the model's head has no matrix")
        return matrix, bias

    def last_norm(self) -> list[str]:
        """The constants of the norm that the head reads: its gain, and its shift if it has one.

        Empty if the head reads something else.
        """
        node = self._hidden
        # T5 scales what its norm returns.
        while calls(node, aten.reshape.default, target("scale")):
            node = node.args[0]  # type: ignore[assignment]
        if not any(calls(node, target(name)) for name in ("layer_norm", "rms_norm")):
            return []
        return [str(arg.target) for arg in node.all_input_nodes if arg.op == "get_attr"]

    def _constant(self, node: Any) -> torch.Tensor | None:
        if node is None:
            return None
        if calls(node, aten.permute.default):
            source = self._constant(node.args[0])
            return None if source is None else source.permute(node.args[1])
        if node.op != "get_attr":
            raise CompileError("the model's head is computed", {node: "it is no constant"})
        return self.value(str(node.target))

    def forward(
        self,
        ids: torch.Tensor,
        rows: torch.Tensor | None = None,
        source: torch.Tensor | None = None,
    ) -> Result:
        """Run the graph on token ids [B, N].

        rows: what to take instead of the embedding's rows [B, N, E]: with noise, or hidden states
        that are resent. Texts may be padded at their ends: no token depends on later ones.

        source: what an encoder-decoder reads, token ids [B, S] with `PADDING` at their ends; `ids`
        are then of its answers. An encoder's tokens depend on all others, and the graph knows no
        padding. So the graph runs once for each length of source in the batch.
        """
        if source is None:
            return self._together(ids, rows, None)
        lengths = (source != PADDING).sum(1)
        groups = [(lengths == size).nonzero()[:, 0] for size in lengths.unique()]
        found = [
            self._together(
                ids[group],
                None if rows is None else rows[group],
                source[group, : int(lengths[group[0]])],
            )
            for group in groups
        ]
        order = torch.cat(groups).argsort()

        def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
            return torch.cat(list(parts))[order]

        def longer(value: torch.Tensor) -> torch.Tensor:
            return nn.functional.pad(value, (0, 0, 0, source.shape[1] - value.shape[1]))

        return Result(
            joined([part.logits for part in found]),
            joined([part.hidden for part in found]),
            [joined(parts) for parts in zip(*(part.streams for part in found), strict=True)],
            [
                joined([longer(part) for part in parts])
                for parts in zip(*(part.encoded for part in found), strict=True)
            ],
        )

    def _together(
        self, ids: torch.Tensor, rows: torch.Tensor | None, source: torch.Tensor | None
    ) -> Result:
        """Run the graph on texts of one length, whose sources have one length, too."""
        values = {name: self.value(name) for name in self._names}
        wanted = [self._logits, self._hidden, *self._streams, *self._encoded]
        place = self._embedding

        def one(
            ids: torch.Tensor, rows: torch.Tensor | None, source: torch.Tensor | None
        ) -> tuple[torch.Tensor, ...]:
            given = {} if rows is None or place is None else {place: rows[None]}
            run = _Run(self._graph[0], values, given, wanted)
            run.run(*([] if source is None else [source[None]]), ids[None])
            return tuple(run.found[node][0] for node in wanted)

        texts = (ids, rows, source)
        dims = tuple(None if text is None else 0 for text in texts)
        found = torch.vmap(one, in_dims=dims)(*texts)
        # Under autocast, some are bfloat16; losses of them would be coarse.
        logits, hidden, *sums = (value.to(self.dtype) for value in found)
        count = len(self._streams)
        return Result(logits, hidden, sums[:count], sums[count:])

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """`count` greedy tokens after each prompt, as the compiled program chooses them.

        If hidden states are resent, each is the next step's row, and tokens are only read off.
        The prompts of an encoder-decoder are sources. Computes the whole text again for each
        token: for short texts.
        """
        device = next(self.parameters()).device
        source = padded(prompts, PADDING).to(device) if self.encodes else None
        texts = [[self.start]] * len(prompts) if self.encodes else prompts
        lengths = torch.tensor([len(text) for text in texts], device=device)
        room = [[*text, *[0] * count] for text in texts]
        ids = padded(room).to(device)
        which = torch.arange(len(prompts), device=device)
        rows = self.embed(ids) if self.resends else None
        found = []
        for step in range(count):
            at = lengths + step
            most = int(at.max())
            result = self(ids[:, :most], None if rows is None else rows[:, :most], source)
            tokens = result.logits[which, at - 1].argmax(-1)
            ids[which, at] = tokens
            if rows is not None:
                rows[which, at] = result.hidden[which, at - 1].to(rows.dtype)
            found.append(tokens)
        return torch.stack(found, 1).tolist()


def padded(texts: Sequence[Sequence[int]], padding: int = 0) -> torch.Tensor:
    """Token ids [B, N] of texts, the shorter ones padded at their ends."""
    ids = torch.full((len(texts), max(map(len, texts))), padding, dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.tensor(list(text))
    return ids


class _Run(fx.Interpreter):
    """One run of a graph: constants and some values are given, some values are kept."""

    def __init__(
        self,
        module: fx.GraphModule,
        values: dict[str, torch.Tensor],
        given: dict[fx.Node, torch.Tensor],
        wanted: Sequence[fx.Node],
    ) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.values = values
        self.given = given
        self.wanted = set(wanted)
        self.device = next(iter(values.values())).device
        self.found: dict[fx.Node, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n in self.given:
            result = self.given[n]
        elif n.op == "get_attr" and n.target in self.values:
            result = self.values[str(n.target)]
        elif calls(n, aten.sym_size.int):
            # vmap has no rule for it.
            value, dim = self.fetch_args_kwargs_from_env(n)[0]
            result = value.shape[dim]
        elif (op := op_of(n)) is not None:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            if op is Embedding:
                # Under vmap, the reference's gradient would be a whole table for each text.
                result = nn.functional.embedding(*args[:2])
            else:
                # The dispatcher's op would not record gradients.
                result = op.reference(*args, **kwargs)
        else:
            result = super().run_node(n)
        if n in self.wanted:
            self.found[n] = result
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a function on the parameters' device; the graph names the one of its capture."""
        args, kwargs = fx.node.map_aggregate(
            (args, kwargs), lambda value: self.device if isinstance(value, torch.device) else value
        )
        return super().call_function(target, args, kwargs)


def _rewrite(
    captured: Captured, config: CompileConfig, samples: Sequence[Sample]
) -> tuple[set[str], int]:
    """Run the passes that a student goes through.

    Returns the names of the constants that they leave to train, and the number of places that
    lossy passes changed.
    """
    info = GraphInfo(captured.inputs, captured.constants, samples)
    before = set(captured.constants)
    last = STAGES.index("dialect")
    chosen = select(config)
    passes = [
        kind for kind in chosen if STAGES.index(kind.stage) <= last and kind.name() not in _LEFT_OUT
    ]
    reports = run_passes(captured.graph_module, info, passes, as_pair(samples[0]).source)
    changed = sum(report.sites for report in reports if not report.exact)
    if MergeProjections in chosen:
        changed += MergeProjections(info).loosen(captured.graph_module)
    made = set(captured.constants) - before
    _turn_back(captured)
    graph = captured.graph_module.graph
    graph.eliminate_dead_code()
    graph.lint()
    captured.graph_module.recompile()
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for name in list(captured.constants):
        if name not in used:
            del captured.constants[name]
    return {name for name in made & used if name.endswith(_TRAINED)}, changed


def _turn_back(captured: Captured) -> None:
    """Compute transposed copies of weights from the weights, so that they follow their training."""
    graph_module = captured.graph_module
    for node in list(graph_module.graph.nodes):
        name = str(node.target)
        if node.op != "get_attr" or not name.endswith(_TURNED) or name not in captured.constants:
            continue
        origin = name.removesuffix(_TURNED)
        if origin not in captured.constants:
            path, _, leaf = origin.rpartition(".")
            matrix = constant(graph_module, node)
            graph_module.get_submodule(path).register_buffer(leaf, matrix.T)  # type: ignore[union-attr]
        with graph_module.graph.inserting_before(node):
            source = graph_module.graph.get_attr(origin)
            turned = graph_module.graph.call_function(aten.permute.default, (source, [1, 0]))
        turned.meta = dict(node.meta)
        node.replace_all_uses_with(turned)
        captured.constants[origin] = captured.constants[name]


def _places(
    graph_module: fx.GraphModule, *, resends: bool
) -> tuple[fx.Node, fx.Node, fx.Node | None, str | None]:
    """The logits, the head's input, the embedding and its table.

    Raises CompileError if hidden states are to be resent, and the model has no place for that.
    """
    *_, output = graph_module.graph.nodes
    logits: Any = output.args[0][0]
    head = head_of(graph_module)
    hidden: Any = head.args[0]
    table = None
    embedding: fx.Node | None = None
    try:
        embedding = embedding_of(graph_module)
    except CompileError:
        if resends:
            raise
    if embedding is not None and constant(graph_module, embedding.args[1]) is not None:
        table = str(embedding.args[1].target)  # type: ignore[union-attr]
    return logits, hidden, embedding, table


def _sums(graph_module: fx.GraphModule, hidden: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The sums of the residual streams, and those of an encoder's.

    Sums of rows with biases and with shifts of constant norms have an operand that is not shared.
    """
    shape = [*map(str, hidden.meta["val"].shape)]
    texts = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    sources = [[shape[0], str(text.meta["val"].shape[1]), shape[-1]] for text in texts[:-1]]
    sums = [
        (node, [*map(str, node.meta["val"].shape)])
        for node in graph_module.graph.nodes
        if calls(node, target("add")) and all(map(is_shared, node.args))
    ]
    streams = [node for node, found in sums if found == shape]
    return streams, [node for node, found in sums if found in sources]


def _causal(graph_module: fx.GraphModule) -> set[str]:
    """The names of attention tables whose rows end at the token itself."""
    found = set()
    for node in graph_module.graph.nodes:
        if calls(node, target("constant_attention")):
            arguments = bind(REGISTRY["constant_attention"], node)
            if arguments["causal"]:
                found.add(str(arguments["weight"].target))
    return found
