"""The whole way: train a tiny model, save it, and compile the folder."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import mergec
from mergec import AdaptConfig, CompileConfig
from mergec.compiler.adaptation import run, train
from mergec.compiler.adaptation.data import Encoded
from mergec.compiler.adaptation.losses import Batch, collate, losses
from mergec.compiler.adaptation.student import Student
from mergec.compiler.driver import compile_source
from mergec.compiler.errors import CompileError, InternalError
from mergec.runtime.engine.plain import PlainExecutor
from tests.adaptation import counting
from tests.families import random_decoder

VOCAB = 97
SHORT: dict[str, Any] = {
    **counting.SHORT,
    "answer": 2,
    "learning_rate": 1e-3,
    "noise": 0.01,
    "dropout": 0.0,
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return counting.write_counting(tmp_path)


@pytest.fixture(scope="module")
def model() -> Any:
    return random_decoder("gpt2", n_layer=1).float()


def config(preset: str, **changes: Any) -> AdaptConfig:
    return AdaptConfig(preset=preset, **{**SHORT, **changes})


def test_from_the_model_to_the_program(model: Any, data: Path, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    said: list[str] = []
    folder = tmp_path / "adapted"
    report = mergec.adapt(model, data, folder, config("merge"), progress=said.append)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [row["name"] for row in report.rows] == [
        "the model",
        "merge, untrained",
        "merge, adapted",
    ]
    assert report.rows[0]["agreement"] == 1
    assert any(line.startswith("step 1 of 4: loss") and "cosine distance" in line for line in said)
    assert any("validation agreement" in line for line in said)
    assert {"report.md", "report.json", "config.json", "model.safetensors"} <= {
        file.name for file in folder.iterdir()
    }
    assert not {run.RUN, run.CHECKPOINTS} & {file.name for file in folder.iterdir()}
    whole = json.loads((folder / "report.json").read_text())
    assert whole["settings"]["preset"] == "merge"
    assert whole["cost"]["decode"]["rounds"] > 0
    assert whole["same answers"] == report.same == SHORT["samples"]
    assert [len(answer) for answer in whole["rows"][2]["answers"]] == [2, 2]
    assert [entry["step"] for entry in whole["history"] if "eval_loss" in entry] == [2, 4]

    program = compile_source(folder, {"max_length": 16, "logit_noise": 0.0})
    assert program.manifest.deviation == report.deviation
    assert program.any_role.resends
    passes = {entry["pass"]: entry["sites"] for entry in program.manifest.passes}
    assert passes["fix_attention"] == passes["merge_projections"] == 1
    plain = list(PlainExecutor(program.roles["server"]).generate([3, 4], 3))
    assert len(plain) == 3

    for options, reason in (
        ({"preset": "thex"}, "was adapted for the preset 'merge', not for 'thex'"),
        ({"preset": "exact"}, "was adapted for the preset 'merge', and its weights fit no other"),
    ):
        with pytest.raises(CompileError, match=reason):
            compile_source(folder, options)
    with pytest.raises(CompileError, match=r"holds an adapted model; choose another folder"):
        mergec.adapt(model, data, folder, config("merge"))
    with pytest.raises(CompileError, match=r"already is adapted, for the preset 'merge'"):
        mergec.adapt(folder, data, tmp_path / "again", config("thex"))


@pytest.mark.slow
def test_scales_are_matched_before_the_training(
    model: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student begins with the same logits, and ends as a program like any other."""
    said: list[str] = []
    asked = config("merge-er", match_scale=True)
    report = mergec.adapt(model, data, tmp_path / "adapted", asked, progress=said.append)
    (line,) = [line for line in said if line.startswith("hidden states are scaled by ")]
    assert 0 < float(line.split()[-1]) < 0.5
    assert report.rows[1]["perplexity"] == pytest.approx(report.rows[0]["perplexity"], rel=1e-4)
    assert report.same == SHORT["samples"]
    assert not json.loads((tmp_path / "adapted/config.json").read_text())["tie_word_embeddings"]
    with pytest.raises(CompileError, match=r"is for presets that resend hidden states"):
        mergec.adapt(model, data, tmp_path / "mm", config("merge-mm", match_scale=True))


@pytest.mark.slow
def test_an_interrupted_run_continues(
    model: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the very weights that a run without interruption ends with."""
    monkeypatch.setattr(run._StudentRun, "_compile", lambda *_: None)
    asked = config("merge-mm", noise=0.0)
    whole = mergec.adapt(model, data, tmp_path / "whole", asked)
    folder = tmp_path / "cut"

    def stop(line: str) -> None:
        if line.startswith("step 3 of 4: loss"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mergec.adapt(model, data, folder, asked, progress=stop)
    assert (folder / run.RUN).is_file()
    with pytest.raises(CompileError, match=r"interrupted run with another steps \(4, not 5\)"):
        mergec.adapt(model, data, folder, config("merge-mm", noise=0.0, steps=5))
    said: list[str] = []
    again = mergec.adapt(model, data, folder, asked, progress=said.append)
    assert "continuing an interrupted run" in said
    assert not any(line.startswith("step 1 of") for line in said)
    assert again.rows[1:] == whole.rows[1:]
    for name in ("mergec_adaptation.safetensors", "model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_training_in_bfloat16(model: Any, data: Path, tmp_path: Path) -> None:
    """Products alone: the weights are float32, and the program is the student that was measured."""
    asked = {"noise": 0.0, "match_scale": True, "resent": 1}
    found = {}
    for bf16 in (False, True):
        folder = tmp_path / f"bf16-{bf16}"
        report = mergec.adapt(model, data, folder, config("merge", bf16=bf16, **asked))
        assert report.same == SHORT["samples"]
        assert report.rows[1]["perplexity"] == pytest.approx(97, rel=0.2)
        found[bf16] = load_file(folder / "model.safetensors")
    assert {value.dtype for value in found[True].values()} == {torch.float32}
    name = "transformer.h.0.mlp.c_fc.weight"
    start = model.state_dict()[name]
    full, coarse = found[False][name] - start, found[True][name] - start
    assert not torch.equal(full, coarse)
    near = torch.cosine_similarity(full.flatten(), coarse.flatten(), dim=0)
    assert float(near) > 0.9


def test_a_training_that_diverges(
    model: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends there; weights that are no numbers are not saved as a model."""
    found = train.losses

    def diverging(student: Student, *arguments: Any, **options: Any) -> Any:
        with torch.no_grad():
            next(student.parameters()).fill_(torch.inf)
        return found(student, *arguments, **options)

    monkeypatch.setattr(train, "losses", diverging)
    with pytest.raises(CompileError, match=r"no longer finite at step 1; .* smaller learning_rate"):
        mergec.adapt(model, data, tmp_path / "out", config("merge-mm"))
    assert not (tmp_path / "out/model.safetensors").exists()


def test_parameters_that_stay(model: Any, data: Path, tmp_path: Path) -> None:
    """All others are trained."""
    asked = config("merge-mm", freeze=("*.wte.*", "*.mlp.c_fc.weight"))
    mergec.adapt(model, data, tmp_path / "out", asked)
    found, before = load_file(tmp_path / "out/model.safetensors"), model.state_dict()
    same = {name for name, value in found.items() if torch.equal(value, before[name])}
    assert {"transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"} <= same
    assert not {name for name in same if "c_proj" in name or name.endswith("c_fc.bias")}
    nothing = config("merge-mm", freeze=("*.up_proj.*",))
    with pytest.raises(
        CompileError, match=r"no parameter of the model matches freeze='\*\.up_proj"
    ):
        mergec.adapt(model, data, tmp_path / "none", nothing)


def test_results_keep_the_dtype_of_weights(model: Any) -> None:
    """Also under autocast, whose products are bfloat16, so that losses are not."""
    student = Student(model, CompileConfig(preset="merge-er"), [[1, 2]])
    ids = torch.tensor([TEXTS[0].tokens])
    exact = student(ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = student(ids)
    assert found.logits.dtype == found.hidden.dtype == torch.float32
    assert 0 < float((found.logits - exact.logits).detach().abs().max() / exact.logits.std()) < 0.1


def test_a_lookup_gets_the_gradient_of_its_rows(model: Any) -> None:
    """And not one of the whole table for each text, which no batch of a real model has room for."""
    student = Student(model, CompileConfig(preset="merge-mm"), [list(range(8))])
    texts = torch.tensor([text.tokens for text in TEXTS])
    weights = model.transformer.wte.weight
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            sizes.extend(r.numel() for r in (result,) if isinstance(r, torch.Tensor))
            return result

    with Sizes():
        student(texts).logits.square().mean().backward()
    assert weights.grad is not None
    assert max(sizes) < len(texts) * weights.numel()


def test_places_that_hold_something_else(model: Any, data: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    with pytest.raises(CompileError, match=r"full is not empty; choose a new folder"):
        mergec.adapt(model, data, tmp_path / "full", config("merge"))
    with pytest.raises(CompileError, match=r"mine.txt is a file; choose a folder"):
        mergec.adapt(model, data, tmp_path / "full/mine.txt", config("merge"))


def test_nothing_to_train(data: Path, tmp_path: Path) -> None:
    """A model whose activation MPCFormer's passes do not replace, asked for that alone."""
    relu = random_decoder("gpt2", n_layer=1, activation_function="relu").float()
    asked = CompileConfig(preset="mpcformer-2quad", disable=("softmax_2quad",))
    student = Student(relu, asked, [[1, 2]])
    with pytest.raises(CompileError, match=r"'mpcformer-2quad' changes nothing in this model"):
        run._check_student(student, asked, config("mpcformer-2quad"))
    with pytest.raises(CompileError, match=r"length is 128, but the model takes at most 64 tokens"):
        mergec.adapt(relu, data, tmp_path / "long", config("merge-mm", length=128))


@pytest.mark.parametrize("swapped", [False, True])
def test_a_program_that_answers_otherwise(
    swapped: bool, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tie may be broken the other way; anything else is an error."""
    rows = torch.tensor([[0.0, 3.0, 1.0, 2.0], [0.0, 1.0, 2.0 if swapped else 3.0, 3.0]])

    class Executor:
        def __init__(self, _: Any) -> None:
            pass

        def generate(self, prompt: Any, count: int, stop: Any) -> Any:
            assert (prompt, count, stop) == ((5,), 2, [0])
            return ((int(row.argmax()), row) for row in rows)

    monkeypatch.setattr(run, "PlainExecutor", Executor)
    student = Student(model, CompileConfig(preset="merge-er"), [[1, 2]])
    made = run._StudentRun(None, None, student, student, [0], config("merge-er"), None, {}, print)
    measures = SimpleNamespace(prompts=[(5,)])
    program: Any = SimpleNamespace(roles={"server": None})
    assert made._same(program, measures, [[1, int(rows[1].argmax())]]) == 1
    if swapped:
        with pytest.raises(InternalError, match=r"with the token 3, the student with 2, whose"):
            made._same(program, measures, [[1, 2]])
    else:
        assert made._same(program, measures, [[1, 3]]) == 0


TEXTS = [Encoded(tuple(range(start, start + 8)), 2) for start in (0, 20, 40)]


def test_the_loss_is_the_papers(model: Any) -> None:
    """By hand: (1 - λ) · cross entropy + λ · (1 - cos(h_t, E[x_{t+1}])), over the answers."""
    student = Student(model, CompileConfig(preset="merge-er"), [[1, 2]])
    asked = AdaptConfig(preset="merge-er", noise=0.0, dropout=0.0, cosine=0.75).complete()
    found = losses(student, None, collate(TEXTS), asked)
    with torch.no_grad():
        ids = torch.tensor([text.tokens for text in TEXTS])
        done = model(ids, output_hidden_states=True)
        entropy = torch.nn.functional.cross_entropy(
            done.logits[:, 1:-1].reshape(-1, VOCAB), ids[:, 2:].reshape(-1)
        )
        rows = model.transformer.wte(ids[:, 2:])
        near = torch.cosine_similarity(done.hidden_states[-1][:, 1:-1], rows, dim=-1).mean()
    assert float(found.parts["cross entropy"]) == pytest.approx(float(entropy), rel=1e-5)
    assert float(found.parts["cosine distance"]) == pytest.approx(1 - float(near), rel=1e-4)
    wanted = 0.25 * float(entropy) + 0.75 * (1 - float(near))
    assert found.total.item() == pytest.approx(wanted, rel=1e-5)


def test_resent_states_enter_the_loss(model: Any) -> None:
    """As the program sends them: up to the tokens that as many further runs reach."""
    student = Student(model, CompileConfig(preset="merge-er"), [[1, 2]])
    batch = collate([Encoded((4, 9, 2, 7), 2)])
    asked = AdaptConfig(preset="merge-er", noise=0.0, dropout=0.0, cosine=0.0, resent=1).complete()
    found = losses(student, None, batch, asked)
    with torch.no_grad():
        ids = batch["input_ids"]
        rows = student.embed(ids)
        first = student(ids, rows).hidden
        rows[:, 2:] = first[:, 1:-1]
        logits = student(ids, rows).logits[0, 1:3]
        wanted = torch.nn.functional.cross_entropy(logits, torch.tensor([2, 7]))
    assert found.total.item() == pytest.approx(float(wanted), rel=1e-5)


def test_resent_states_that_begin_as_embeddings(model: Any) -> None:
    """A row lies between the embedding and the hidden state, as far as the ramp has come."""
    student = Student(model, CompileConfig(preset="merge-er"), [[1, 2]])
    batch = collate([Encoded((4, 9, 2, 7), 2)])
    more = {"noise": 0.0, "dropout": 0.0, "cosine": 0.0, "resent": 1, "resent_ramp": 0.5}
    asked = AdaptConfig(preset="merge-er", **more).complete()
    with torch.no_grad():
        ids = batch["input_ids"]
        rows = student.embed(ids)
        first = student(ids, rows).hidden
        rows[:, 2:] = 0.9 * rows[:, 2:] + 0.1 * first[:, 1:-1]
        logits = student(ids, rows).logits[0, 1:3]
        wanted = torch.nn.functional.cross_entropy(logits, torch.tensor([2, 7]))
    found = losses(student, None, batch, asked, share=0.1)
    assert found.total.item() == pytest.approx(float(wanted), rel=1e-5)


def longest(student: Student, batch: Batch, share: torch.Tensor) -> torch.Tensor:
    """How much longer than without it [B] a layer's longest row is, hidden states resent."""
    ids, rows = batch["input_ids"], student.embed(batch["input_ids"])
    first = student(ids, rows)
    sent = rows.clone()
    sent[:, 2:] += share[:, None, None] * (first.hidden[:, 1:-1] - rows[:, 2:])
    sides = [
        torch.stack([stream.norm(dim=-1).amax(-1) for stream in result.streams])
        for result in (student(ids, sent), first)
    ]
    return (sides[0] / sides[1]).amax(0)


@torch.no_grad()
def test_texts_that_grow_move_less_far(model: Any) -> None:
    """And others of the same batch as far as the ramp says."""
    model = copy.deepcopy(model).double()
    student = Student(model, CompileConfig(preset="merge-er"), [[1, 2]])
    batch, all_the_way = collate(TEXTS), torch.ones(len(TEXTS), dtype=torch.float64)
    norm = model.transformer.ln_f

    def grow(factor: float) -> torch.Tensor:
        norm.weight *= factor
        norm.bias *= factor
        return longest(student, batch, all_the_way) > 4

    grown = grow(1e-3)
    assert not grown.any()
    while not grown.any():
        grown = grow(1.02)
    assert 0 < int(grown.sum()) < len(TEXTS)
    share = torch.where(grown, 0.5, all_the_way)
    assert float(longest(student, batch, share).max()) < 4
    rows = student.embed(batch["input_ids"])
    hidden = student(batch["input_ids"], rows).hidden
    rows[:, 2:] += share[:, None, None] * (hidden[:, 1:-1] - rows[:, 2:])
    wanted = student(batch["input_ids"], rows).logits[:, 1:-1]
    entropy = torch.nn.functional.cross_entropy(
        wanted.flatten(0, 1), batch["labels"][:, 2:].flatten()
    )
    more = {"noise": 0.0, "dropout": 0.0, "cosine": 0.0, "resent": 1, "resent_ramp": 0.5}
    asked = AdaptConfig(preset="merge-er", **more).complete()
    found = losses(student, None, batch, asked, share=1.0).total.item()
    assert found == pytest.approx(float(entropy), rel=1e-12)
    without = losses(student, None, batch, asked).total.item()
    assert without != pytest.approx(float(entropy), rel=1e-7)

    # Half as far is still too far, again and again: what is left are the embeddings.
    grow(1e30)
    asked = dataclasses.replace(asked, resent=2)
    found = losses(student, None, batch, asked, share=1.0).total.item()
    alone = losses(student, None, batch, dataclasses.replace(asked, resent=0, resent_ramp=0.0))
    assert found == pytest.approx(alone.total.item(), rel=1e-12)


def test_a_gated_mlp_behind_a_constant_norm() -> None:
    """It squares what is too long, layer after layer; the ramp stops before that."""
    model = random_decoder("llama", num_hidden_layers=6).float()
    with torch.no_grad():
        model.model.norm.weight *= 1e3
    student = Student(model, CompileConfig(preset="merge"), [list(range(8))])
    asked = AdaptConfig(preset="merge", noise=0.0, dropout=0.0, resent=2, resent_ramp=0.5)
    batch = collate(TEXTS)
    assert not losses(student, None, batch, asked.complete()).total.isfinite()
    found = losses(student, None, batch, asked.complete(), share=1.0)
    assert found.total.isfinite()
    found.total.backward()
    assert all(bool(p.grad.isfinite().all()) for p in student.parameters() if p.grad is not None)
    assert bool(model.model.layers[0].mlp.down_proj.weight.grad.any())


def test_the_ramp_of_a_run(model: Any, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """It ends at its share of the steps; validation and runs without it know none."""
    monkeypatch.setattr(run._StudentRun, "_compile", lambda *_: None)
    found = train.losses
    shares: list[float | None] = []

    def noted(*arguments: Any, **options: Any) -> Any:
        shares.append(options.get("share"))
        return found(*arguments, **options)

    monkeypatch.setattr(train, "losses", noted)
    mergec.adapt(model, data, tmp_path / "a", config("merge", resent=1, resent_ramp=0.75))
    learning = [share for share in shares if share is not None]
    assert learning == pytest.approx([1 / 3, 2 / 3, 1, 1])
    shares.clear()
    mergec.adapt(model, data, tmp_path / "b", config("merge", resent=1))
    assert set(shares) == {None}


def test_layers_beside_another_objective(model: Any) -> None:
    """Their distance from the teacher's is added, but not to itself."""
    teacher = Student(model, CompileConfig(), [[1, 2]])
    batch = collate(TEXTS)
    for preset, objective in (("merge", "data"), ("merge-mm", "teacher"), ("merge-er", "data")):
        student = Student(copy.deepcopy(model), CompileConfig(preset=preset), [[1, 2]])
        asked = AdaptConfig(preset=preset, objective=objective, noise=0.0, dropout=0.0).complete()
        more = dataclasses.replace(asked, layer_weight=3.0)
        plain, both = (losses(student, teacher, batch, given) for given in (asked, more))
        mine, theirs = student(batch["input_ids"]), teacher(batch["input_ids"])
        sides = zip([*mine.streams, mine.hidden], [*theirs.streams, theirs.hidden], strict=True)
        apart = torch.stack([(a - b).square().mean() / b.square().mean() for a, b in sides]).mean()
        assert both.parts["layers"].item() == pytest.approx(apart.item(), rel=1e-4, abs=1e-9)
        wanted = plain.total.item() + 3 * apart.item()
        assert both.total.item() == pytest.approx(wanted, rel=1e-5)
        assert "layers" not in plain.parts
        if objective == "teacher":
            alone = [losses(student, teacher, batch, c, layers=True) for c in (asked, more)]
            assert alone[0].total.item() == alone[1].total.item()


def test_distillation(model: Any) -> None:
    """No distance from itself; noise and dropout only where they are asked for."""
    asked = AdaptConfig(preset="mpcformer-2quad").complete()
    teacher = Student(model, CompileConfig(), [[1, 2]])
    student = Student(model, CompileConfig(preset="mpcformer-2quad"), [[1, 2]])
    batch = collate(TEXTS)
    for layers in (True, False):
        assert losses(teacher, teacher, batch, asked, layers=layers).total.item() < 1e-6
        assert losses(student, teacher, batch, asked, layers=layers).total.item() > 1e-5
    calm = AdaptConfig(preset="merge-er", noise=0.5, dropout=0.5).complete()
    resends = Student(model, CompileConfig(preset="merge-er"), [[1, 2]])
    still = [losses(resends, None, batch, calm).total.item() for _ in range(2)]
    moved = [losses(resends, None, batch, calm, disturbed=True).total.item() for _ in range(2)]
    assert still[0] == still[1]
    assert len({*still, *moved}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["merge-er", "merge", "mpcformer-2relu", "thex"])
def test_training_helps(preset: str, data: Path, tmp_path: Path) -> None:
    """Of a model that counts: what a preset breaks, some hundred steps repair in part."""
    teacher = random_decoder("gpt2", n_layer=1).float()
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    texts = torch.tensor([[(start + i) % VOCAB for i in range(8)] for start in range(VOCAB)])
    for _ in range(200):
        loss = teacher(texts, labels=texts).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rarely = {"steps": 150, "samples": 8, "evaluate_every": 150, "save_every": 150, "noise": 0.0}
    resends = preset.startswith("merge")
    more = {"answer": 6, "learning_rate": 3e-3, "resent": 2} if resends else {}
    if preset == "merge":
        more |= {"resent_ramp": 0.5, "layer_weight": 1.0}
    asked = config(preset, **rarely, **more)
    _, untrained, trained = mergec.adapt(teacher, data, tmp_path / "out", asked).rows
    # Perplexity is of the right tokens before, which an answer of resent states does not have.
    if resends:
        assert trained["agreement"] > untrained["agreement"]
    else:
        assert trained["perplexity"] < untrained["perplexity"]
