"""Tiny random encoder-decoders, their captured steps and programs; cached per session."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch

from mergec.compiler.config import CompileConfig
from mergec.compiler.driver import compile_decoder
from mergec.compiler.frontend.capture import Captured, capture
from mergec.compiler.program import Program

VOCAB = 97
SOURCES = ([5, 9, 33, 2, 71], [8], [40, 41, 42, 90, 11, 3, 77, 15, 16])
"""Token sequences of several lengths, among them one token."""

_BART: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 32,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    # Distances between tokens of the tests fall into buckets of both kinds.
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}
_MARIAN = {"decoder_start_token_id": 96, "pad_token_id": 96, "eos_token_id": 0}

_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "t5_gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", _T5),
    "umt5": ("UMT5ForConditionalGeneration", "UMT5Config", _T5),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", _BART),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", _BART),
    "marian": ("MarianMTModel", "MarianConfig", {**_BART, **_MARIAN, "scale_embedding": True}),
    "blenderbot": ("BlenderbotForConditionalGeneration", "BlenderbotConfig", _BART),
    "blenderbot_small": (
        "BlenderbotSmallForConditionalGeneration",
        "BlenderbotSmallConfig",
        _BART,
    ),
    "plbart": ("PLBartForConditionalGeneration", "PLBartConfig", _BART),
    "mvp": ("MvpForConditionalGeneration", "MvpConfig", _BART),
    "m2m_100": ("M2M100ForConditionalGeneration", "M2M100Config", _BART),
}
_SEEDS = {"t5_gated": 2, "mt5": 2}
"""Of weights, where those of seed 1 answer every source alike."""

FAMILIES = tuple(_MODELS)
QUICK = ("t5", "bart")


def every_family(quick: tuple[str, ...] = QUICK) -> pytest.MarkDecorator:
    """All families as the parameter `family`; those that are not `quick` in the slow tests."""
    marks = {name: () if name in quick else pytest.mark.slow for name in FAMILIES}
    return pytest.mark.parametrize(
        "family", [pytest.param(name, marks=mark) for name, mark in marks.items()]
    )


def random_model(family: str, **changes: Any) -> Any:
    """A model whose weights are spread so far that its greedy answers vary."""
    import transformers

    kind, config, options = _MODELS[family]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**{**options, **changes}))
    generator = torch.Generator().manual_seed(_SEEDS.get(family, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5, generator=generator)
    model.tie_weights()
    return model.eval()


@functools.cache
def model_and_step(family: str) -> tuple[Any, Captured]:
    """A float32 model and its captured step; must not be modified."""
    model = random_model(family)
    return model, capture(model)


@functools.cache
def compiled(family: str, **options: Any) -> tuple[Any, Program]:
    """A model and its program, by default without noise in the logits; must not be modified."""
    model, captured = model_and_step(family)
    config = CompileConfig(**{"max_length": 40, "logit_noise": 0.0, **options})
    return model, compile_decoder(model, config=config, captured=captured)


@functools.cache
def double_step(family: str) -> Captured:
    """The step of a model in float64; must not be modified."""
    return capture(copy.deepcopy(model_and_step(family)[0]).double())


def answer_of(model: Any, source: list[int], max_tokens: int, **options: Any) -> list[int]:
    """The greedy answer of transformers' `generate`, without the token that it begins with."""
    found = model.generate(
        torch.tensor([source]),
        max_new_tokens=max_tokens,
        do_sample=False,
        num_beams=1,
        **options,
    )
    return [int(token) for token in found[0, 1:]]
