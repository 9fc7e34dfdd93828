"""Decoders with attention sinks: granite_swa, flint, and the attention of gpt_oss."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from mergec.compiler.backend.cost import cost_report
from mergec.compiler.config import CompileConfig
from mergec.compiler.driver import compile_decoder
from mergec.compiler.errors import CompileError
from mergec.compiler.program import Program
from mergec.runtime.engine.plan import Plan
from mergec.runtime.ops.attention import Attention
from mergec.runtime.program.bundle import GRAPH
from mergec.runtime.roles.inprocess import InProcessSession
from tests.families import OPTIONS, slow, tokens

WINDOW = 6
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "layer_types": ["full_attention", "sliding_attention"],
    "sliding_window": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "granite_swa": {},
    "flint": {"num_experts": 0},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1},
}
every_family = pytest.mark.parametrize("family", SETTINGS)

ERROR = 2e-2
"""Error of the tiny decoders' logits under MPC, with a reserve."""

TEXT = tokens(10, seed=3)[0].tolist()


class Dense(nn.Module):
    """An MLP in place of the experts of gpt_oss, which are tested in test_experts.py."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.down(nn.functional.silu(self.up(x))), None


@functools.cache
def decoder(family: str) -> Any:
    """Weights are large enough for logits that differ, and sinks for what they take to show."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    if family not in CONFIG_MAPPING:
        pytest.skip("this version of transformers has no such family")
    config = AutoConfig.for_model(family, **SIZES, **SETTINGS[family])
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    if family == "gpt_oss":
        for layer in model.model.layers:
            layer.mlp = Dense()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.copy_(torch.randn_like(parameter) + 1.0)
            elif parameter.dim() > 1 and "mlp.up" not in name and "mlp.down" not in name:
                parameter.mul_(8.0)
    return model


@functools.cache
def compiled(family: str, **options: Any) -> Program:
    config = CompileConfig(**{"max_length": 64, "logit_noise": 0.0, **options})
    return compile_decoder(decoder(family), config=config)


def expected(model: nn.Module, text: Sequence[int]) -> torch.Tensor:
    """The model's own logits of the last token."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([list(text)])).logits[0, -1]
    return logits.double()


def sinks_of(program: Program) -> list[Any]:
    """What each attention has as its sink."""
    calls = [i for i in program.any_role.instructions if i.target == "mpc.attention"]
    assert len(calls) == SIZES["num_hidden_layers"]
    return [call.args[10] for call in calls if len(call.args) > 10]


@every_family
def test_each_attention_has_a_sink(family: str) -> None:
    program = compiled(family)
    assert len(sinks_of(program)) == 2
    targets = {item.target for item in program.any_role.instructions}
    assert not targets & {"mpc.softmax", "mpc.log", "mpc.sigmoid", "mpc.exp"}


def test_without_its_sinks_a_model_has_other_logits() -> None:
    """So the comparisons below see whether a sink takes its part."""
    without = decoder.__wrapped__("granite_swa")
    with torch.no_grad():
        for layer in without.model.layers:
            layer.self_attn.sinks.fill_(-1e4)
    own, other = (expected(model, TEXT) for model in (decoder("granite_swa"), without))
    assert (own - other).abs().max() > 10 * ERROR


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("granite_swa", "loopback"),
        ("granite_swa", "wan"),
        ("flint", "loopback"),
        ("gpt_oss", "lan"),
        *(
            pytest.param(family, options, marks=pytest.mark.slow)
            for family, options in (
                ("granite_swa", "lan"),
                ("granite_swa", "exact"),
                ("granite_swa", "shared"),
                ("flint", "wan"),
                ("gpt_oss", "wan"),
            )
        ),
    ],
)
def test_steps_have_the_models_logits_at_the_predicted_cost(family: str, options: str) -> None:
    """A prompt within the window and beyond it, and a token after each."""
    model, program = decoder(family), compiled(family, **OPTIONS[options])
    with InProcessSession(program.roles) as session:
        for length in (3, 9):
            for new, past in ((TEXT[:length], 0), (TEXT[length : length + 1], length)):
                logits = session.step(new, past).reshape(-1).double()
                wanted = expected(model, TEXT[: past + len(new)])
                assert (logits - wanted).abs().max() < ERROR
                stated = cost_report(program.any_role, len(new), past).total
                assert session.record.total == stated


@pytest.mark.parametrize("family", ["granite_swa", *slow("flint", "gpt_oss")])
def test_greedy_tokens_are_those_of_transformers(family: str) -> None:
    """In three processes, with a prompt that is longer than the window."""
    prompt = TEXT[:9]
    answer = compiled(family).generate_local(prompt, max_tokens=4)
    with torch.no_grad():
        whole = decoder(family).generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)
    assert answer.tokens == whole[0, len(prompt) :].tolist()


def test_padded_prompts() -> None:
    """Padding is hidden from keys; what all keys of a row are hidden from is left to the sink."""
    model, program = decoder("granite_swa"), compiled("granite_swa", pad_prompt=True)
    assert len(sinks_of(program)) == 2
    costs = []
    with InProcessSession(program.roles) as session:
        for pads in (5, 0):
            session.pads = pads
            fed = [*[program.manifest.pad_token] * pads, *TEXT[: 8 - pads]]
            for new, past in ((fed, 0), ([41], 8)):
                logits = session.step(new, past).reshape(-1).double()
                text = [*fed[pads:], *(new if past else [])]
                assert (logits - expected(model, text)).abs().max() < ERROR
                costs.append(session.record)
    assert costs[:2] == costs[2:]


@pytest.mark.slow
def test_stock_protocols_run_it(tmp_path: Path) -> None:
    program = compiled("granite_swa")
    program.save(tmp_path / "bundles")
    prompt = TEXT[:3]
    answer = program.generate_local(prompt, max_tokens=1, mode="crypten")
    logits = expected(decoder("granite_swa"), prompt)
    # CrypTen's approximations are coarse: its token is one of the best.
    assert logits.max() - logits[answer.tokens[0]] < 0.1 * (logits.max() - logits.min())


def test_the_graph_of_a_bundle_has_the_sink(tmp_path: Path) -> None:
    program = compiled("granite_swa")
    program.save(tmp_path / "bundles")
    for role in ("client", "server", "dealer"):
        file = tmp_path / "bundles" / role / GRAPH
        onnx.checker.check_model(str(file))
        graph = onnx.load(str(file), load_external_data=False).graph
        attentions = [node for node in graph.node if node.op_type == "attention"]
        assert len(attentions) == 2
        names = {ref.name for ref in sinks_of(program)}
        assert {node.input[-1] for node in attentions} == names
        held = {item.name for item in graph.initializer}
        assert any(name.endswith("sinks") for name in held) == (role == "server")


def test_the_audit_finds_no_message_of_the_sink() -> None:
    """Of a decode step both layers open the weights of all keys, 8 sums, a denominator and the 7
    columns of its reciprocal, or 10 with coarse slots, for each of 4 heads. A sink has no weight
    that is opened, and its score has a mask of its own."""
    text = compiled("granite_swa").audit().to_text().splitlines()
    found = [line for line in text if line.startswith("  mpc.attention  ")]
    assert found and all("a fresh mask r that neither party knows" in line for line in found)
    (words,) = [line for line in found if "x + r mod 2^64" in line]
    keys = 9
    steps = Plan(compiled("granite_swa").any_role).steps
    ways = [str(step.argument("shift")) for step in steps if step.op is Attention]
    columns = [10 if way.endswith("-coarse") else 7 for way in ways]
    assert words.endswith(f" {sum(4 * (keys + 8 + 1 + each) for each in columns)} at {keys}")


def test_squares_do_not_take_its_place() -> None:
    program = compiled("granite_swa", preset="mpcformer-2quad")
    assert len(sinks_of(program)) == 2
    (row,) = [row for row in program.inspect().passes if row.name == "softmax_2quad"]
    assert [skip["reason"].startswith("it has a sink") for skip in row.skips] == [True, True]


def test_a_sink_too_far_from_the_scores_is_refused() -> None:
    model = decoder.__wrapped__("granite_swa")
    with torch.no_grad():
        model.model.layers[1].self_attn.sinks.fill_(-5e4)
    with pytest.raises(CompileError, match=r"(?s)scores of a row are 5e\+04 apart"):
        compile_decoder(model, config=CompileConfig(max_length=64))
