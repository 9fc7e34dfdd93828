"""Model to text: compile, save, load, three processes, and the predicted cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mergec import CompileConfig, Program, compile_decoder
from mergec.compiler.answer import Answer
from mergec.compiler.backend.cost import cost_report
from mergec.runtime.roles.local import run_local

PROMPT, TOKENS = [3, 14, 15, 92, 65, 35], 3
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 96},
    "qwen2": {"num_key_value_heads": 2, "intermediate_size": 96},
    "gpt_neox": {"intermediate_size": 96},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
}


def decoder(family: str, **options: Any) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(11)
    config = AutoConfig.for_model(family, **options)
    model: nn.Module = AutoModelForCausalLM.from_config(config).eval()
    # Larger weights than the initial ones: logits then differ by more than the protocols' error.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model


def compiled(model: nn.Module, path: Path, max_length: int = 64) -> Program:
    # Noise might move a token where two logits are close.
    config = CompileConfig(max_length=max_length, logit_noise=0.0)
    compile_decoder(model, config=config).save(path)
    return Program.load(path)


def check(program: Program, tokens: int = TOKENS, prompt: list[int] | None = None) -> None:
    """Tokens are plaintext's; rounds and bytes of every step are the predicted ones."""
    prompt = prompt or PROMPT
    assert program.path is not None
    result = run_local(program.path, prompt, max_tokens=tokens, ignore_stop=True)
    plain = program.plaintext(Answer("", prompt, result.tokens))
    assert plain.tokens == result.tokens[: len(plain.tokens)]
    for record in result.records:
        predicted = cost_report(program.any_role, record.new, record.past).total
        assert record.rounds == predicted.rounds
        assert record.sent + record.received == predicted.online
        assert record.offline_bytes == predicted.offline


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_family_in_three_processes(family: str, tmp_path: Path) -> None:
    check(compiled(decoder(family, **SMALL, **FAMILIES[family]), tmp_path / "bundles"))


@pytest.mark.slow
def test_the_same_program_by_stock_protocols(tmp_path: Path) -> None:
    """The baseline runs the same bundles, at many times the bytes and rounds."""
    model = decoder("llama", **SMALL, **FAMILIES["llama"])
    program = compiled(model, tmp_path / "bundles")
    assert program.path is not None
    stock = run_local(program.path, PROMPT, max_tokens=2, mode="crypten", ignore_stop=True)
    ours = run_local(program.path, PROMPT, max_tokens=2, ignore_stop=True)
    assert len(stock.tokens) == 2
    for theirs, mine in zip(stock.records, ours.records, strict=True):
        assert theirs.rounds > mine.rounds
        assert theirs.sent + theirs.received > mine.sent + mine.received


@pytest.mark.slow
def test_gpt2_base_size(tmp_path: Path) -> None:
    """12 layers of width 768 and 50,257 tokens, with random weights."""
    model = decoder("gpt2", n_positions=128)
    check(compiled(model, tmp_path / "bundles", 128), 2, [101, 2003, 50000, 7, 99])
