"""Mixtures of experts: all experts run, and weigh what the model's own routers say."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from mergec import CompileConfig, compile_decoder
from mergec.compiler.backend.cost import cost_report
from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.capture import capture
from mergec.compiler.frontend.experts import AllExperts, all_experts
from mergec.compiler.program import Program
from mergec.runtime.engine.trees import Branches
from mergec.runtime.roles.inprocess import InProcessSession
from tests.families import OPTIONS, empty_caches
from tests.test_more_families import LOGIT_ERROR, example

TEXT = [*example.PROMPT, *example.ANSWER]
"""Of which no token's choice is a near tie."""

FAMILIES = ("mixtral", "qwen2_moe", "gpt_oss", "minimax_m2")
"""Weights that are divided by their sum, or not beside a shared expert; interleaved matrices with
biases; sigmoids."""


@functools.cache
def model_of(family: str) -> Any:
    if family not in CONFIG_MAPPING:
        pytest.skip("this version of transformers has no such family")
    return example.decoder(family)


@functools.cache
def compiled(family: str, **options: Any) -> Program:
    config = CompileConfig(**{"max_length": 64, "logit_noise": 0.0, **options})
    return compile_decoder(model_of(family), config=config)


def logits_of(model: nn.Module, count: int) -> torch.Tensor:
    """The model's own logits after that many tokens of the text."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([TEXT[:count]]), use_cache=False).logits[0, -1]
    return logits.double()


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"])
def test_steps_are_the_model(family: str) -> None:
    """In float64, but for softmaxes that the model computes in float32."""
    if family not in CONFIG_MAPPING:
        pytest.skip("this version of transformers has no such family")
    model = example.decoder(family).double()
    # The others take no float64.
    model.set_experts_implementation("eager")
    before = dict(model.named_parameters())
    modules = list(model.modules())
    step = capture(model)
    assert all(one is other for one, other in zip(modules, model.modules(), strict=True))
    assert all(before[name] is value for name, value in model.named_parameters())
    for sizes in ((7,), (5, 1, 1), (1, 2, 4)):
        caches, past = empty_caches(step), 0
        for new in sizes:
            ids = torch.tensor([TEXT[past : past + new]])
            logits, *caches = step.graph_module(ids, *caches)
            past += new
            assert (logits[0, -1] - logits_of(model, past)).abs().max() < 1e-5


class Config:
    """What experts read of a configuration."""

    _experts_implementation = "eager"


def _experts(transposed: bool, together: bool, bias: bool, gate: bool) -> Any:
    """Five experts whose weights are stored in one of the ways that transformers knows."""
    count, width, inner = 5, 6, 4
    outer = 2 * inner if gate else inner

    class Kept(nn.Module):
        def __init__(self, config: Config) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(1)

            def made(*shape: int) -> nn.Parameter:
                return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

            up, down = (count, outer, width), (count, width, inner)
            name = "gate_up_proj" if gate else "up_proj"
            setattr(self, name, made(*up).mT if transposed else made(*up))
            self.down_proj = made(*down).mT if transposed else made(*down)
            if bias:
                setattr(self, f"{name}_bias", made(count, outer))
                self.down_proj_bias = made(count, width)
            self.act_fn = ACT2FN["silu"]

        def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> Any:
            """One token and one expert at a time."""
            result = torch.zeros_like(x)
            for token, place in itertools.product(range(len(x)), range(chosen.shape[1])):
                e = int(chosen[token, place])
                name = "gate_up_proj" if gate else "up_proj"
                up, down = getattr(self, name)[e], self.down_proj[e]
                inside = x[token] @ (up if transposed else up.T)
                if bias:
                    inside = inside + getattr(self, f"{name}_bias")[e]
                if not gate:
                    active = self.act_fn(inside)
                else:
                    halves = inside.chunk(2) if together else (inside[::2], inside[1::2])
                    active = self.act_fn(halves[0]) * halves[1]
                made = active @ (down if transposed else down.T)
                made = made + self.down_proj_bias[e] if bias else made
                result[token] += weights[token, place] * made
            return result

    if gate and not together:

        def _apply_gate(self: Any, x: torch.Tensor) -> torch.Tensor:
            return self.act_fn(x[..., ::2]) * x[..., 1::2]

        Kept._apply_gate = _apply_gate  # type: ignore[attr-defined]
    options = {"is_transposed": transposed, "is_concatenated": together, "has_bias": bias}
    return use_experts_implementation(Kept, has_gate=gate, **options)(Config())


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_every_way_to_store_experts(
    transposed: bool, together: bool, bias: bool, gate: bool
) -> None:
    experts = _experts(transposed, together, bias, gate)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    weights, chosen = torch.randn(7, 5, generator=generator, dtype=torch.float64).topk(2)
    with torch.no_grad():
        wanted = experts(x, chosen, weights)
        found = AllExperts(experts)(x, chosen, weights)
    assert (found - wanted).abs().max() < 1e-12


def test_a_layer_is_restored_after_an_error() -> None:
    layer = nn.Sequential(_experts(False, True, False, True))
    (own,) = layer
    with pytest.raises(ZeroDivisionError), all_experts(layer):
        assert isinstance(layer[0], AllExperts)
        raise ZeroDivisionError
    assert layer[0] is own


class Experts(nn.ModuleList):
    """Experts that are modules of their own, called where a token chooses them."""


def test_experts_that_are_stored_otherwise_are_refused() -> None:
    model = example.decoder("llama")
    model.model.layers[1].mlp.experts = Experts([nn.Linear(2, 2)])
    with pytest.raises(CompileError, match="mixture of experts") as caught:
        compile_decoder(model)
    assert "not as model.layers.1.mlp.experts (Experts) stores them" in str(caught.value)


def test_a_router_that_is_not_recognized_is_refused() -> None:
    """The message names the op, and where it is called."""
    model = example.decoder("mixtral")
    for layer in model.model.layers:
        router = layer.mlp.gate

        def forward(x: torch.Tensor, router: Any = router) -> Any:
            scores = nn.functional.linear(x, router.weight)
            values, index = scores.topk(3, largest=False)
            return scores, values, index

        router.forward = forward
    with pytest.raises(CompileError, match="ops that cannot be lowered") as caught:
        compile_decoder(model)
    assert "aten.topk" in str(caught.value) and "layers.0.mlp" in str(caught.value)


def test_more_experts_than_a_row_may_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("num_experts", 300), ("num_local_experts", 300), ("intermediate_size", 2)):
        monkeypatch.setitem(example.SIZES, name, size)
    with pytest.raises(CompileError, match="chooses from 300; its protocol supports from 2 to 256"):
        compile_decoder(example.decoder("mixtral"), config=CompileConfig(max_length=16))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mixtral", "loopback"),
        ("qwen2_moe", "loopback"),
        *(
            pytest.param(*both, marks=pytest.mark.slow)
            for both in (
                *itertools.product(("gpt_oss", "minimax_m2"), ("lan", "exact")),
                *itertools.product(("mixtral", "qwen2_moe"), ("wan", "exact", "shared")),
            )
        ),
    ],
)
def test_steps_have_the_models_logits_at_the_predicted_cost(family: str, options: str) -> None:
    model, program = model_of(family), compiled(family, **OPTIONS[options])
    with InProcessSession(program.roles) as session:
        for new, past in ((5, 0), (1, 5), (1, 6)):
            logits = session.step(TEXT[past : past + new], past).reshape(-1).double()
            assert (logits - logits_of(model, past + new)).abs().max() < LOGIT_ERROR
            stated = cost_report(program.any_role, new, past).total
            assert session.record.total == stated


def test_the_last_layers_experts_see_the_last_token_alone() -> None:
    program = compiled("mixtral")
    prompt = {row.key: row for row in program.inspect(new=5, past=0).by_op}
    step = {row.key: row for row in program.inspect(new=1, past=4).by_op}
    assert prompt["mpc.top_k"].online == 3 * step["mpc.top_k"].online


def test_nothing_about_the_choice_is_revealed() -> None:
    """Every message of the choice is sent under a mask, and its size follows from lengths."""
    text = compiled("mixtral").audit().to_text().splitlines()
    found = [line for line in text if line.startswith("  mpc.top_k  ")]
    assert found and all("a fresh mask r that neither party knows" in line for line in found)


def test_tokens_alone() -> None:
    program = compiled("mixtral", reveal="token", speculate_up_to=3)
    with InProcessSession(program.roles) as session:
        for new, past in ((5, 0), (1, 5)):
            token = session.step(TEXT[past : past + new], past)
            assert int(token) == int(logits_of(model_of("mixtral"), past + new).argmax())


def test_padding_and_drafts_that_form_a_tree() -> None:
    """Each token chooses for itself, so a router has nothing to do with what a token sees."""
    model = model_of("mixtral")
    program = compiled("mixtral", pad_prompt=True, speculate_up_to=3)
    text, pads, tree = TEXT[:5], 2, (TEXT[5], 9, TEXT[6])
    with InProcessSession(program.roles) as session:
        session.pads = pads
        logits = session.step([program.manifest.pad_token] * pads + text, 0).double()
        assert (logits.reshape(-1) - logits_of(model, 5)).abs().max() < LOGIT_ERROR
        rows = session.rows(tree, pads + 5, Branches((), (0, 0))).double()
    wanted = (
        model(torch.tensor([[*text, tree[0], *more]]), use_cache=False).logits[0, -1]
        for more in ((), (tree[1],), (tree[2],))
    )
    for found, own in zip(rows, wanted, strict=True):
        assert (found - own).abs().max() < LOGIT_ERROR


@pytest.mark.slow
def test_drafts() -> None:
    """In three processes; several tokens of a step choose each for itself."""
    program = compiled("mixtral", speculate_up_to=3)
    answer = program.generate_local(TEXT, max_tokens=6, speculate="lookup")
    plain = program.generate_local(TEXT, max_tokens=6)
    assert answer.tokens == plain.tokens
