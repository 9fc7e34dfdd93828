"""Encoder-decoders with lossy presets: the program is what the lossy graph computes in the clear."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from mergec.compiler.backend.cost import cost_report
from mergec.compiler.backend.deviation import CONTINUED
from mergec.compiler.config import CompileConfig
from mergec.compiler.driver import compile_decoder
from mergec.compiler.frontend.capture import Captured, capture
from mergec.compiler.program import Program
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.roles.inprocess import InProcessSession
from tests.encoder_decoders import SOURCES, model_and_step, random_model

LOSSY = ("mpcformer-2quad", "mpcformer-2relu", "thex")
FAMILIES = ("t5", "t5_gated", "bart")
TOLERANCE = 2e-2
"""Of logits around 1, after four layers of approximate functions in fixed point."""

QUICK = (("t5", "mpcformer-2quad"), ("bart", "thex"))


def every_program(quick: tuple[tuple[str, str], ...]) -> pytest.MarkDecorator:
    """Each preset for T5 with a plain and with a gated MLP, and for BART."""
    return pytest.mark.parametrize(
        ("family", "preset"),
        [
            pytest.param(family, preset, marks=() if (family, preset) in quick else pytest.mark.slow)
            for family in FAMILIES
            for preset in LOSSY
        ],
    )


@functools.cache
def calm(family: str) -> tuple[Any, Captured]:
    """A model that stays bounded without norms: a gated MLP squares what is large."""
    if family != "t5_gated":
        return model_and_step(family)
    model = random_model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 0.4
    return model, capture(model)


@functools.cache
def program_of(family: str, preset: str, **options: Any) -> Program:
    model, captured = calm(family)
    config = CompileConfig(max_length=40, logit_noise=0.0, preset=preset, **options)
    return compile_decoder(model, config=config, captured=captured)


@every_program(QUICK)
def test_private_logits_are_those_of_the_lossy_program(family: str, preset: str) -> None:
    """At the cost that is predicted, step by step."""
    program = program_of(family, preset)
    role = program.any_role
    assert program.manifest.lossy
    source = list(SOURCES[0])
    wanted = list(PlainExecutor(program.roles["server"]).generate(source, 3))
    feeds = [source, *([token] for token, _ in wanted[:-1])]
    with InProcessSession(program.roles) as session:
        past, found = 0, []
        for fed in feeds:
            found.append(session.step(fed, past))
            given = len(source) if past else None
            stated = cost_report(role, len(fed), past, source=given).total
            assert session.record.total == stated
            past += len(fed)
    for logits, (_, row) in zip(found, wanted, strict=True):
        assert float((logits - row).abs().max()) < TOLERANCE


def test_squares_take_a_bias_of_the_servers() -> None:
    """Those of T5's self-attention, in encoder and decoder; cross-attention has none."""
    instructions = program_of("t5", "mpcformer-2quad").any_role.instructions
    found = [item for item in instructions if item.target == "mpc.ratio_attention"]
    assert len(found) == 6
    assert sum(len(item.args) > 8 and item.args[8] is not None for item in found) == 4
    assert not [item for item in instructions if item.target == "mpc.attention"]


def test_the_distance_from_the_model_is_measured() -> None:
    """By hand: the model's logits at the places of the program's own answer."""
    model, captured = model_and_step("t5")
    prompts = ((0, 3, 14, 15, 92, 65, 35, 9), (0, 2, 71))
    program = program_of("t5", "mpcformer-2quad", calibration=prompts)
    plain = PlainExecutor(program.roles["server"])
    apart, agreed = [], 0
    for source in (prompts[0][:-CONTINUED], prompts[1][:1]):
        answer = [captured.start]
        for token, found in list(plain.generate(source, CONTINUED)):
            with torch.no_grad():
                ids, begun = torch.tensor([source]), torch.tensor([answer])
                wanted = model(input_ids=ids, decoder_input_ids=begun).logits[0, -1]
            apart.append(float((found - wanted).abs().max()))
            agreed += int(wanted.argmax()) == token
            answer.append(token)
    said = program.manifest.deviation
    assert said["worst"] == pytest.approx(max(apart), rel=1e-3)
    assert (said["agreed"], said["places"]) == (agreed, 2 * CONTINUED)
    assert f"at {agreed} of 8 places" in program.deviation
    assert program.deviation in program.inspect(1, 12, source=4).to_markdown()
