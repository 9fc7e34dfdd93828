"""A tiny random decoder of each supported family, and its captured step; cached per session."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mergec.compiler.frontend.capture import Captured, capture

VOCAB, LAYERS, HEADS, WIDTH = 97, 2, 4, 32
LENGTHS = ((5, 0), (1, 5), (3, 4))
"""New and past tokens: a prompt, a decode step, and several tokens after a cache."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_GPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 64,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT,
    "llama": {**_COMMON, "num_key_value_heads": 2},
    "qwen2": {**_COMMON, "num_key_value_heads": 2},
    "qwen3": {**_COMMON, "num_key_value_heads": 2, "head_dim": 8},
    "mistral": {**_COMMON, "num_key_value_heads": 2},
    "opt": {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": WIDTH},
    "gpt_neox": {**_COMMON, "rotary_pct": 0.5},
    "gpt_neo": {
        **_COMMON,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
    },
    "phi": _COMMON,
    "phi3": {**_COMMON, "pad_token_id": 0},
    "gemma": {**_COMMON, "num_key_value_heads": 2, "head_dim": 8},
    "gemma2": {
        **_COMMON,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 4,
        "query_pre_attn_scalar": 8,
    },
    "bloom": {**_COMMON, "n_layer": LAYERS, "n_head": HEADS},
    "falcon": {**_COMMON, "new_decoder_architecture": False},
    "gptj": {**_GPT, "rotary_dim": 4},
    "codegen": {**_GPT, "rotary_dim": 4},
    "stablelm": {**_COMMON, "partial_rotary_factor": 0.5, "num_key_value_heads": 4},
    "olmo": _COMMON,
}
FAMILIES = tuple(_CONFIGS)
UNLIKE = ("gpt2", "llama", "qwen3", "opt", "gpt_neox", "gpt_neo", "gemma2", "bloom", "falcon")
"""Families of which each has something that the others lack."""


def slow(*values: Any) -> list[Any]:
    """Parameters of slow tests."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def every_family(quick: Sequence[str] = UNLIKE) -> pytest.MarkDecorator:
    """All families as the parameter `family`; those that are not `quick` in the slow tests."""
    families = [name if name in quick else slow(name)[0] for name in FAMILIES]
    return pytest.mark.parametrize("family", families)


def random_decoder(family: str, **changes: Any) -> Any:
    """A new model in float64; `changes` are further settings of its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**_CONFIGS[family], **changes}
    config = AutoConfig.for_model(family, bos_token_id=None, eos_token_id=None, **settings)
    torch.manual_seed(FAMILIES.index(family))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.eval().double()


@functools.cache
def decoder(family: str) -> Any:
    """The model of a family; must not be modified."""
    return random_decoder(family)


@functools.cache
def _captured(family: str) -> Captured:
    return capture(decoder(family))


@functools.cache
def float_decoder(family: str) -> tuple[Any, Captured]:
    """The model of a family in float32, and its step as captured; neither may be modified."""
    model = random_decoder(family).float()
    return model, capture(model)


def captured(family: str) -> Captured:
    """A copy of the captured step of a family, which may be rewritten."""
    return _captured(family).copy()


def tokens(count: int = 9, seed: int = 0) -> torch.Tensor:
    """Random token ids [1, count]."""
    return torch.randint(0, VOCAB, (1, count), generator=torch.Generator().manual_seed(seed))


OPTIONS: dict[str, dict[str, Any]] = {
    "loopback": {},
    "lan": {"network": "lan"},
    "wan": {"network": "wan"},
    "exact": {"rounding": "exact"},
    "shared": {"weights": "shared"},
}
"""Options of a compile that choose other protocols, by a name for test cases."""


def empty_caches(step: Captured) -> list[torch.Tensor]:
    shapes = [[0 if isinstance(s, str) else s for s in spec.shape] for spec in step.inputs[1:]]
    return [torch.zeros(shape, dtype=torch.float64) for shape in shapes]


def outputs(step: Captured, new: int, past: int) -> list[torch.Tensor]:
    """Logits and caches of `new` tokens after `past` ones, all computed by the graph itself."""
    ids, caches = tokens(), empty_caches(step)
    with torch.no_grad():
        if past:
            caches = step.graph_module(ids[:, :past], *caches)[1:]
        return list(step.graph_module(ids[:, past : past + new], *caches))


@functools.cache
def expected(family: str, length: int) -> torch.Tensor:
    """The model's own logits of the last of the first `length` tokens."""
    with torch.no_grad():
        logits = decoder(family)(input_ids=tokens()[:, :length], use_cache=False).logits
    return logits[:, -1:]


def error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference; the shapes must be equal."""
    assert actual.shape == wanted.shape
    return float((actual.detach().double() - wanted.detach().double()).abs().max())
