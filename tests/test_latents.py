"""Models that cache latents: their keys and values are cached instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from mergec import CompileConfig, compile_decoder
from mergec.compiler.frontend.capture import capture
from mergec.compiler.frontend.latents import expanded, has_latents
from mergec.runtime.core.values import Masked
from mergec.runtime.engine.rehearsal import Rehearsal
from tests.families import empty_caches, float_decoder
from tests.test_more_families import example

FAMILIES = ("deepseek_v3", "minicpm3", "youtu")
TEXT = [5, 17, 3, 88, 41, 7, 9, 2]


def model_of(family: str) -> Any:
    if family not in CONFIG_MAPPING:
        pytest.skip("this version of transformers has no such family")
    return example.decoder(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_the_model(family: str) -> None:
    model = model_of(family).double()
    # Its other experts take no float64.
    model.set_experts_implementation("eager")
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        wanted = model(torch.tensor([TEXT])).logits[0]
    step = capture(model)
    assert "expand_kv" not in vars(attention), "the model is left as it was"
    assert has_latents(model)
    shapes = {tuple(spec.shape) for spec in step.inputs[1:]}
    assert shapes == {(1, 4, "past", 16), (1, 4, "past", 8)}
    for sizes in ((8,), (5, 1, 1, 1), (1, 3, 4)):
        caches, past = empty_caches(step), 0
        for new in sizes:
            ids = torch.tensor([TEXT[past : past + new]])
            logits, *caches = step.graph_module(ids, *caches)
            past += new
            # Its norms and its softmax are computed in float32.
            assert float((logits[0, -1] - wanted[past - 1]).abs().max()) < 1e-5
            assert {cache.shape[2] for cache in caches} == {past}


def test_a_step_opens_new_tokens_alone() -> None:
    program = compile_decoder(model_of("minicpm3"), config=CompileConfig(max_length=64))
    rehearsal = Rehearsal(program.any_role)
    for part in rehearsal.parts(1, 50):
        if isinstance(part.result, Masked) and part.planned.instruction.target == "mpc.open":
            assert 51 not in part.result.shape
        assert part.planned.instruction.target != "mpc.linear" or 51 not in part.result.shape


def test_other_models_are_left_alone() -> None:
    model, _ = float_decoder("llama")
    assert not has_latents(model)

    class Past:
        def update(self, keys: str, values: str, layer: int) -> tuple[str, str, int]:
            return keys, values, layer

    past = Past()
    with expanded(model, past):
        assert past.update("k", "v", 3) == ("k", "v", 3)
    assert not vars(past)
