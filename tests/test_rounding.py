"""Whatever the size of a model's weights: the private logits are right, or the compile refuses."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch

from mergec.compiler.config import CompileConfig
from mergec.compiler.driver import compile_decoder
from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.capture import Captured, capture
from mergec.compiler.program import Program
from mergec.runtime.core.structural import target_name
from mergec.runtime.core.values import Shared
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.protocols.normalize import SCALED_FRAC, RowNorm, normalize, rounded_rows
from tests.families import VOCAB, random_decoder
from tests.session import play

PARTS = {
    "llama": {
        "embedding": "embed_tokens.weight",
        "first gain": "input_layernorm.weight",
        "second gain": "post_attention_layernorm.weight",
        "last gain": "model.norm.weight",
        "queries": "q_proj",
        "values": "v_proj",
        "out": "o_proj",
        "gate": "gate_proj",
        "up": "up_proj",
        "down": "down_proj",
        "head": "lm_head",
    },
    "gpt2": {
        "embedding": "wte",
        "positions": "wpe",
        "first gain": "ln_1.weight",
        "first bias": "ln_1.bias",
        "attention": "attn.c_attn.weight",
        "out": "attn.c_proj.weight",
        "up": "mlp.c_fc.weight",
        "up bias": "mlp.c_fc.bias",
        "down": "mlp.c_proj.weight",
        "last gain": "ln_f.weight",
    },
}
"""Tensors by family: the part of their name that tells them. GPT-2's embedding is its head, too."""

RIGHT = 0.1
"""Largest error of a logit that is right, in standard deviations of the logits of one place.

Over three times the error at which the compiler refuses: private roundings fall otherwise.
"""


def scaled(family: str, part: str = "", factor: float = 1.0) -> Any:
    """A one-layer decoder with logits that differ, and the tensors of one part times a factor."""
    tied = family == "gpt2"
    layers = {"n_layer" if tied else "num_hidden_layers": 1}
    model = random_decoder(family, tie_word_embeddings=tied, **layers).float()
    name = PARTS[family].get(part)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
            elif "bias" in key:
                parameter.normal_(std=0.1)
            if name and name in key:
                parameter.mul_(factor)
    return model


@functools.cache
def _captured(family: str) -> Captured:
    return capture(scaled(family))


def compiled(model: Any, **options: Any) -> Program:
    """The model's program. The graph is captured once for a family: only weights differ."""
    step, weights = _captured(model.config.model_type).copy(), model.state_dict()
    for name in step.constants:
        if name in weights:
            module, _, last = name.rpartition(".")
            setattr(step.graph_module.get_submodule(module), last, weights[name])
    return compile_decoder(model, config=CompileConfig(max_length=64, **options), captured=step)


def prompts(model: Any) -> list[list[int]]:
    """Prompts that are no calibration prompts, with the tokens of the most extreme rows; one of a
    single token, whose value no attention averages.
    """
    norms = model.get_input_embeddings().weight.norm(dim=1)
    largest, smallest = int(norms.argmax()), int(norms.argmin())
    return [[largest, 5, VOCAB - 9, smallest], [17, 3, largest], [smallest]]


def errors(model: Any, **options: Any) -> list[float]:
    """The largest error of each prompt's private logits, in standard deviations."""
    program = compiled(model, logit_noise=0.0, **options)
    found = []
    for ids in prompts(model):
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits[0, -1].double()
        (step,) = play(program.roles, [ids])
        got = step.logits.reshape(-1, len(wanted))[-1]
        found.append(float((got - wanted).abs().max() / wanted.std()))
    return found


def right_or_refused(model: Any, **options: Any) -> bool:
    """Whether a model compiles. If it does, its private logits are right; if not, it says where."""
    try:
        assert max(errors(model, **options)) < RIGHT
    except CompileError as refusal:
        assert "\n" not in str(refusal).partition("\n")[0]
        assert refusal.nodes
        assert all(node.meta.get("module") for node in refusal.nodes)
        return False
    return True


@pytest.mark.parametrize(
    ("family", "part", "factor"),
    [
        ("llama", "embedding", 1e-3),
        ("llama", "values", 1e-5),
        ("gpt2", "positions", 1e2),
        ("gpt2", "last gain", 10.0),
    ],
)
def test_sizes_that_compile(family: str, part: str, factor: float) -> None:
    assert max(errors(scaled(family, part, factor))) < RIGHT


@pytest.mark.parametrize(
    ("family", "part", "factor"),
    [
        ("llama", "head", 1e-6),
        ("gpt2", "last gain", 1e-6),
    ],
)
def test_other_sizes_are_right_or_refused(family: str, part: str, factor: float) -> None:
    right_or_refused(scaled(family, part, factor))


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["server", "shared"])
@pytest.mark.parametrize("factor", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 10.0, 30.0, 1e2, 1e3])
@pytest.mark.parametrize(
    ("family", "part"), [(family, part) for family, parts in PARTS.items() for part in parts]
)
def test_every_size(family: str, part: str, factor: float, weights: str) -> None:
    right_or_refused(scaled(family, part, factor), weights=weights)


def scaled_at_random(family: str, seed: int) -> Any:
    """A one-layer decoder, and a part of its tensors times 10^-6 to 10^3 each."""
    model, generator = scaled(family), random.Random(seed)
    often = generator.choice((0.1, 0.3, 0.5, 1.0))
    with torch.no_grad():
        for parameter in model.parameters():
            if generator.random() < often:
                parameter.mul_(10.0 ** generator.uniform(-6, 3))
    return model


@pytest.mark.parametrize(
    "seed",
    [seed if seed < 4 else pytest.param(seed, marks=pytest.mark.slow) for seed in range(100)],
)
@pytest.mark.parametrize("family", PARTS)
def test_sizes_at_random(family: str, seed: int) -> None:
    right_or_refused(scaled_at_random(family, seed))


def test_a_row_that_no_prompt_has() -> None:
    """Calibration knows the largest rows of the table, whatever its prompts are."""
    model = scaled("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[1] *= 300.0
    assert prompts(model)[0][0] == 1
    assert max(errors(model, calibration=((5, 17, 88),))) < RIGHT


def test_a_position_that_no_prompt_reaches() -> None:
    model = scaled("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight[50] *= 300.0
    ids = [(7 * i) % VOCAB for i in range(51)]
    program = compiled(model, calibration=((5, 17),))
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0, -1].double()
    (step,) = play(program.roles, [ids])
    error = (step.logits.reshape(-1, VOCAB)[-1] - wanted).abs().max() / wanted.std()
    assert error < RIGHT


def test_small_tables_get_more_bits_than_ordinary_ones() -> None:
    def frac(factor: float) -> int:
        program = compiled(scaled("llama", "embedding", factor))
        (lookup,) = [i for i in program.roles["client"].instructions if "embedding" in i.target]
        return lookup.frac

    assert frac(1.0) == 16
    assert frac(1e-3) > 24


def test_a_value_that_is_too_small_is_named() -> None:
    """A head of 10^-6 makes logits of 10^-6, of which 16 bits behind the point keep nothing."""
    with pytest.raises(CompileError, match="rounding to fixed point would move logits") as caught:
        compiled(scaled("llama", "head", 1e-6))
    (node,) = caught.value.nodes
    assert node.meta["module"] == "lm_head" or "reveal" in target_name(node.target)
    assert "fractional bits are too few" in str(caught.value)


@pytest.mark.parametrize(("eps", "bound"), [(1e-5, 4.0), (1e-12, 2.0**30)])
def test_norms_are_rounded_as_their_protocol_rounds(eps: float, bound: float) -> None:
    """With a large bound an eps of 10^-12 is less than a unit of the squares, and so are rows."""
    spec = RowNorm(8, 16, eps, bound)
    sizes = torch.tensor([[1e-5], [1e-4], [1e-3], [1e-2], [1.0]], dtype=torch.float64)
    rows = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = (rows * sizes * 2**16).round() / 2**16
    simulation = Simulation()
    shares = simulation.share(rows)

    def protocol(context: Any, party: int) -> Any:
        result = yield from normalize(context, shares[party].share, spec)
        return Shared(result, SCALED_FRAC)

    found = simulation.reveal(simulation.run(protocol))
    wanted = rounded_rows(rows, spec)
    # The squares are those of rows that are rounded at random, by up to a unit.
    unit = 2.0 ** (spec.square_shift - 16)
    size = rows.square().mean(-1, keepdim=True).sqrt() + unit
    assert ((found - wanted).abs() < 2**-13 * (1 + wanted.abs()) + unit / size * wanted.abs()).all()
    exact = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    assert (float((wanted - exact).abs().max()) > 1.0) == (spec.eps_units == 0)
