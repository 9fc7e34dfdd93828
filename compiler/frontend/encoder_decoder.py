"""Captures an encoder-decoder as one FX graph that is cut between encoder and decoder.

The graph is gm(input_ids, decoder_input_ids, *caches): it maps the source [1, source], the new
tokens of the answer [1, new], and per decoder layer the keys and values of self-attention
[1, H, past, D] to [logits, *caches, *cross caches]. The cross caches are the keys and values
[1, H, source, D] that cross-attention reads. Each is the result of an `mpc.cache_fill`, and what
follows them depends on the source through them alone. So a later step can take them as inputs, and
the encoder does not run again (`runtime.program.program.Phase`).

Without caches the graph is gm(input_ids, decoder_input_ids): it returns the logits of every token
of the answer, for training, and is not cut.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.lengths import does_not_run
from mergec.compiler.graph.ir import ancestors, aten, calls
from mergec.runtime.core.op import target
from mergec.runtime.core.spec import Vis
from mergec.runtime.ops import load_all
from mergec.runtime.program.program import InputSpec

_SOURCE, _NEW, _PAST = 5, 3, 4
"""Example lengths. torch.export specializes on sizes 0 and 1, so all are larger."""

_REFUSED = {
    "fsmt": "its positions depend on which tokens are padding, and tokens are secret",
    "led": "its encoder attends in overlapping windows and from a few tokens that see all others",
    "longt5": "its encoder attends in blocks",
    "bigbird_pegasus": "its encoder attends in blocks that are drawn at random",
    "prophetnet": "its decoder predicts several tokens in streams of their own",
    "reformer": "its attention sorts tokens by secret values",
}
"""Models whose attention cannot be captured as one, and why."""

_COUNTS_TOKENS = ("m2m_100",)
"""Models that number positions by which tokens are padding, and embeddings one after the other."""

_MORE_ROWS = 8
"""Rows of such a model's table behind those that it has."""


def check_encoder_decoder(model: nn.Module) -> None:
    """Raise CompileError for an encoder-decoder whose source is not tokens, or that cannot run."""
    name, config = type(model).__name__, getattr(model, "config", None)
    reason = _REFUSED.get(str(getattr(config, "model_type", "")))
    if reason:
        raise CompileError(
            f"{name} cannot be compiled: {reason}; mergec compiles encoder-decoders such as T5 and "
            "BART"
        )
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise CompileError(
            f"{name} reads {model.main_input_name}, not tokens; mergec compiles encoder-decoders "
            "such as T5 and BART"
        )


def start_of(model: nn.Module) -> int:
    """The token that answers begin with, as in transformers' `generate`."""
    owners = (getattr(model, "generation_config", None), model.config)
    for name in ("decoder_start_token_id", "bos_token_id"):
        for owner in owners:
            token = getattr(owner, name, None)
            if isinstance(token, int) and not isinstance(token, bool):
                return token
    raise CompileError(
        f"{type(model).__name__} does not say what its answers begin with; set "
        "model.generation_config.decoder_start_token_id"
    )


def _read(
    model: Any, input_ids: torch.Tensor, decoder_input_ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Source and answer as the arguments of a model.

    M2M-100 counts positions over those tokens that are not padding. Of embeddings it counts all,
    which is the same for texts without padding.
    """
    if model.config.model_type not in _COUNTS_TOKENS:
        return {"input_ids": input_ids, "decoder_input_ids": decoder_input_ids}
    encoder, decoder = model.get_encoder(), model.get_decoder()
    return {
        "inputs_embeds": encoder.embed_tokens(input_ids),
        "decoder_inputs_embeds": decoder.embed_tokens(decoder_input_ids),
    }


@contextlib.contextmanager
def longer_tables(model: Any) -> Iterator[None]:
    """Give M2M-100's sinusoidal tables a few more rows while it is captured.

    With the token that an answer begins with, the longest answer has one position more than the
    configuration states. There the model makes a longer table, which a graph cannot do.
    """
    tables = []
    if getattr(getattr(model, "config", None), "model_type", "") in _COUNTS_TOKENS:
        tables = [module for module in model.modules() if hasattr(module, "make_weights")]
    former = [table.weights for table in tables]
    for table in tables:
        rows = len(table.weights) + _MORE_ROWS
        table.make_weights(rows, table.embedding_dim, table.padding_idx)
    try:
        yield
    finally:
        for table, weights in zip(tables, former, strict=True):
            table.weights = weights


class TranslationStep(nn.Module):
    """Maps source, new tokens and self-attention caches to logits, caches and cross caches."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, decoder_input_ids: torch.Tensor, *caches: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        from transformers.cache_utils import DynamicCache

        for cache in caches[1:]:
            # All layers share one symbol for the past length, because models mix them freely.
            torch._check(cache.shape[2] == caches[0].shape[2])
        pairs = list(zip(caches[::2], caches[1::2], strict=True))
        return self._step(input_ids, decoder_input_ids, DynamicCache(ddp_cache_data=pairs))

    def eager(
        self, input_ids: torch.Tensor, decoder_input_ids: torch.Tensor, *caches: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The same outside of an export, where a model can tell that nothing is cached yet."""
        from transformers.cache_utils import DynamicCache

        if caches[0].shape[2] == 0:
            return self._step(input_ids, decoder_input_ids, DynamicCache())
        return self(input_ids, decoder_input_ids, *caches)

    def _step(
        self, input_ids: torch.Tensor, decoder_input_ids: torch.Tensor, past: Any
    ) -> tuple[torch.Tensor, ...]:
        from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

        class Filled(DynamicLayer):
            """Holds what it is given at once; `DynamicLayer` would concatenate it to nothing."""

            def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> Any:
                self.keys, self.values, self.is_initialized = key_states, value_states, True
                return key_states, value_states

        cross = Cache(layer_class_to_replicate=Filled)
        result = self.model(
            **_read(self.model, input_ids, decoder_input_ids),
            past_key_values=EncoderDecoderCache(past, cross),
            use_cache=True,
            return_dict=True,
        )
        layers = (*result.past_key_values.self_attention_cache.layers, *cross.layers)
        flat = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        return (result.logits[:, -1:], *flat)


class WholeTranslation(nn.Module):
    """Maps a source and a whole answer to the logits of every token of the answer [1, new, V]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, decoder_input_ids: torch.Tensor
    ) -> tuple[torch.Tensor]:
        result = self.model(
            **_read(self.model, input_ids, decoder_input_ids),
            use_cache=False,
            return_dict=True,
        )
        return (result.logits,)

    def eager(
        self, input_ids: torch.Tensor, decoder_input_ids: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The same outside of an export."""
        return self(input_ids, decoder_input_ids)


Example = tuple[list[torch.Tensor], Any, list[InputSpec]]
"""Inputs of a step, their sizes that vary, and their descriptions."""


def example_of(step: TranslationStep, start: int) -> Example:
    """What a step is exported with. Raises CompileError if the model does not run on token ids, or
    keeps other caches than keys and values.
    """
    shapes = _cache_shapes(step, start)
    dtype = next(p.dtype for p in step.model.parameters())
    caches = [torch.zeros(1, heads, _PAST, size, dtype=dtype) for heads, size in shapes]
    ids, lengths, inputs = texts()
    varying = (*lengths, tuple({2: torch.export.Dim.DYNAMIC} for _ in caches))
    for index, (heads, size) in enumerate(shapes):
        name = f"cache.{index // 2}.{'key' if index % 2 == 0 else 'value'}"
        shape = (1, heads, "past", size)
        inputs.append(InputSpec(name, Vis.SHARED, "torch.float64", shape, 0, f"{name}.next"))
    return [*ids, *caches], varying, inputs


def texts() -> Example:
    """The part of `example_of` that is source and answer."""
    ids = [torch.zeros(1, length, dtype=torch.int64) for length in (_SOURCE, _NEW)]
    varying = ({1: torch.export.Dim.DYNAMIC},) * 2
    inputs = [
        InputSpec("input_ids", Vis.CLIENT, "torch.int64", (1, "source")),
        InputSpec("decoder_input_ids", Vis.CLIENT, "torch.int64", (1, "new")),
    ]
    return ids, varying, inputs


def check_vocabulary(model: nn.Module, start: int, vocab_size: int) -> None:
    """Raise CompileError if answers begin with no token of the vocabulary, or there are two."""
    if start >= vocab_size:
        raise CompileError(
            f"answers begin with token {start}, which is not in the vocabulary of {vocab_size}"
        )
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if rows < vocab_size:
        raise CompileError(
            f"the encoder knows {rows} tokens and the decoder {vocab_size}; mergec compiles "
            "encoder-decoders with one vocabulary"
        )


def _cache_shapes(step: TranslationStep, start: int) -> list[tuple[int, int]]:
    """Heads and features of the keys and values that each decoder layer caches."""
    from transformers.cache_utils import DynamicCache

    source = torch.zeros((1, _PAST), dtype=torch.int64)
    past = DynamicCache()
    try:
        with torch.no_grad():
            found = step._step(source, torch.tensor([[start]]), past)
    except Exception as error:
        raise does_not_run(step.model, error) from error
    caches = found[1 : 1 + 2 * len(past.layers)]
    if not caches or len(found) != 1 + 2 * len(caches):
        raise CompileError(
            f"{type(step.model).__name__} does not keep keys and values of past tokens and of the "
            "source; mergec compiles encoder-decoders such as T5 and BART"
        )
    return [(tensor.shape[1], tensor.shape[3]) for tensor in caches]


def cut(graph_module: fx.GraphModule, caches: int) -> None:
    """Put `mpc.cache_fill` after the cross caches, and let only these bring the source further.

    caches: number of self-attention caches. All that the cross caches need comes first in the
    graph. Raises CompileError, which names the nodes, if the decoder reads the source otherwise.
    """
    load_all()
    graph = graph_module.graph
    *_, output = graph.nodes
    logits, *following = output.args[0]
    cross = following[caches:]
    encoder = ancestors(*cross)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    place = inputs[-1]
    for node in [node for node in graph.nodes if node in encoder and node.op != "placeholder"]:
        place.append(node)
        place = node
    filled = []
    for node in cross:
        with graph.inserting_after(place):
            fill = graph.call_function(target("cache_fill"), (node,))
        fill.meta = {k: v for k, v in node.meta.items() if k != "name"}
        node.replace_all_uses_with(fill, lambda user, fill=fill: user is not fill)
        filled.append(fill)
        place = fill
    _measure(graph, inputs[0], encoder, filled)
    decoder = ancestors(logits, *following[:caches], stop=filled)
    bad = {node: "reads the source" for node in inputs[0].users if node in decoder}
    if bad:
        raise CompileError("the decoder reads the source other than by cross-attention", bad)
    graph.eliminate_dead_code()
    graph.lint()
    graph_module.recompile()


def _measure(
    graph: fx.Graph, source: fx.Node, encoder: set[fx.Node], filled: Sequence[fx.Node]
) -> None:
    """Read the length of the source from the cross caches wherever the decoder needs it.

    What the encoder computes from it for itself stays; what both use is computed twice.
    """
    sizes = [node for node in source.users if calls(node, aten.sym_size.int)]
    if not sizes:
        return
    with graph.inserting_after(filled[-1]):
        length = graph.call_function(aten.sym_size.int, (filled[0], 2))
    length.meta = dict(sizes[0].meta)
    own: dict[fx.Node, fx.Node] = dict.fromkeys(sizes, length)
    place = length
    for node in list(graph.nodes):
        if node not in encoder or node in own or not any(n in own for n in node.all_input_nodes):
            continue
        # From lengths alone, and so public.
        if not all(n in own or _is_public(n) for n in node.all_input_nodes):
            continue
        with graph.inserting_after(place):
            place = own[node] = graph.node_copy(node, lambda n: own.get(n, n))
    for node in list(graph.nodes):
        if node not in encoder and node not in own.values():
            for operand in node.all_input_nodes:
                if operand in own:
                    node.replace_input_with(operand, own[operand])


def _is_public(node: fx.Node) -> bool:
    """Whether a node is a constant, or computed from constants alone."""
    return node.op == "get_attr" or (
        node.op == "call_function" and all(map(_is_public, node.all_input_nodes))
    )
