"""Models of `gpu_check`: made, compiled and saved by processes of their own, as folders of bundles.

They compile on the CPU while other parts use the device. Weights are random, and drawn cheaply,
except those of SmolLM2 if its package is installed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_seen import Seen

MAX_LENGTH = 512
DRAWN = (1 << 20) - 3
"""Numbers that are drawn for all weights, which repeat them. A prime, so that no rows are equal."""

SMOLLM2 = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": MAX_LENGTH,
    "rope_theta": 100_000.0, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_1B = {
    "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": MAX_LENGTH,
}  # fmt: skip
SMALL = {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip

FACTS = "made.json"
"""Written into a model's folder when it is complete."""

Make = Callable[[], tuple[Any, Any, str]]
"""Makes a model, its tokenizer if it has one, and says what it is."""


@contextmanager
def cheap_weights() -> Iterator[None]:
    """Within, torch fills tensors with the same few random numbers again and again.

    Drawing a billion weights would take a core a minute.
    """
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(DRAWN, generator=generator)
    uniform = torch.rand(DRAWN, generator=generator)
    kept = torch.Tensor.normal_, torch.Tensor.uniform_

    def fill(tensor: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            flat = tensor.view(-1) if tensor.is_contiguous() else tensor.new_empty(tensor.numel())
            for piece in flat.split(DRAWN):
                piece.copy_(numbers[: len(piece)])
            return tensor if tensor.is_contiguous() else tensor.copy_(flat.view(tensor.shape))

    def normal_(tensor: torch.Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> Any:
        if tensor.is_meta:
            return tensor
        return fill(tensor, normal[: tensor.numel()] * std + mean)

    def uniform_(tensor: torch.Tensor, start: float = 0.0, to: float = 1.0, **_: Any) -> Any:
        if tensor.is_meta:
            return tensor
        return fill(tensor, uniform[: tensor.numel()] * (to - start) + start)

    vars_of: Any = torch.Tensor
    vars_of.normal_, vars_of.uniform_ = normal_, uniform_
    try:
        yield
    finally:
        vars_of.normal_, vars_of.uniform_ = kept


def random_model(family: str, **options: Any) -> Any:
    """A model of transformers with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with cheap_weights():
        config = AutoConfig.for_model(family, **options)
        return AutoModelForCausalLM.from_config(config).eval()


def tokens(vocabulary: int, count: int) -> list[int]:
    """Tokens of a prompt: their values are of no matter."""
    return [(7919 * i + 13) % vocabulary for i in range(count)]


def _gpt2() -> tuple[Any, Any, str]:
    return random_model("gpt2"), None, "GPT-2-base with random weights"


def _smollm2() -> tuple[Any, Any, str]:
    from mergec.compiler.frontend.load import load_model

    try:
        model, tokenizer = load_model("smollm2")
    except Exception as error:  # noqa: BLE001  (whatever is missing for it)
        why = str(error).strip().splitlines()[:1] or [type(error).__name__]
        model = random_model("llama", **SMOLLM2)
        return model, None, f"random weights of SmolLM2's shape, not SmolLM2 ({why[0]})"
    return model, tokenizer, "SmolLM2-135M-Instruct"


def _llama_1b() -> tuple[Any, Any, str]:
    model = random_model("llama", **LLAMA_1B)
    return model, None, "a Llama of the shape of 1.2 billion parameters, random weights"


def _small() -> tuple[Any, Any, str]:
    return random_model("llama", **SMALL), None, "a Llama of two layers, random weights"


MODELS: dict[str, Make] = {
    "llama-1b": _llama_1b, "smollm2": _smollm2, "gpt2": _gpt2, "small": _small,
}  # fmt: skip
"""The one that takes longest comes first."""

CONFIGS: dict[str, dict[str, Any]] = {"small": {"max_length": 128, "weights": "shared"}}
"""How models are compiled, where it is not for `MAX_LENGTH` tokens."""


def build(name: str, root: Path) -> Iterator[Seen]:
    """Make a model, compile it, and save it into a folder of this name below `root`."""
    import mergec

    began = time.perf_counter()
    model, tokenizer, what = MODELS[name]()
    made = time.perf_counter()
    config = mergec.CompileConfig(**CONFIGS.get(name, {"max_length": MAX_LENGTH}))
    program = mergec.compile_decoder(model, tokenizer, config)
    compiled = time.perf_counter()
    program.save(root / name)
    known = {
        "what": what, "vocabulary": model.config.vocab_size, "tokenizer": tokenizer is not None,
        "parameters": sum(weight.numel() for weight in model.parameters()),
    }  # fmt: skip
    # Moved into place, so that nobody reads a part of it.
    new = root / f"{name}.new"
    new.write_text(json.dumps(known))
    new.rename(root / f"{name}.{FACTS}")
    yield Seen(
        f"{name}: {what}, {known['parameters'] / 1e6:,.0f} million parameters: made in "
        f"{made - began:.0f} s, compiled in {compiled - made:.0f} s, saved in "
        f"{time.perf_counter() - compiled:.0f} s"
    )


def facts(name: str, root: Path) -> dict[str, Any] | None:
    """What is known of a model that was built; None if it was not."""
    file = root / f"{name}.{FACTS}"
    found: dict[str, Any] | None = json.loads(file.read_text()) if file.is_file() else None
    return found
