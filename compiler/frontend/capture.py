"""Captures one decoder step as an FX graph, with the KV cache as explicit inputs and outputs."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import config as dynamo
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._pytree import tree_map

from mergec.compiler.config import MAX_LENGTH
from mergec.compiler.errors import CompileError, InternalError
from mergec.compiler.frontend.encoder_decoder import (
    TranslationStep,
    WholeTranslation,
    check_encoder_decoder,
    check_vocabulary,
    cut,
    example_of,
    longer_tables,
    start_of,
    texts,
)
from mergec.compiler.frontend.exclusive import exclusive
from mergec.compiler.frontend.experts import all_experts, can_run_all, is_experts
from mergec.compiler.frontend.latents import expanded, has_latents
from mergec.compiler.frontend.lengths import (
    Bound,
    Comparison,
    branch_place,
    declared_limit,
    does_not_run,
    find_bounds,
    fixed_rotary,
    fixing_place,
    guards_of,
    one_line,
    short_steps,
    table_limit,
)
from mergec.compiler.frontend.written_parts import join_written_parts
from mergec.runtime.core.spec import Vis
from mergec.runtime.program.program import InputSpec

_NEW, _PAST = 3, 4
"""Example lengths. torch.export specializes on sizes 0 and 1, so both are larger."""

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}

_FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}

_PACKED = re.compile(r"(qweight|qzeros|weight_packed|packed_params|SCB)\b")
"""Names of integer buffers that hold weights."""

_REGIONS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")
"""Higher-order regions that do not change values."""


@dataclass
class Captured:
    """A captured step.

    graph_module: called as gm(input_ids, *caches), returns [logits, *caches]; that of an
    encoder-decoder as `frontend.encoder_decoder` says. Weights and tables are get_attr nodes named
    as in the model. inputs: in the order of the placeholders. constants:
    visibility of each get_attr target; parameters and persistent buffers belong to the server,
    other buffers and literals are public. layers: number of cached layers.
    limit: the longest text that the model itself can take; None if it has no limit.
    branch: the longest text for which the graph is the model; None if it always is.
    start: the token that every answer of an encoder-decoder begins with; -1 for a decoder.
    """

    graph_module: fx.GraphModule
    inputs: list[InputSpec]
    constants: dict[str, Vis]
    layers: int
    vocab_size: int
    limit: Bound | None = None
    branch: Bound | None = None
    start: int = -1

    @property
    def max_length(self) -> int | None:
        """Most tokens of a text for which the graph is the model; None if there is no limit."""
        return min([bound.length for bound in (self.limit, self.branch) if bound], default=None)

    def tensors(self) -> dict[str, tuple[torch.Tensor, Vis]]:
        """Every constant and its visibility, by name."""
        return {
            name: (operator.attrgetter(name)(self.graph_module), vis)
            for name, vis in self.constants.items()
        }

    def copy(self) -> Captured:
        """A copy of the step for rewriting, which shares the tensors with this one."""
        return copy.deepcopy(self, {id(tensor): tensor for tensor, _ in self.tensors().values()})

    @property
    def cached(self) -> bool:
        """Whether the step takes and returns a KV cache."""
        return self.layers > 0

    @property
    def encodes(self) -> bool:
        """Whether it is an encoder-decoder."""
        return self.start >= 0


class _CachedStep(nn.Module):
    """Maps input_ids [1, new] and per layer key and value [1, G, past, D] to logits and caches."""

    def __init__(self, model: nn.Module, keep_last: bool) -> None:
        super().__init__()
        self.model = model
        self.keep_last = keep_last

    def forward(self, input_ids: torch.Tensor, *caches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        from transformers.cache_utils import DynamicCache

        for cache in caches[1:]:
            # All layers share one symbol for the past length, because models mix them freely.
            torch._check(cache.shape[2] == caches[0].shape[2])
        pairs = list(zip(caches[::2], caches[1::2], strict=True))
        return self._step(input_ids, DynamicCache(ddp_cache_data=pairs))

    def eager(self, input_ids: torch.Tensor, *caches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The same outside of an export, where a model can tell that nothing is cached yet."""
        from transformers.cache_utils import DynamicCache

        if caches[0].shape[2] == 0:
            return self._step(input_ids, DynamicCache())
        return self(input_ids, *caches)

    def _step(self, input_ids: torch.Tensor, past: Any) -> tuple[torch.Tensor, ...]:
        options = {"logits_to_keep": 1} if self.keep_last else {}
        with expanded(self.model, past):
            result = self.model(
                input_ids=input_ids, past_key_values=past, use_cache=True, return_dict=True,
                **options,
            )  # fmt: skip
        layers = result.past_key_values.layers
        flat = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        return (result.logits[:, -1:], *flat)


class _PlainStep(nn.Module):
    """Maps input_ids [1, new] to the logits of every position."""

    def __init__(self, model: nn.Module, hugging_face: bool) -> None:
        super().__init__()
        self.model = model
        self.hugging_face = hugging_face

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        if not self.hugging_face:
            logits = self.model(input_ids)
            if not isinstance(logits, torch.Tensor):
                raise TypeError(f"it returns a {type(logits).__name__}")
            return (logits,)
        return (self.model(input_ids=input_ids, use_cache=False, return_dict=True).logits,)

    def eager(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The same outside of an export."""
        return self(input_ids)


@exclusive
def capture(model: nn.Module, *, cache: bool = True) -> Captured:
    """Export one step of a decoder; `new` and `past` are dynamic, the batch size is one.

    model: a Hugging Face causal decoder or encoder-decoder, or any module that maps token ids
    [1, N] to logits [1, N, V] (captured without a cache). cache: without it, the graph takes whole
    texts and returns the logits of every position. The same graph serves the prompt
    (past = 0), decoding (new = 1) and anything in between. A model with 16-bit floats is captured
    in float32, which represents its weights exactly. The model is left unchanged. Raises
    CompileError for other models, and for weights that are not finite.
    """
    if not isinstance(model, nn.Module):
        raise CompileError(
            f"a {type(model).__name__} is not a model; load it first, as an nn.Module"
        )
    hugging_face = _check_architecture(model)
    _check_weights(model)
    model = _widened(model)
    with _quiet(), _inference(model, hugging_face), all_experts(model):
        if hugging_face and getattr(model.config, "is_encoder_decoder", False):
            return _capture_encoder_decoder(model, cache=cache)
        if cache and hugging_face:
            return _capture_cached(model)
        return _capture_plain(model, hugging_face)


@contextlib.contextmanager
def _inference(model: Any, hugging_face: bool) -> Iterator[None]:
    """Switch the model to evaluation mode and eager attention; restore both afterwards."""
    training = [module for module in model.modules() if module.training]
    attention = model.config._attn_implementation if hugging_face else None
    model.eval()
    if attention is not None:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        for module in training:
            module.training = True
        if attention is not None:
            model.set_attn_implementation(attention)


def _check_architecture(model: nn.Module) -> bool:
    """Whether the model is a Hugging Face decoder.

    Raises CompileError for other Hugging Face models, experts that cannot all be run, and recurrent
    layers.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        return False
    name = type(model).__name__
    if name.endswith("EncoderModel"):
        raise CompileError(f"{name} is an encoder; mergec compiles decoders such as GPT-2")
    if getattr(config, "is_encoder_decoder", False):
        check_encoder_decoder(model)
    if not hasattr(model, "lm_head") and model.get_output_embeddings() is None:  # type: ignore[operator]
        kind = "Seq2SeqLM" if getattr(config, "is_encoder_decoder", False) else "CausalLM"
        raise CompileError(f"{name} has no language-model head; load it as AutoModelFor{kind}")
    # Checked by module, because configurations of dense models mention experts too.
    for path, module in model.named_modules():
        if is_experts(path, module) and not can_run_all(module):
            raise CompileError(
                f"{name} is a mixture of experts, and which of them run would depend on secret "
                f"values; mergec can run them all, but not as {path} ({type(module).__name__}) "
                "stores them"
            )
    stateful = sorted({*(getattr(config, "layer_types", None) or ())} - _ATTENTION_LAYERS)
    if stateful:
        raise CompileError(
            f"{name} has layers of the type {stateful[0]}, whose state is not keys and "
            "values; mergec compiles decoders with attention layers only"
        )
    if name.endswith("ForMaskedLM") or not getattr(model, "can_generate", lambda: True)():
        raise CompileError(f"{name} is an encoder; mergec compiles decoders such as GPT-2")
    return True


def _check_weights(model: nn.Module) -> None:
    _check_quantized(model)
    state = model.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        raise CompileError("the model's weights are on the meta device; load them first")
    bad = [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        shown = ", ".join(bad[:5]) + (", …" if len(bad) > 5 else "")
        raise CompileError(f"weights are NaN or infinite: {shown}; repair the checkpoint")


def _check_quantized(model: nn.Module) -> None:
    """Raise CompileError, which names the first module, if weights are not plain real numbers."""
    for path, module in model.named_modules():
        held = module.state_dict(keep_vars=True).items()
        for name, value in held if not any(module.children()) else ():
            plain = type(value) in (torch.Tensor, nn.Parameter) and not value.is_quantized
            floating = plain and value.dtype in _FLOATS
            # Buffers may be masks and positions; packed weights are known by their names.
            packed = plain and not floating and _PACKED.search(name) is not None
            if not plain or packed or (isinstance(value, nn.Parameter) and not floating):
                kind = getattr(value, "dtype", type(value).__name__)
                raise CompileError(
                    f"{path or type(model).__name__} is a {type(module).__name__} whose {name} is "
                    f"not a plain floating-point tensor ({kind}); mergec reads floating-point "
                    "weights, so give the model from before it was quantized"
                )


def _widened(model: nn.Module) -> nn.Module:
    """A float32 copy of a model that has 16-bit floats; other models are returned unchanged."""
    short = {torch.float16, torch.bfloat16}
    if short.isdisjoint(tensor.dtype for tensor in model.state_dict().values()):
        return model
    return copy.deepcopy(model).float()


def _capture_cached(model: nn.Module) -> Captured:
    parameters = inspect.signature(model.forward).parameters
    layers = _cache_layers(model)
    # Fresh tensors, because a sliding window would have cut the model's own; the mask covers that.
    caches = [
        torch.zeros((1, tensor.shape[1], _PAST, tensor.shape[3]), dtype=tensor.dtype)
        for layer in layers
        for tensor in (layer.keys, layer.values)
    ]
    step = _CachedStep(model, "logits_to_keep" in parameters)
    ids = torch.zeros((1, _NEW), dtype=torch.int64)
    dynamic = torch.export.Dim.DYNAMIC
    shapes = ({1: dynamic}, tuple({2: dynamic} for _ in caches))
    inputs = [InputSpec("input_ids", Vis.CLIENT, "torch.int64", (1, "new"))]
    for index, tensor in enumerate(caches):
        name = f"cache.{index // 2}.{'key' if index % 2 == 0 else 'value'}"
        shape = (1, tensor.shape[1], "past", tensor.shape[3])
        inputs.append(InputSpec(name, Vis.SHARED, "torch.float64", shape, 0, f"{name}.next"))
    return _captured(step, (ids, *caches), shapes, inputs, len(layers))


def _capture_encoder_decoder(model: nn.Module, *, cache: bool) -> Captured:
    start = start_of(model)
    if cache:
        step = TranslationStep(model)
        example, dynamic, inputs = example_of(step, start)
        caches = len(inputs) - 2

        def finish(graph_module: fx.GraphModule) -> None:
            cut(graph_module, caches)

        captured = _captured(step, tuple(example), dynamic, inputs, caches // 2, finish)
    else:
        example, dynamic, inputs = texts()
        captured = _captured(WholeTranslation(model), tuple(example), dynamic, inputs, 0)
    check_vocabulary(model, start, captured.vocab_size)
    captured.start = start
    return captured


def _cache_layers(model: nn.Module) -> list[Any]:
    """What the model caches for each layer, after a short prompt."""
    from transformers.cache_utils import DynamicCache

    example, past = torch.zeros((1, _PAST), dtype=torch.int64), DynamicCache()
    given = {"past_key_values": past} if has_latents(model) else {}
    try:
        with torch.no_grad(), expanded(model, past):
            result = model(input_ids=example, use_cache=True, return_dict=True, **given)
    except Exception as error:
        raise does_not_run(model, error) from error
    layers: list[Any] = getattr(getattr(result, "past_key_values", None), "layers", [])
    if not layers or not all(hasattr(layer, "keys") for layer in layers):
        raise CompileError(
            f"{type(model).__name__} keeps no keys and values of past tokens; "
            "mergec compiles decoders such as GPT-2"
        )
    return layers


def _capture_plain(model: nn.Module, hugging_face: bool) -> Captured:
    step = _PlainStep(model, hugging_face)
    ids = torch.zeros((1, _NEW), dtype=torch.int64)
    inputs = [InputSpec("input_ids", Vis.CLIENT, "torch.int64", (1, "new"))]
    return _captured(step, (ids,), ({1: torch.export.Dim.DYNAMIC},), inputs, 0)


def _captured(
    step: Any,
    example: tuple[torch.Tensor, ...],
    dynamic: Any,
    inputs: list[InputSpec],
    layers: int,
    finish: Callable[[fx.GraphModule], None] = lambda _: None,
) -> Captured:
    """Export a step, and find the lengths for which its graph is the model.

    step: a module with an attribute `model` and a method `eager`. finish: brings the graph into its
    last form, in place.
    """
    model: Any = step.model
    with longer_tables(model), fixed_rotary(model) as switch:
        program = _export(step, example, dynamic)
        guards = guards_of(program)
        captured = _finish(program, inputs, layers)
        finish(captured.graph_module)
        empty = [tensor[:, :, :0] for tensor in example if tensor.is_floating_point()]
        comparison = Comparison(
            step.eager, captured.graph_module, inputs, captured.vocab_size, empty
        )
        with torch.inference_mode():
            if not comparison.encodes:
                _check_last_token(step, captured.vocab_size, empty)
            _check_short(comparison, lambda: _export(step, example, dynamic), model)
            limits = [declared_limit(getattr(model, "config", None))]
            most = min([MAX_LENGTH, *(bound.length for bound in limits if bound)])
            limits.append(table_limit(captured.graph_module, inputs, most))
            limit = min(filter(None, limits), key=lambda bound: bound.length, default=None)
            bounds = find_bounds(guards, limit, comparison, model)
    captured.limit, branch = bounds
    both = [bound for bound in (branch, switch) if bound]
    captured.branch = min(both, key=lambda bound: bound.length, default=None)
    for bound in (captured.limit, captured.branch):
        if bound and bound.length < 2:
            raise CompileError(f"the model works for too few lengths of text: {bound.reason}")
    return captured


def _check_last_token(step: Any, vocab_size: int, empty: list[torch.Tensor]) -> None:
    """Raise CompileError if one of the model's tables is shorter than its vocabulary."""
    last = vocab_size - 1
    try:
        step.eager(torch.full((1, _NEW), last), *empty)
    except IndexError as error:
        tokens = f"token {last}, the last of its vocabulary"
        raise does_not_run(step.model, error, tokens) from error


def _check_short(comparison: Comparison, again: Callable[[], Any], model: nn.Module) -> None:
    """Raise CompileError if the graph is not the model on texts of one token, or without a past.

    again: exports the step once more.
    """
    for pieces in short_steps(comparison):
        said = " and then ".join(f"{n} token{'s' if n > 1 else ''}" for n in pieces)
        try:
            same = comparison.same(*pieces)
        except Exception as error:
            raise CompileError(f"the model fails on {said}: {one_line(error)}") from error
        if not same:
            place = branch_place(again, pieces, model, comparison.encodes)
            raise CompileError(
                f"the model cannot be captured: for {said} it computes something else than for "
                f"longer texts{place}; rewrite it without a branch on the number of tokens"
            )


def _export(step: Any, example: tuple[torch.Tensor, ...], dynamic: Any) -> Any:
    try:
        return _run_export(step, example, dynamic)
    except (TypeError, AttributeError) as error:
        if not isinstance(step, _PlainStep):
            raise
        raise CompileError(
            f"{type(step.model).__name__} is not a decoder that maps token ids [1, N] to logits: "
            f"{error}"
        ) from error
    except Exception as error:
        reason = one_line(error)
        if isinstance(error, GuardOnDataDependentSymNode):
            place = _user_line(str(error))
            reason = (
                f"it branches on numbers that are known only when it runs ({place}); rewrite it "
                "without that branch"
            )
        elif reason.startswith("Constraints violated"):
            again = partial(_run_export, step, example, _may_be_fixed(dynamic))
            reason = (
                f"it works for only one number of tokens{fixing_place(again, step.model)}; let all "
                "sizes follow from the input's, as by torch.arange, without lists or fixed numbers"
            )
        raise CompileError(f"the model cannot be captured by torch.export: {reason}") from error


def _run_export(step: Any, example: tuple[torch.Tensor, ...], dynamic: Any) -> Any:
    # To look up symbolic shapes costs more than it saves.
    with torch.no_grad(), dynamo.patch(fake_tensor_cache_enabled=False):
        return torch.export.export(step, example, dynamic_shapes=dynamic, strict=False)


def _may_be_fixed(dynamic: Any) -> Any:
    """The same dimensions, of which the model may fix any."""
    return tree_map(lambda _: torch.export.Dim.AUTO, dynamic)


def _finish(program: Any, inputs: list[InputSpec], layers: int) -> Captured:
    graph_module, constants = from_exported(program, inputs)
    (output,) = [node for node in graph_module.graph.nodes if node.op == "output"]
    logits = output.args[0][0].meta["val"]
    if logits.dim() != 3 or not logits.is_floating_point():
        raise CompileError(
            f"the model returns a tensor with {logits.dim()} dimensions and dtype {logits.dtype} "
            "instead of logits [1, N, V]"
        )
    return Captured(graph_module, inputs, constants, layers, int(logits.shape[-1]))


def from_exported(program: Any, inputs: list[InputSpec]) -> tuple[fx.GraphModule, dict[str, Vis]]:
    """The graph of an exported program, with constants as attributes, and their visibilities."""
    graph_module, constants = _unlift(program)
    _annotate(graph_module)
    _inline_regions(graph_module)
    join_written_parts(graph_module.graph)
    _check_mutations(graph_module)
    _name_inputs(graph_module, inputs)
    (output,) = [node for node in graph_module.graph.nodes if node.op == "output"]
    output.args = (list(output.args[0]),)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    used = {node.target for node in graph_module.graph.nodes if node.op == "get_attr"}
    return graph_module, {name: vis for name, vis in constants.items() if name in used}


def _unlift(program: Any) -> tuple[fx.GraphModule, dict[str, Vis]]:
    """Turn lifted parameters, buffers and literals into get_attr nodes; tied ones share a node."""
    signature = program.graph_signature
    persistent = set(program.state_dict)
    attributes: dict[str, torch.Tensor] = {}
    visibility: dict[str, Vis] = {}
    by_storage: dict[tuple[Any, ...], str] = {}
    graph = program.graph
    for spec, node in zip(signature.input_specs, list(graph.nodes), strict=False):
        if spec.kind is torch.export.graph_signature.InputKind.USER_INPUT:
            continue
        source = spec.target
        tensor = program.state_dict.get(source)
        if tensor is None:
            tensor = program.constants[source]
        tensor = tensor.detach()
        secret = spec.kind is torch.export.graph_signature.InputKind.PARAMETER
        secret = secret or (source in persistent and spec.persistent is not False)
        name = source.removeprefix("model.") if source.startswith("model.") else source
        key = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        if secret and tensor.numel():
            name = by_storage.setdefault(key, name)
        attributes[name] = tensor
        visibility[name] = Vis.SERVER if secret else Vis.PUBLIC
        with graph.inserting_before(node):
            # torch 2.11's `Graph.get_attr` warns, because the owning module is created only below.
            new = graph.create_node("get_attr", name)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in attributes:
            attributes[node.target] = operator.attrgetter(node.target)(program.graph_module)
    # Its code is written when it is called: passes change the graph often, and only interpret it.
    return _LazyGraphModule(attributes, graph), visibility


def _inline_regions(graph_module: fx.GraphModule) -> None:
    """Inline the bodies of regions that only switch gradients or autocast."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        if node.target.name() not in _REGIONS:
            fault, remedy = "control flow", "rewrite the model without branches"
            if node.target.name() == "flex_attention":
                fault, remedy = "flex_attention", "use scaled_dot_product_attention with a mask"
            raise CompileError(f"{fault} cannot be compiled", {node: remedy})
        (body_node, body), arguments = _region(graph_module, node)
        mapping = dict(
            zip([n for n in body.graph.nodes if n.op == "placeholder"], arguments, strict=True)
        )
        _annotate(body)
        with graph.inserting_before(node):
            results = graph.graph_copy(body.graph, mapping)
        for user in list(node.users):
            if user.target is not operator.getitem:
                raise CompileError("a region's result is used as a whole", {node: "cannot inline"})
            index: Any = user.args[1]
            user.replace_all_uses_with(results[index])  # type: ignore[index]
            graph.erase_node(user)
        graph.erase_node(node)
        if not body_node.users:
            graph.erase_node(body_node)


def _region(graph_module: fx.GraphModule, node: fx.Node) -> tuple[tuple[fx.Node, Any], list[Any]]:
    for index, arg in enumerate(node.args):
        if isinstance(arg, fx.Node) and arg.op == "get_attr":
            body = operator.attrgetter(str(arg.target))(graph_module)
            if isinstance(body, fx.GraphModule):
                return (arg, body), list(node.args[index + 1 :])
    raise InternalError(f"{node.target} has no body")


def _check_mutations(graph_module: fx.GraphModule) -> None:
    """Raise CompileError for in-place writes that are visible through another name.

    Rewrites would treat such a write as a copy.
    """
    base: dict[fx.Node, fx.Node] = {}
    stale: dict[fx.Node, fx.Node] = {}
    bad: dict[fx.Node, str] = {}
    for node in graph_module.graph.nodes:
        for operand in node.all_input_nodes:
            if operand in stale:
                bad[stale[operand]] = (
                    "writes to a tensor that is read through another name later; join the parts by "
                    "torch.cat, or choose by torch.where"
                )
        base[node] = node
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or not node.all_input_nodes:
            continue
        (first, *_) = node.all_input_nodes
        if target._schema.is_mutable and target is not torch.ops.aten.detach_.default:
            for other, root in base.items():
                if root is base[first] and other is not node:
                    stale[other] = node
        elif any(result.alias_info for result in target._schema.returns):
            base[node] = base[first]
    if bad:
        raise CompileError("writing in place cannot be compiled here", bad)


def _name_inputs(graph_module: fx.GraphModule, inputs: list[InputSpec]) -> None:
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for node, spec in zip(placeholders, inputs, strict=True):
        node.meta["name"] = spec.name
        sizes = zip(node.meta["val"].shape, spec.shape, strict=True)
        node.meta["lengths"] = {str(size): name for size, name in sizes if isinstance(name, str)}


def _annotate(graph_module: fx.GraphModule) -> None:
    """Set each node's short module path and source line, for names, errors and inspection."""
    for node in graph_module.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        # On nodes that torch creates itself, the stack holds a marker.
        path = [entry[0] for key, entry in stack.items() if not key.startswith("_empty")]
        name = path[-1] if path else ""
        name = re.sub(r"^L\['self'\]\.?", "", name).removeprefix("model.")
        # Nodes that the export adds, such as input sizes, belong to no module.
        node.meta["module"] = "" if name == "model" or name.startswith("_empty_nn_module") else name
        node.meta["source"] = _user_line(node.meta.get("stack_trace") or "")


def _user_line(trace: str) -> str:
    """The innermost line of a stack trace in the model's own code, not torch's."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace)
    ours = (str(Path(torch.__file__).parent), __file__, "<")
    own = [frame for frame in frames if not frame[0].startswith(ours)]
    return f"{Path(own[-1][0]).name}:{own[-1][1]}" if own else ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress torch's logs and prints of errors that it also raises, and of the graph."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
