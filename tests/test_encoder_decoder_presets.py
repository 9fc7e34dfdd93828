"""Encoder-decoders with lossy presets: a program is what its graph computes in the clear."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mergec.compiler.backend.cost import cost_report
from mergec.compiler.backend.deviation import CONTINUED
from mergec.compiler.config import PRESETS, CompileConfig
from mergec.compiler.driver import compile_decoder
from mergec.compiler.frontend.capture import Captured, capture
from mergec.compiler.program import Program
from mergec.runtime.core.errors import BundleError
from mergec.runtime.engine.audit import audit
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.program.program import DECODE, FINISH, PROMPT
from mergec.runtime.program.validate import validate
from mergec.runtime.roles.inprocess import InProcessSession
from tests.encoder_decoders import FAMILIES as ALL
from tests.encoder_decoders import SOURCES, model_and_step, random_model
from tests.families import slow

LOSSY = tuple(name for name in PRESETS if name != "exact")
FAMILIES = ("t5", "t5_gated", "bart")
TOLERANCE = 2e-2
"""Of logits around 1, after four layers of approximate functions in fixed point."""

QUICK = (("t5", "mpcformer-2quad"), ("t5", "merge"), ("bart", "thex"), ("bart", "merge"))


def every_program(quick: tuple[tuple[str, str], ...]) -> pytest.MarkDecorator:
    """Each preset for T5 with a plain and with a gated MLP, and for BART."""
    return pytest.mark.parametrize(
        ("family", "preset"),
        [
            pytest.param(
                family, preset, marks=() if (family, preset) in quick else pytest.mark.slow
            )
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
        if role.resends:
            assert found == [None] * 3
            found = list(session.step([], 3))
            assert session.record.total == cost_report(role, 0, 3).total
    for logits, (_, row) in zip(found, wanted, strict=True):
        assert float((logits - row).abs().max()) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*ALL} - {*FAMILIES}))
def test_other_families(family: str) -> None:
    """Encoder, self-attention and cross-attention get tables, and MLPs merge with attention."""
    program = program_of(family, "merge")
    source = list(SOURCES[0])
    wanted = [row for _, row in PlainExecutor(program.roles["server"]).generate(source, 2)]
    assert "skipped" not in program.inspect(1, 9).why_not("fix_attention").verdict
    with InProcessSession(program.roles) as session:
        session.step(source, 0)
        session.step([0], len(source))
        found = session.step([], 2)
    for logits, row in zip(found, wanted, strict=True):
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


def _rolled_out(model: Any, source: list[int], steps: int) -> torch.Tensor:
    """Logits of embedding resending [steps, V], by the model's own encoder, decoder and head."""
    body = getattr(model, "model", model)
    table = body.decoder.embed_tokens
    with torch.no_grad():
        seen = body.encoder(input_ids=torch.tensor([source])).last_hidden_state
        rows = table(torch.tensor([[model.config.decoder_start_token_id]]))
        for _ in range(steps):
            hidden = body.decoder(inputs_embeds=rows, encoder_hidden_states=seen).last_hidden_state
            if getattr(model.config, "scale_decoder_outputs", False):
                hidden = hidden * model.config.d_model**-0.5
            rows = torch.cat([rows, hidden[:, -1:]], 1)
        logits = model.lm_head(rows[:, 1:])[0]
        return logits + getattr(model, "final_logits_bias", 0.0)


@pytest.mark.parametrize("family", ["t5", "bart", *slow("t5_gated")])
def test_hidden_states_are_resent(family: str) -> None:
    """The decoder's inputs after the first token are its hidden states; the encoder is as usual."""
    program = program_of(family, "merge-er")
    for source in SOURCES:
        found = torch.stack(
            [row for _, row in PlainExecutor(program.roles["server"]).generate(source, 5)]
        )
        wanted = _rolled_out(calm(family)[0], list(source), 5)
        assert float((found - wanted).abs().max()) < 1e-3


def test_phases_of_a_program_that_resends_hidden_states() -> None:
    role = program_of("t5", "merge-er").any_role
    assert role.resends and role.encodes
    prompt, decode, finish = role.phases
    assert [phase.name for phase in role.phases] == [PROMPT, DECODE, FINISH]
    assert [spec.name for spec in prompt.inputs[:2]] == ["input_ids", "decoder_input_ids"]
    entry, *caches = decode.inputs
    assert entry.shape == (1, "new", 16)
    assert sum("source" in spec.shape for spec in caches) == 4
    assert prompt.outputs == decode.outputs
    assert finish.inputs[0].name == decode.outputs[0]
    validate(role, "here")
    # A decode step that took tokens would tell them to nobody, but they are not there.
    tokens = replace(decode, inputs=(prompt.inputs[1], *caches))
    with pytest.raises(BundleError, match="the input 'decoder_input_ids' of the phase decode"):
        validate(replace(role, phases=[prompt, tokens, finish]), "here")


def test_a_pass_that_changes_nothing_is_told() -> None:
    """The MLP of the plain T5 has neither of these activations."""
    model, captured = model_and_step("t5")
    said: list[str] = []
    config = CompileConfig(max_length=40, preset="mpcformer-2relu")
    compile_decoder(model, config=config, progress=said.append, captured=captured)
    assert [line for line in said if "changes nothing" in line] == [
        f"{name} changes nothing: the model has nothing that looks like its pattern"
        for name in ("quadratic_gelu", "quadratic_silu")
    ]


def test_cross_caches_that_tables_read_are_opened_to_the_server_alone() -> None:
    """Half the bytes; and keys have no cache."""
    role = program_of("t5", "merge").any_role
    cross = [spec for spec in role.phase(DECODE).inputs if "source" in spec.shape]
    assert [spec.form for spec in cross] == ["sent"] * 2
    assert [spec.name for spec in role.inputs] == [
        "input_ids", "decoder_input_ids", "cache.0.value", "cache.1.value"
    ]  # fmt: skip


@pytest.mark.parametrize("preset", ["merge-mm", "merge"])
def test_what_merge_saves(preset: str) -> None:
    """A decode step has no scores, no softmax, and one norm less in each layer."""
    exact, lossy = (
        cost_report(program_of("t5", name).any_role, 1, 20, source=12).total
        for name in ("exact", preset)
    )
    assert lossy.rounds < exact.rounds / 1.5
    assert lossy.online < exact.online
    assert lossy.offline < exact.offline / 2


def test_inspect_and_audit() -> None:
    """What ran is listed, and so is the reason where a pass stopped short."""
    program = program_of("bart", "merge")
    text = program.inspect(1, 12, source=4).to_markdown()
    assert {*program.inspect(1, 12, source=4).lossy} == {*PRESETS["merge"]}
    assert program.deviation in text
    told = program.inspect(1, 12).why_not("merge_projections")
    assert "changed 4 sites and skipped 2" in told.to_markdown()
    assert program.inspect(0, 5).total.rounds > 0
    found = audit(program.any_role)
    assert not found.unmasked
    assert "k: tokens of an answer" in found.to_text()
    assert "of which the source has half" in found.to_text()


@pytest.mark.slow
@pytest.mark.parametrize("preset", LOSSY)
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_in_three_processes(family: str, preset: str, tmp_path: Path) -> None:
    program = Program.load(program_of(family, preset).save(tmp_path / "bundles"))
    found = program.generate_local(list(SOURCES[0]), max_tokens=5)
    assert len(found.tokens) == 5
    assert program.plaintext(found).tokens == found.tokens


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["mpcformer-2quad", "thex", "merge"])
def test_crypten_stock_protocols(preset: str) -> None:
    program = program_of("t5", preset)
    found = program.generate_local(list(SOURCES[1]), max_tokens=2, mode="crypten")
    assert program.plaintext(found).tokens == found.tokens


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["mpcformer-2quad", "merge"])
def test_shared_weights(preset: str) -> None:
    """A bias of the scores and tables that are shared, too."""
    program = program_of("t5", preset, weights="shared")
    source = list(SOURCES[0])
    wanted = [row for _, row in PlainExecutor(program.roles["server"]).generate(source, 2)]
    with InProcessSession(program.roles) as session:
        found = [session.step(source, 0)]
        found.append(session.step([int(wanted[0].argmax())], len(source)))
        if program.any_role.resends:
            found = list(session.step([], 2))
    for logits, row in zip(found, wanted, strict=True):
        assert float((logits - row).abs().max()) < TOLERANCE
