"""Every preset compiles every family, and its cost is as predicted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergec import CompileConfig, Program, compile_decoder
from mergec.compiler.backend.cost import cost_report
from mergec.compiler.backend.deviation import CONTINUED
from mergec.compiler.backend.legalize import legalize
from mergec.compiler.config import PRESETS
from mergec.compiler.errors import CompileError
from mergec.compiler.pipeline import rewrite, to_dialect
from mergec.passes import available
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.roles.inprocess import InProcessSession
from tests.families import captured, every_family, float_decoder, slow
from tests.session import compiled as compiled_with
from tests.test_end_to_end import check

LOSSY = tuple(name for name in PRESETS if name != "exact")
PROMPT, ANSWER = [3, 14, 15, 92, 65, 35], [9, 26]
TOLERANCE = 2e-2
"""Of logits around 1, after two layers of approximate functions in fixed point."""


def compiled(family: str, preset: str) -> Program:
    return compiled_with(family, preset=preset)[1]


def test_presets_name_lossy_passes() -> None:
    for name, passes in PRESETS.items():
        assert all(not available()[p].exact for p in passes)
        assert bool(passes) == (name != "exact")
    asked = {p for passes in PRESETS.values() for p in passes}
    assert asked == {name for name, kind in available().items() if not kind.exact}


def test_an_unknown_preset_lists_the_valid_ones() -> None:
    with pytest.raises(CompileError, match=f"unknown preset 'fast'; .*{', '.join(PRESETS)}"):
        CompileConfig(preset="fast")


every_preset = pytest.mark.parametrize(
    "preset",
    # Those that are not slow have all passes between them.
    [p if p in ("mpcformer-2quad", "thex", "merge") else slow(p)[0] for p in LOSSY],
)

FEW = ("gpt2", "llama", "gemma2")
"""Families with different attention, norms and activations; the others are slow tests."""


@every_family(FEW)
@every_preset
def test_every_family(family: str, preset: str) -> None:
    config = CompileConfig(max_length=64, preset=preset)
    step = captured(family)
    dialect = to_dialect(step, config)
    reports = dialect.pass_report
    legalize(dialect.graph_module, config.fractional_bits)
    sites = {report.name: report.sites for report in reports}
    assert any(sites[name] for name in PRESETS[preset])


@pytest.mark.parametrize("family", ["gpt2", *slow("llama")])
@every_preset
def test_the_price_is_the_predicted_one(family: str, preset: str) -> None:
    program = compiled(family, preset)
    assert program.manifest.lossy
    assert "lossy" in program.describe()
    assert program.deviation in program.inspect(1, 6).to_markdown()
    plain = PlainExecutor(program.roles["server"])
    tokens = iter(ANSWER)
    expected = [row for _, row in plain.generate(PROMPT, 3, lambda _: next(tokens, 0))]
    steps = [(PROMPT, 0), *(([token], 6 + i) for i, token in enumerate(ANSWER))]
    with InProcessSession(program.roles) as session:
        found = []
        for ids, past in steps:
            found.append(session.step(ids, past))
            assert session.record.total == cost_report(program.any_role, len(ids), past).total
        if program.any_role.resends:
            assert found == [None] * 3
            found = list(session.step([], 3))
            assert session.record.total == cost_report(program.any_role, 0, 3).total
    for logits, wanted in zip(found, expected, strict=True):
        assert float((logits - wanted).abs().max()) < TOLERANCE


def test_how_far_a_lossy_program_is_from_its_model_is_measured() -> None:
    """The same by hand: the model's own logits after the text that the program generated."""
    model, step = float_decoder("llama")
    prompts = ((3, 14, 15, 92, 65, 35), (2, 71, 82, 81))
    for preset in ("merge-er", "mpcformer-2quad"):
        config = CompileConfig(max_length=64, preset=preset, calibration=prompts, name="mine")
        program = compile_decoder(model, config=config, captured=step)
        plain = PlainExecutor(program.roles["server"])
        apart, agreed = [], 0
        for given in (prompts[0][:-CONTINUED], prompts[1][:1]):
            text = list(given)
            for token, found in list(plain.generate(given, CONTINUED)):
                with torch.no_grad():
                    wanted = model(torch.tensor([text])).logits[0, -1]
                apart.append(float((found - wanted).abs().max()))
                agreed += int(wanted.argmax()) == token
                text.append(token)
        said = program.manifest.deviation
        assert program.manifest.model == "mine"
        assert said["worst"] == pytest.approx(max(apart), rel=1e-4)
        assert (said["agreed"], said["places"]) == (agreed, 2 * CONTINUED)
        assert 0 < said["mean"] < said["worst"]
        assert f"at {agreed} of 8 places" in program.deviation


def test_an_exact_program_deviates_from_nothing() -> None:
    assert compiled("llama", "exact").manifest.deviation == {}
    assert compiled("llama", "exact").deviation == ""


def test_what_a_lossy_program_saves() -> None:
    """Rounds, or dealt bytes; 2ReLU saves neither, as its quotient takes longer than a softmax."""
    exact = cost_report(compiled("llama", "exact").any_role, 1, 32).total
    for preset in LOSSY:
        lossy = cost_report(compiled("llama", preset).any_role, 1, 32).total
        assert (lossy.rounds < exact.rounds) == (not preset.startswith("mpcformer"))
        if preset == "mpcformer-2quad":
            assert lossy.offline < exact.offline


@pytest.mark.slow
@pytest.mark.parametrize("preset", LOSSY)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_in_three_processes(family: str, preset: str, tmp_path: Path) -> None:
    compiled(family, preset).save(tmp_path / "bundles")
    program = Program.load(tmp_path / "bundles")
    check(program, prompt=PROMPT)
    assert set(program.inspect(1, 16).lossy) <= set(PRESETS[preset])
    assert program.inspect(1, 16).lossy


def test_a_saved_program_is_as_lossy(tmp_path: Path) -> None:
    made = compiled("gpt2", "mpcformer-2quad")
    made.save(tmp_path / "bundles")
    program = Program.load(tmp_path / "bundles")
    assert program.manifest.lossy and program.deviation == made.deviation
    assert {*made.inspect(1, 16).lossy} == {*program.inspect(1, 16).lossy}
    assert 0 < len(program.inspect(1, 16).lossy) <= len(PRESETS["mpcformer-2quad"])
    ((_, wanted),) = PlainExecutor(made.roles["server"]).generate(PROMPT, 1)
    with InProcessSession(program.roles) as session:
        found = session.step(PROMPT, 0)
    assert float((found - wanted).abs().max()) < TOLERANCE


def test_a_pass_of_its_own() -> None:
    """`enable` runs a pass that need not be in any preset."""
    step = captured("llama")
    reports = rewrite(step, CompileConfig(enable=("quadratic_silu",)))
    found = {report.name: report for report in reports}
    assert found["quadratic_silu"].sites == 2
    assert "softmax_2quad" not in found
    with pytest.raises(CompileError, match=r"unknown pass 'quad'; there are: .*quadratic_gelu"):
        rewrite(captured("llama"), CompileConfig(enable=("quad",)))


def test_calibration_by_the_user_decides() -> None:
    config = CompileConfig(max_length=64, enable=("simplify_norms",), calibration=((1, 2, 3),))
    gains = []
    for used in (config, CompileConfig(max_length=64, enable=("simplify_norms",))):
        step = captured("llama")
        rewrite(step, used)
        tensors = step.tensors()
        gains.append(torch.cat([t for name, (t, _) in tensors.items() if name.endswith(".gain")]))
    assert gains[0].shape == gains[1].shape
    assert not torch.equal(gains[0], gains[1])
