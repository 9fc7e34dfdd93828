"""What is trained is what is compiled: the student and the program, with changed weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from mergec import CompileConfig, Program, compile_decoder
from mergec.compiler.adaptation.scale import match_scale
from mergec.compiler.adaptation.student import Student
from mergec.compiler.config import PRESETS
from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.adaptation import Adaptation, write_adaptation
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.roles.inprocess import InProcessSession
from tests.families import FAMILIES, every_family, random_decoder, slow
from tests.test_more_families import example

LOSSY = tuple(name for name in PRESETS if name != "exact")
PROMPT, ANSWER = [3, 14, 15, 92, 65, 35], [9, 26]
SEQUENCES = [[3, 14, 15, 92, 65, 35, 8, 9, 26, 53], [2, 71, 82, 81]]
TOLERANCE = 1e-5
UNDER_MPC = 2e-2
"""Of logits around 1, after a layer of approximate functions in fixed point."""


def small(family: str = "gpt2", **settings: Any) -> Any:
    """A decoder of one layer, in float64."""
    layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
    return random_decoder(family, **{layers: 1, **settings})


def moved(model: Any, config: CompileConfig, texts: Any = SEQUENCES) -> Student:
    """A student all of whose parameters are others than at the start, as after some training."""
    student = Student(model, config, texts)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in student.parameters():
            change = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter += 0.1 * parameter.abs().mean() * change
    return student


@pytest.mark.parametrize("family", ["mixtral", *slow("gpt_oss")])
def test_experts_are_trained(family: str) -> None:
    """The graph reads them joined; what is trained are the model's own, which may change."""
    if family not in CONFIG_MAPPING:
        pytest.skip("this version of transformers has no such family")
    model = example.decoder(family)
    ids = torch.tensor([[*example.PROMPT, *example.ANSWER]])
    student = Student(model, CompileConfig(), [[0]])
    for _ in range(2):
        logits = student(ids).logits
        assert torch.allclose(logits, model(ids, use_cache=False).logits, atol=1e-4)
        logits[0, -1].square().sum().backward()
        with torch.no_grad():
            for name, parameter in model.model.layers[0].mlp.experts.named_parameters():
                assert parameter.grad is not None and parameter.grad.any(), name
                parameter.mul_(1.1)


NO_GAIN = ("gemma", "gemma2", "olmo")
"""Families whose last norm has no gain, or one that is not its parameter: 1 + w."""


@every_family(quick=("gpt2",))
def test_scales_match(family: str, tmp_path: Path) -> None:
    """Hidden states get the size of embeddings, logits stay, and a folder keeps both."""
    model = random_decoder(family)
    before = Student(copy.deepcopy(model), CompileConfig(), [[0]])
    if family in NO_GAIN:
        with pytest.raises(CompileError, match=r"; leave out match_scale"):
            match_scale(model, before, SEQUENCES)
        return
    ids = torch.tensor([SEQUENCES[0]])
    factor = match_scale(model, before, SEQUENCES[:1])
    assert not 0.9 < factor < 1.1
    with torch.no_grad():
        wanted = before(ids)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    for one in (model, loaded):
        with torch.no_grad():
            found = Student(one, CompileConfig(), [[0]])(ids)
        assert torch.allclose(found.logits, wanted.logits, atol=TOLERANCE)
        assert torch.allclose(found.hidden, factor * wanted.hidden, atol=TOLERANCE)
        size = found.hidden[:, :-1].square().mean() / before.embed(ids)[:, 1:].square().mean()
        assert float(size.detach()) == pytest.approx(1, rel=1e-4)


def test_scales_that_do_not_match(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm whose shift is not scaled gives other logits."""
    model = small()
    before = Student(copy.deepcopy(model), CompileConfig(), [[0]])
    monkeypatch.setattr(type(before), "last_norm", lambda _: ["transformer.ln_f.weight"])
    with torch.no_grad():
        before.model.transformer.ln_f.bias.add_(1.0)
        model.transformer.ln_f.bias.add_(1.0)
    with pytest.raises(CompileError, match=r"changes logits; leave out match_scale"):
        match_scale(model, before, SEQUENCES)


def answers(student: Student) -> torch.Tensor:
    """The logits after the prompt and after each token of a given answer."""
    text = torch.tensor([PROMPT + ANSWER])
    with torch.no_grad():
        if not student.resends:
            return student(text).logits[0, len(PROMPT) - 1 :]
        rows = student.embed(text)
        for place in range(len(PROMPT), text.shape[1]):
            rows[:, place] = student(text, rows).hidden[:, place - 1]
        return student(text, rows).logits[0, len(PROMPT) - 1 :]


def compiled(model: Any, student: Student, config: CompileConfig, folder: Path) -> Program:
    folder.mkdir(exist_ok=True)
    write_adaptation(folder, Adaptation(config.preset, config.enable, student.trained()))
    return compile_decoder(
        model, config=CompileConfig(max_length=32, logit_noise=0.0, adapted=str(folder))
    )


def said(program: Program) -> torch.Tensor:
    tokens = iter(ANSWER)
    plain = PlainExecutor(program.roles["server"])
    return torch.stack([row for _, row in plain.generate(PROMPT, 3, lambda _: next(tokens, 0))])


SOME = ("gpt2", "llama")
OTHERS = [f for f in FAMILIES if f not in SOME]


@pytest.mark.parametrize(
    ("family", "preset"),
    [
        *(pytest.param(f, p, marks=pytest.mark.slow) for f in SOME for p in LOSSY),
        *(pytest.param(f, p, marks=pytest.mark.slow) for f in OTHERS for p in ("merge-mm", "thex")),
    ],
)
def test_the_program_computes_what_the_student_does(
    family: str, preset: str, tmp_path: Path
) -> None:
    _compare(random_decoder(family), preset, tmp_path)


@pytest.mark.parametrize(("family", "preset"), [("gpt2", "merge"), ("llama", "thex")])
def test_of_one_layer(family: str, preset: str, tmp_path: Path) -> None:
    _compare(small(family), preset, tmp_path)


def _compare(model: Any, preset: str, folder: Path) -> None:
    config = CompileConfig(preset=preset)
    before = {name: value.clone() for name, value in model.named_parameters()}
    student = moved(model, config)
    assert any(not torch.equal(v, before[n]) for n, v in model.named_parameters())
    program = compiled(model, student, config, folder)
    assert program.manifest.lossy
    wanted, found = answers(student), said(program)
    assert wanted.shape == found.shape
    assert float((wanted - found).abs().max()) < TOLERANCE


def test_under_mpc(tmp_path: Path) -> None:
    """With a pass beyond the preset: the quadratic activation of MERGE."""
    config = CompileConfig(preset="merge", enable=("quadratic_gelu",))
    model = small().float()
    student = moved(model, config)
    program = compiled(model, student, config, tmp_path)
    ran = {entry["pass"]: entry["sites"] for entry in program.manifest.passes}
    assert ran["quadratic_gelu"] == ran["fix_attention"] == ran["merge_projections"] == 1
    wanted = answers(student)
    with InProcessSession(program.roles) as session:
        for ids, past in ((PROMPT, 0), ([0], 6), ([0], 7)):
            session.step(ids, past)
        found = session.step([], 3)
    assert float((found - wanted).abs().max()) < UNDER_MPC


def test_the_student_starts_as_the_model_for_exact_passes() -> None:
    model = small("llama")
    ids = torch.tensor([SEQUENCES[0], SEQUENCES[0][::-1]])
    student = Student(model, CompileConfig(), SEQUENCES)
    with torch.no_grad():
        assert float((student(ids).logits - model(ids).logits).abs().max()) < 1e-6
    assert student.constants == []
    assert len(student(ids).streams) == 2


def test_every_parameter_gets_a_gradient() -> None:
    student = Student(small(), CompileConfig(preset="merge"), SEQUENCES)
    ids = torch.tensor([SEQUENCES[0]])
    student(ids, student.embed(ids)).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert len(student.constants) == 3
    tables = [value for name, value in student.trained().items() if name.endswith(".table")]
    assert [tuple(table.shape) for table in tables] == [(4, 10, 10)]
    assert all(torch.equal(table, table.tril()) for table in tables)
    # They start from the mean attention, whose rows sum to one, less what masked entries keep.
    assert all(float((table.sum(-1) - 1).abs().max()) < 1e-4 for table in tables)


@pytest.mark.parametrize("preset", ["merge-er", pytest.param("merge-mm", marks=pytest.mark.slow)])
def test_it_answers_as_the_program_does(preset: str, tmp_path: Path) -> None:
    """Prompts of different lengths side by side, each as if it were alone."""
    model, config = small(), CompileConfig(preset=preset)
    student = moved(model, config)
    program = compiled(model, student, config, tmp_path)
    prompts = [PROMPT, [7], [81, 4, 4]]
    plain = PlainExecutor(program.roles["server"])
    wanted = [[token for token, _ in plain.generate(prompt, 4)] for prompt in prompts]
    assert student.generate(prompts, 4) == wanted


def test_another_model_has_no_place_for_the_constants(tmp_path: Path) -> None:
    config = CompileConfig(preset="merge-mm")
    student = Student(small(), config, SEQUENCES)
    with pytest.raises(CompileError, match=r"holds transformer.h.0.attn.table, for which this mo"):
        compiled(small("llama"), student, config, tmp_path)
    with pytest.raises(CompileError, match=r"attn.table has the shape 4x10x10 instead of 2xnxn"):
        compiled(small(n_head=2), student, config, tmp_path)


def test_options_that_contradict_the_folder(tmp_path: Path) -> None:
    write_adaptation(tmp_path, Adaptation("merge-mm"))
    model = small()
    for options, reason in (
        ({"preset": "thex"}, "was adapted for the preset 'merge-mm', not for 'thex'"),
        ({"disable": ("fix_attention",)}, "was trained for the pass 'fix_attention'"),
    ):
        config = CompileConfig(adapted=str(tmp_path), **options)
        with pytest.raises(CompileError, match=reason):
            compile_decoder(model, config=config)
    with pytest.raises(CompileError, match=r"holds no adapted model; make one with `mergec adapt`"):
        compile_decoder(model, config=CompileConfig(adapted=str(tmp_path / "elsewhere")))


def test_damaged_folders(tmp_path: Path) -> None:
    write_adaptation(tmp_path, Adaptation("merge-mm", constants={"a.table": torch.ones(1, 2, 2)}))
    model, config = small(), CompileConfig(adapted=str(tmp_path))
    settings = tmp_path / "mergec_adaptation.json"
    whole = settings.read_text()
    for text, reason in (
        (whole.replace('"merge-mm"', '"fast"'), "is damaged"),
        (whole.replace('"format": 1', '"format": 2'), "has the format 2"),
        (whole.replace('"calibration": []', '"calibration": [["a"]]'), "is damaged"),
        ("{", "is not JSON"),
    ):
        settings.write_text(text)
        with pytest.raises(CompileError, match=reason):
            compile_decoder(model, config=config)
    settings.write_text(whole)
    write_adaptation(tmp_path, Adaptation("thex", constants={"a": torch.tensor([torch.nan])}))
    with pytest.raises(CompileError, match=r"a is NaN or infinite"):
        compile_decoder(model, config=config)
    (tmp_path / "mergec_adaptation.safetensors").write_bytes(b"cut")
    with pytest.raises(CompileError, match=r"cannot be read"):
        compile_decoder(model, config=config)
