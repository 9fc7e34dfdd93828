"""A captured step equals the model; other modules are rejected with one-line errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.capture import capture
from mergec.runtime.core.spec import Vis
from tests.families import (
    LAYERS,
    LENGTHS,
    VOCAB,
    WIDTH,
    captured,
    decoder,
    empty_caches,
    error,
    every_family,
    expected,
    outputs,
    random_decoder,
    tokens,
)

TOLERANCE = 1e-12
"""The captured ops are those of the model, in float64."""


class Bigram(nn.Module):
    """A custom decoder with every kind of constant."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.register_buffer("scale", torch.full((WIDTH,), 1.5))
        self.register_buffer("table", torch.linspace(0.0, 1.0, WIDTH), persistent=False)
        if tied:
            self.head.weight = self.embed.weight

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed(ids) * self.scale + self.table + torch.tensor([0.25])

    def forward(self, ids: torch.Tensor) -> Any:
        return self.head(self.hidden(ids))


@every_family()
def test_a_step_is_the_models(family: str) -> None:
    step = captured(family)
    assert step.cached
    assert (step.layers, step.vocab_size) == (LAYERS, VOCAB)
    assert len(step.inputs) == 1 + 2 * LAYERS
    for new, past in LENGTHS:
        logits, *caches = outputs(step, new, past)
        assert error(logits, expected(family, new + past)) < TOLERANCE
        assert all(cache.shape[2] == new + past for cache in caches)


def test_the_cache_is_the_models() -> None:
    with torch.no_grad():
        layers = decoder("llama")(tokens()[:, :7], use_cache=True).past_key_values.layers
    _, *caches = outputs(captured("llama"), 3, 4)
    for layer, key, value in zip(layers, caches[::2], caches[1::2], strict=True):
        assert error(key, layer.keys) < TOLERANCE
        assert error(value, layer.values) < TOLERANCE


@pytest.mark.parametrize("family", ["gpt2", pytest.param("bloom", marks=pytest.mark.slow)])
def test_without_a_cache(family: str) -> None:
    step = capture(decoder(family), cache=False)
    assert not step.cached
    for length in (1, 2, 7):
        ids = tokens()[:, :length]
        (logits,) = step.graph_module(ids)
        assert error(logits, decoder(family)(ids).logits) < TOLERANCE


def test_a_model_is_left_as_it_was() -> None:
    model = random_decoder("llama").train()
    model.get_submodule("lm_head").eval()
    model.set_attn_implementation("sdpa")
    modes = [module.training for module in model.modules()]
    capture(model)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"


def test_a_module_of_ones_own() -> None:
    torch.manual_seed(1)
    model = Bigram()
    step = capture(model)
    assert (step.layers, step.vocab_size, step.max_length) == (0, VOCAB, None)
    for length in (1, 6):
        ids = tokens(length)
        assert torch.equal(step.graph_module(ids)[0], model(ids))


def test_who_knows_the_constants() -> None:
    step = capture(Bigram())
    known = {name: vis for name, vis in step.constants.items() if "lifted" not in name}
    assert known == {
        "embed.weight": Vis.SERVER,
        "head.weight": Vis.SERVER,
        "scale": Vis.SERVER,
        "table": Vis.PUBLIC,
    }
    (literal,) = set(step.constants) - set(known)
    assert step.constants[literal] is Vis.PUBLIC
    assert step.tensors()[literal][0].tolist() == [0.25]


def test_tied_weights_are_one_constant() -> None:
    assert sum("weight" in name for name in capture(Bigram(tied=True)).constants) == 1
    assert sum("weight" in name for name in capture(Bigram()).constants) == 2
    tied = capture(random_decoder("llama", num_hidden_layers=1, tie_word_embeddings=True))
    assert "lm_head.weight" not in tied.constants


def test_nodes_know_where_they_come_from() -> None:
    nodes = [n for n in captured("llama").graph_module.graph.nodes if n.op == "call_function"]
    modules = {node.meta["module"] for node in nodes}
    assert {"model.layers.1.self_attn.q_proj", "model.norm", "lm_head"} <= modules
    assert not any("empty" in module for module in modules)
    sources = {node.meta["source"] for node in nodes if node.meta["module"].endswith("q_proj")}
    assert all(source.startswith("modeling_llama.py:") for source in sources)


def test_training_mode_and_attention_kind_do_not_matter() -> None:
    from transformers import LlamaForCausalLM

    model = random_decoder("llama", attention_dropout=0.5)
    wanted = model(tokens()[:, :5]).logits[:, -1:]
    fused = LlamaForCausalLM._from_config(model.config, attn_implementation="sdpa").double()
    fused.load_state_dict(model.state_dict())
    assert error(outputs(capture(fused.train()), 5, 0)[0], wanted) < TOLERANCE


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_a_model_of_short_floats_is_computed_in_float32(dtype: torch.dtype) -> None:
    model = random_decoder("llama").to(dtype)
    step = capture(model)
    caches = [cache.float() for cache in empty_caches(step)]
    with torch.no_grad():
        logits = step.graph_module(tokens()[:, :7], *caches)[0]
    assert {tensor.dtype for tensor in model.parameters()} == {dtype}
    wanted = model.float()(tokens()[:, :7]).logits[:, -1:]
    assert (logits.dtype, wanted.dtype) == (torch.float32, torch.float32)
    assert error(logits, wanted) < 1e-5


def _bert(kind: str, **changes: Any) -> Any:
    import transformers

    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=48, **changes,
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def _t5(kind: str) -> Any:
    import transformers

    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=1, num_heads=4
    )
    return getattr(transformers, kind)(config)


def _headless() -> Any:
    return decoder("llama").model


def _recurrent() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)
    return MambaForCausalLM(config)


def _spoiled(name: str, value: float) -> Any:
    model = Bigram()
    model.state_dict()[name].view(-1)[0] = value
    return model


def _uneven() -> Any:
    model = random_decoder("llama")
    model.model.layers[1].self_attn.o_proj = nn.Linear(7, WIDTH).double()
    return model


class Raises(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        raise KeyError("rope")


def _raising() -> Any:
    model = random_decoder("llama")
    model.model.norm = Raises()
    return model


def _short_table() -> Any:
    model = random_decoder("llama")
    model.model.embed_tokens = nn.Embedding(VOCAB - 1, WIDTH).double()
    return model


class Pair(Bigram):
    def forward(self, ids: torch.Tensor) -> Any:
        return super().forward(ids), 1


class Branch(Bigram):
    def forward(self, ids: torch.Tensor) -> Any:
        if self.hidden(ids).sum() > 0:
            ids = ids + 1
        return super().forward(ids)


class Conditional(Bigram):
    def forward(self, ids: torch.Tensor) -> Any:
        x = self.hidden(ids)
        return self.head(torch.cond(x.sum() > 0, lambda t: t * 2, lambda t: t + 1, (x,)))


class Flex(Bigram):
    """Its call takes a dictionary of options, as no other does."""

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.hidden(ids)[:, None]
        return self.head(flex_attention(x, x, x, score_mod=lambda s, *_: 2 * s)[:, 0])


class OneLength(Bigram):
    def forward(self, ids: torch.Tensor) -> Any:
        return super().forward(ids).reshape(1, 3, VOCAB)


class Listed(Bigram):
    def forward(self, ids: torch.Tensor) -> Any:
        x = self.hidden(ids)
        return self.head(x + torch.tensor(list(range(ids.shape[1])))[:, None])


class LastOnly(Bigram):
    def forward(self, ids: torch.Tensor) -> Any:
        return super().forward(ids)[:, -1]


class Masked(Bigram):
    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        return super().forward(ids * mask)


class WritesView(Bigram):
    def forward(self, ids: torch.Tensor) -> Any:
        x = self.hidden(ids)
        x[:, 0] += 1.0
        return self.head(x)


class WritesAlias(Bigram):
    def forward(self, ids: torch.Tensor) -> Any:
        x = self.hidden(ids)
        view = x.view(1, -1, WIDTH)
        x.mul_(2.0)
        return self.head(view)


CHECK = "the model itself raises this in plain PyTorch, so check its config$"

HERE = r"\(test_capture.py:\d+\)"

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "masked encoder": (lambda: _bert("BertForMaskedLM"), "is an encoder"),
    "encoder": (lambda: _bert("BertModel"), "no language-model head"),
    "encoder as decoder": (lambda: _bert("BertLMHeadModel"), "keeps no keys and values"),
    "no start": (lambda: _t5("T5ForConditionalGeneration"), "set .*decoder_start_token_id"),
    "t5 without a head": (lambda: _t5("T5Model"), "load it as AutoModelForSeq2SeqLM"),
    "half of t5": (lambda: _t5("T5EncoderModel"), "is an encoder"),
    "headless": (_headless, "LlamaModel has no language-model head; load it as AutoModelForCausal"),
    "recurrent": (_recurrent, "MambaForCausalLM has layers of the type linear_attention"),
    "sizes that do not fit": (
        _uneven,
        "LlamaForCausalLM does not run on token ids: mat1 and mat2 shapes .* "
        r"\(modeling_llama.py:\d+\); " + CHECK,
    ),
    "an error of its own": (_raising, f"does not run on token ids: 'rope' {HERE}; {CHECK}"),
    "short table": (
        _short_table,
        rf"not run on token 96, the last .*: index out .* \(modeling_llama.py:\d+\); {CHECK}",
    ),
    "NaN": (lambda: _spoiled("head.weight", float("nan")), "NaN or infinite: head.weight"),
    "infinite buffer": (lambda: _spoiled("scale", float("inf")), "NaN or infinite: scale"),
    "no weights": (lambda: Bigram().to("meta"), "weights are on the meta device"),
    "a path": (lambda: "gpt2", "a str is not a model"),
    "no decoder": (lambda: nn.Linear(4, 4), "cannot be captured"),
    "not a tensor": (Pair, "Pair is not a decoder .* returns a tuple"),
    "one position": (LastOnly, r"2 dimensions .* instead of logits"),
    "two inputs": (Masked, "missing 1 required positional argument: 'mask'"),
    "one length": (OneLength, "only one number of tokens; let all sizes follow from the input"),
    "a list of one length": (Listed, f"one number of tokens {HERE}; let all"),
    "branch": (Branch, f"known only when it runs {HERE}"),
    "flex attention": (Flex, "flex_attention cannot be compiled(.|\n)*use scaled_dot_product"),
    "control flow": (Conditional, "control flow cannot be compiled"),
    "write to a view": (WritesView, "writing in place"),
    "write to an alias": (WritesAlias, "writing in place"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    build, words = REFUSED[case]
    model = build()
    capfd.readouterr()
    with pytest.raises(CompileError, match=words) as caught:
        capture(model)
    assert len(str(caught.value).splitlines()) % 3 == 1, "one line, and three for each node"
    said = capfd.readouterr()
    assert not said.out
    assert "Error" not in said.err
    assert "def forward" not in said.err


def test_writing_in_place_is_fine_where_nobody_sees_it() -> None:
    class Writes(Bigram):
        def forward(self, ids: torch.Tensor) -> Any:
            x = self.hidden(ids)
            x += 1.0
            x = x.view(1, -1, WIDTH).mul_(2.0)
            return self.head(x)

    model = Writes()
    with torch.no_grad():
        assert torch.equal(capture(model).graph_module(tokens())[0], model(tokens()))


def test_many_bad_weights_are_not_all_listed() -> None:
    model = random_decoder("llama")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(CompileError, match="…") as caught:
        capture(model)
    assert str(caught.value).count("weight,") == 5
