"""Adapted encoder-decoders: the student is the program, from pairs of sources and answers."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mergec
from mergec import AdaptConfig, CompileConfig, Program, compile_decoder
from mergec.compiler.adaptation.data import Encoded, Encoder, Example
from mergec.compiler.adaptation.losses import collate, losses
from mergec.compiler.adaptation.scale import match_scale
from mergec.compiler.adaptation.student import PADDING, Student, padded
from mergec.compiler.config import PRESETS, Pair
from mergec.compiler.driver import compile_source
from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.adaptation import Adaptation, read_adaptation, write_adaptation
from mergec.compiler.frontend.calibration import calibration
from mergec.compiler.frontend.encoder_decoder import start_of
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.roles.inprocess import InProcessSession
from tests.adaptation import counting
from tests.adaptation.test_student import moved
from tests.encoder_decoders import model_and_step, random_model
from tests.families import float_decoder

LOSSY = tuple(name for name in PRESETS if name != "exact")
SOURCE, ANSWER = [3, 14, 15, 92, 65, 35], [9, 26]
LAYERS = ("encoder_layers", "decoder_layers")
TOLERANCE = 1e-5
UNDER_MPC = 2e-2
"""Of logits around 1, after four layers of approximate functions in fixed point."""


def small(family: str) -> Any:
    """A model in float64 that stays bounded without norms."""
    model = random_model(family).double()
    if family == "t5_gated":
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter *= 0.4
    return model


def short(family: str) -> Any:
    """A model of one layer on each side, in float64."""
    layers = ("num_layers", "num_decoder_layers") if family == "t5" else LAYERS
    return random_model(family, **dict.fromkeys(layers, 1)).double()


def samples(start: int) -> list[Pair]:
    """A long source, and a long answer: tables of cross-attention are not square."""
    return [
        Pair((3, 14, 15, 92, 65, 35, 8, 9), (start, 9, 26, 53)),
        Pair((2, 71, 82, 81), (start, 7, 3, 1, 6)),
    ]


def answers(student: Student) -> torch.Tensor:
    """The logits at the answer's first token and after each token of a given answer."""
    ids, source = torch.tensor([[student.start, *ANSWER]]), torch.tensor([SOURCE])
    with torch.no_grad():
        if not student.resends:
            return student(ids, source=source).logits[0]
        rows = student.embed(ids)
        for place in range(1, ids.shape[1]):
            rows[:, place] = student(ids, rows, source).hidden[:, place - 1]
        return student(ids, rows, source).logits[0]


def compiled(model: Any, student: Student, config: CompileConfig, folder: Path) -> Program:
    folder.mkdir(exist_ok=True)
    kept = tuple(samples(student.start))
    write_adaptation(folder, Adaptation(config.preset, config.enable, student.trained(), kept))
    return compile_decoder(
        model, config=CompileConfig(max_length=32, logit_noise=0.0, adapted=str(folder))
    )


def said(program: Program) -> torch.Tensor:
    tokens = iter(ANSWER)
    plain = PlainExecutor(program.roles["server"])
    return torch.stack([row for _, row in plain.generate(SOURCE, 3, lambda _: next(tokens, 0))])


def compare(model: Any, preset: str, folder: Path) -> None:
    config = CompileConfig(preset=preset)
    student = moved(model, config, samples(start_of(model)))
    program = compiled(model, student, config, folder)
    assert program.manifest.lossy
    wanted, found = answers(student), said(program)
    assert wanted.shape == found.shape
    assert float((wanted - found).abs().max()) < TOLERANCE * max(1.0, float(wanted.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "preset"),
    [(family, preset) for family in ("t5", "t5_gated", "bart") for preset in LOSSY]
    + [(family, "merge") for family in ("mt5", "mbart", "marian")],
)
def test_the_program_computes_what_the_student_does(
    family: str, preset: str, tmp_path: Path
) -> None:
    compare(small(family), preset, tmp_path)


@pytest.mark.parametrize(
    ("family", "preset"),
    [pytest.param("t5", "mpcformer-2quad", marks=pytest.mark.slow), ("bart", "merge")],
)
def test_of_one_layer(family: str, preset: str, tmp_path: Path) -> None:
    compare(short(family), preset, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_under_mpc(family: str, tmp_path: Path) -> None:
    config = CompileConfig(preset="merge")
    model = short(family).float()
    student = moved(model, config, samples(start_of(model)))
    program = compiled(model, student, config, tmp_path)
    ran = {entry["pass"]: entry["sites"] for entry in program.manifest.passes}
    assert ran["fix_attention"] == 3
    wanted = answers(student)
    with InProcessSession(program.roles) as session:
        session.step(SOURCE, 0)
        for past in (6, 7):
            session.step([0], past)
        found = session.step([], 3)
    assert float((found - wanted).abs().max()) < UNDER_MPC


def test_sources_of_several_lengths_side_by_side() -> None:
    """Each as if it were alone, though an encoder sees all of its tokens, and the graph no padding;
    and every sum of encoder and decoder is there."""
    model = short("t5")
    student = Student(model, CompileConfig(), [[0, 1]])
    sources = [SOURCE, [7], [81, 4, 4], [5, 6, 7, 8, 9, 10]]
    ids = torch.tensor([[0, 9, 26], [0, 1, 2], [0, 5, 5], [0, 96, 3]])
    with torch.no_grad():
        together = student(ids, source=padded(sources, PADDING))
        for row, source in enumerate(sources):
            given = torch.tensor([source])
            alone = student(ids[row : row + 1], source=given)
            wanted = model(input_ids=given, decoder_input_ids=ids[row : row + 1]).logits
            assert float((together.logits[row] - wanted[0]).abs().max()) < 1e-6
            assert torch.allclose(together.hidden[row], alone.hidden[0])
            for whole, part in zip(together.encoded, alone.encoded, strict=True):
                assert torch.allclose(whole[row, : len(source)], part[0])
                assert not whole[row, len(source) :].any()
    assert [len(together.encoded), len(together.streams)] == [2, 3]
    assert student.constants == []


@pytest.mark.slow
def test_it_answers_as_the_program_does(tmp_path: Path) -> None:
    model, config = short("t5"), CompileConfig(preset="merge-er")
    student = moved(model, config, samples(start_of(model)))
    program = compiled(model, student, config, tmp_path)
    sources = [SOURCE, [7], [81, 4, 4]]
    plain = PlainExecutor(program.roles["server"])
    wanted = [[token for token, _ in plain.generate(source, 4)] for source in sources]
    assert student.generate(sources, 4) == wanted


def test_tables_start_from_sources_and_answers() -> None:
    """Those of an encoder and of cross-attention are whole, and all parameters get a gradient."""
    student = Student(short("bart"), CompileConfig(preset="merge"), samples(2))
    tables = {name: value for name, value in student.trained().items() if name.endswith(".table")}
    assert [tuple(table.shape) for table in tables.values()] == [(4, 8, 8), (4, 5, 5), (4, 5, 8)]
    encoder, own, cross = tables.values()
    assert torch.equal(own, own.tril())
    # The first four rows of the encoder are the mean of two sources, of which one ends there.
    assert bool((encoder[:, 0, 4:] > 0).all())
    assert bool((cross[:, 0] > 0).all())
    assert all(float((table.sum(-1) - 1).abs().max()) < 1e-4 for table in tables.values())
    batch = collate([Encoded((2, 9, 26), 1, (3, 14)), Encoded((2, 1), 1, (5,))])
    student(batch["input_ids"], source=batch["source"]).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


TEXTS = [Encoded((0, 9, 26, 7, 1), 1, (3, 14, 15)), Encoded((0, 4, 5), 1, (8, 2))]


@functools.cache
def resending() -> tuple[Any, Student]:
    """A model and its student with hidden states that are resent; neither may be modified."""
    model = short("t5").float()
    return model, Student(model, CompileConfig(preset="merge-er"), [[1, 2]])


def test_the_loss_is_of_the_answers_alone() -> None:
    """By hand: (1 - λ) · cross entropy + λ · (1 - cos(h_t, E[x_{t+1}])), the hidden state being
    what the head reads."""
    model, student = resending()
    asked = AdaptConfig(preset="merge-er", noise=0.0, dropout=0.0, cosine=0.75).complete()
    found = losses(student, None, collate(TEXTS), asked)
    entropies, cosines = [], []
    with torch.no_grad():
        for text in TEXTS:
            ids, source = torch.tensor([text.tokens]), torch.tensor([text.source])
            done = model(input_ids=source, decoder_input_ids=ids[:, :-1], output_hidden_states=True)
            entropies.append(
                torch.nn.functional.cross_entropy(done.logits[0], ids[0, 1:], reduction="none")
            )
            hidden = done.decoder_hidden_states[-1] * model.config.d_model**-0.5
            rows = model.shared(ids[:, 1:])
            cosines.append(torch.cosine_similarity(hidden, rows, dim=-1)[0])
    entropy, apart = float(torch.cat(entropies).mean()), 1 - float(torch.cat(cosines).mean())
    assert float(found.parts["cross entropy"]) == pytest.approx(entropy, rel=1e-5)
    assert float(found.parts["cosine distance"]) == pytest.approx(apart, rel=1e-4)
    assert found.total.item() == pytest.approx(0.25 * entropy + 0.75 * apart, rel=1e-5)


def test_resent_states_enter_the_loss() -> None:
    _, student = resending()
    batch = collate([Encoded((0, 9, 2), 1, (4, 7))])
    asked = AdaptConfig(preset="merge-er", noise=0.0, dropout=0.0, cosine=0.0, resent=1).complete()
    found = losses(student, None, batch, asked)
    with torch.no_grad():
        ids, source = batch["input_ids"], batch["source"]
        rows = student.embed(ids)
        rows[:, 1:] = student(ids, rows, source).hidden[:, :-1]
        logits = student(ids, rows, source).logits[0, :2]
        wanted = torch.nn.functional.cross_entropy(logits, torch.tensor([9, 2]))
    assert found.total.item() == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.slow
def test_layers_of_the_encoder_are_learned() -> None:
    """The first stage sees an encoder that differs, though the decoder's weights do not."""
    model = short("t5").float()
    teacher = Student(copy.deepcopy(model), CompileConfig(), [[1, 2]])
    student = Student(model, CompileConfig(preset="mpcformer-2quad"), [[1, 2]])
    asked, batch = AdaptConfig(preset="mpcformer-2quad").complete(), collate(TEXTS)
    assert losses(teacher, teacher, batch, asked, layers=True).total.item() < 1e-6
    losses(student, teacher, batch, asked, layers=True).total.backward()
    moved_by = model.encoder.block[0].layer[1].DenseReluDense.wi.weight.grad
    assert moved_by is not None
    assert float(moved_by.abs().max()) > 0
    with torch.no_grad():
        mine = student(batch["input_ids"], source=batch["source"])
        theirs = teacher(batch["input_ids"], source=batch["source"])
    pairs = zip(mine.encoded, theirs.encoded, strict=True)
    assert all(float((a - b).abs().max()) > 1e-3 for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_scales_match(family: str, tmp_path: Path) -> None:
    """Logits stay, also in the folder, and both embeddings are still one."""
    from mergec.compiler.frontend.load import load_model

    model = short(family).float()
    before = Student(copy.deepcopy(model), CompileConfig(), [[0]])
    pairs = samples(before.start)[:1]
    ids, source = torch.tensor([pairs[0].answer]), torch.tensor([pairs[0].source])
    factor = match_scale(model, before, pairs)
    assert not 0.9 < factor < 1.1
    model.save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path)
    with torch.no_grad():
        wanted = before(ids, source=source)
        found = Student(loaded, CompileConfig(), [[0]])(ids, source=source)
    assert torch.allclose(found.logits, wanted.logits, atol=TOLERANCE)
    assert torch.allclose(found.hidden, factor * wanted.hidden, atol=TOLERANCE)
    size = found.hidden[:, :-1].square().mean() / before.embed(ids)[:, 1:].square().mean()
    assert float(size.detach()) == pytest.approx(1, rel=1e-4)
    tables = (loaded.get_encoder().embed_tokens, loaded.get_decoder().embed_tokens)
    assert tables[0].weight.data_ptr() == tables[1].weight.data_ptr()


def tokenizer(ends: bool = True) -> Any:
    """A token for each letter; `</s>` at the end of a text, if `ends`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1} | {letter: 2 + i for i, letter in enumerate("abcdefgh")}
    made = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        made.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("ends", [True, False])
def test_a_source_is_what_a_client_sends(ends: bool) -> None:
    encode = Encoder(tokenizer(ends), 10, 12, begin=0)
    (found,) = encode([Example("c d", "a b")])
    assert found == Encoded((0, 4, 5, 1), 1, (2, 3, 1) if ends else (2, 3))
    assert [found.prompt, found.answer] == [found.source, (4, 5, 1)]
    assert found.sample == Pair(found.source, found.tokens)
    numbers = encode([Example([4, 5], [2, 3]), Example([4, 1], [2])])
    assert numbers == [Encoded((0, 4, 5, 1), 1, (2, 3)), Encoded((0, 4, 1), 1, (2,))]


def test_long_sources_and_answers_lose_their_ends() -> None:
    """Of a source, what the tokenizer puts behind it stays."""
    encode = Encoder(tokenizer(), 10, 8, begin=0)
    (found,) = encode([Example("b c d e f g", "a b c d e f g h")])
    assert found == Encoded((0, 3, 4, 5), 1, (2, 3, 4, 1))
    (numbers,) = encode([Example([3], [2, 3, 4, 5, 6, 7, 8])])
    assert numbers == Encoded((0, 3, 1), 1, (2, 3, 4, 5, 6))
    (rest,) = encode([Example([2, 3, 4, 5, 6, 7], [2, 3])])
    assert rest == Encoded((0, 2, 3, 4, 5, 6), 1, (2, 3))


def test_texts_without_sources_are_refused() -> None:
    encode = Encoder(tokenizer(False), 10, 12, begin=0, file="a.txt")
    with pytest.raises(CompileError, match=r"^a.txt, line 3: a text without a prompt, but an enco"):
        encode([Example("a b", line=3)])
    with pytest.raises(CompileError, match=r"line 4: the prompt holds no tokens"):
        encode([Example("a b", " ", 4)])
    with pytest.raises(CompileError, match=r"the token 97 is not in the vocabulary of 10"):
        encode([Example([97], [2])])


SHORT: dict[str, Any] = {
    **counting.SHORT,
    "length": 16,
    "answer": 3,
    "learning_rate": 1e-3,
    "noise": 0.01,
    "dropout": 0.0,
}


def asked_for(preset: str, **changes: Any) -> AdaptConfig:
    return AdaptConfig(preset=preset, **{**SHORT, **changes})


def write_pairs(folder: Path) -> Path:
    """Sources of several lengths, whose numbers the answer continues."""
    file = folder / "pairs.jsonl"
    lines = [
        {
            "prompt": [start + i for i in range(1 + start % 3)],
            "answer": [start + i for i in range(3, 7 + start % 2)],
        }
        for start in range(40)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["merge", "merge-er", "mpcformer-2quad", "thex"])
def test_from_the_model_to_the_program(preset: str, tmp_path: Path) -> None:
    model, data, folder = short("t5").float(), write_pairs(tmp_path), tmp_path / "adapted"
    said: list[str] = []
    report = mergec.adapt(model, data, folder, asked_for(preset), progress=said.append)
    assert report.rows[0]["agreement"] == 1
    assert any("validation agreement" in line for line in said)
    assert report.same == SHORT["samples"]
    whole = json.loads((folder / "report.json").read_text())
    assert whole["cost"]["decode"]["rounds"] > 0
    found = read_adaptation(folder)
    assert all(isinstance(sample, Pair) and sample.answer[0] == 0 for sample in found.calibration)
    program = compile_source(folder, {"max_length": 24, "logit_noise": 0.0})
    assert program.manifest.deviation == report.deviation
    assert len(list(PlainExecutor(program.roles["server"]).generate([3, 4], 3))) == 3
    other = "thex" if preset == "merge" else "merge"
    with pytest.raises(CompileError, match=rf"was adapted for the preset '{preset}', not for"):
        compile_source(folder, {"preset": other})


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["merge-mm", "mpcformer-2relu"])
def test_an_interrupted_run_continues(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the very weights that a run without interruption ends with, in a second epoch: its order
    of texts is that of their sources' lengths."""
    from mergec.compiler.adaptation import run

    monkeypatch.setattr(run._StudentRun, "_compile", lambda *_: None)
    model, data = short("t5").float(), write_pairs(tmp_path)
    asked = asked_for(preset, steps=16, save_every=12, evaluate_every=16, noise=0.0)
    mergec.adapt(model, data, tmp_path / "whole", asked)
    folder = tmp_path / "cut"

    def stop(line: str) -> None:
        if line.startswith("step 14 of 16: loss"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mergec.adapt(model, data, folder, asked, progress=stop)
    said: list[str] = []
    mergec.adapt(model, data, folder, asked, progress=said.append)
    assert "continuing an interrupted run" in said
    assert not any(line.startswith("step 12 of") for line in said)
    for name in ("mergec_adaptation.safetensors", "model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_batches_hold_sources_of_similar_length() -> None:
    from mergec.compiler.adaptation.train import _ByLength

    lengths = [1 + number % 7 for number in range(280)]
    sampler = _ByLength(lengths, 4, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(280)) and list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    batches = [{lengths[i] for i in first[begin : begin + 4]} for begin in range(0, 280, 4)]
    assert sum(map(len, batches)) < 1.3 * len(batches)


def test_what_does_not_fit(tmp_path: Path) -> None:
    """One line each, before anything is trained."""
    model, data = short("t5").float(), write_pairs(tmp_path)
    plain = tmp_path / "plain.txt"
    plain.write_text("1 2 3\n\n4 5 6\n")
    for file, changes, reason in (
        (plain, {}, r"plain.txt, line \d: a text without a prompt, but an encoder-decoder"),
        (data, {"separator": " :"}, r"reads the prompt as its source, .*; leave out separator"),
    ):
        with pytest.raises(CompileError, match=reason) as caught:
            mergec.adapt(model, file, tmp_path / "out", asked_for("merge", **changes))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_nothing_to_train() -> None:
    """The plain T5 has neither GELU nor SiLU."""
    from mergec.compiler.adaptation import run

    asked = CompileConfig(preset="mpcformer-2quad", disable=("softmax_2quad",))
    student = Student(short("t5").float(), asked, [[1, 2]])
    with pytest.raises(CompileError, match=r"'mpcformer-2quad' changes nothing in this model"):
        run._check_student(student, asked, asked_for("mpcformer-2quad"))


def test_beams_are_left_out_and_named() -> None:
    """Many checkpoints ask for them; what is compared is greedy."""
    from mergec.compiler.adaptation import run

    model = short("t5")
    model.generation_config.num_beams = 4
    model.generation_config.length_penalty = 2.0
    said: list[str] = []
    run._check_settings(model, 97, said.append)
    (line,) = said
    assert line.endswith("compile with --ignore-setting num_beams --ignore-setting length_penalty")
    model.generation_config.num_beams = 1
    run._check_settings(model, 97, said.append)
    assert len(said) == 1
    model.generation_config.forced_eos_token_id = 1_000
    with pytest.raises(CompileError, match=r"generation_config is invalid"):
        run._check_settings(model, 97, said.append)


def test_calibration_by_pairs() -> None:
    _, captured = model_and_step("t5")
    _, decoder = float_decoder("gpt2")
    kept = CompileConfig(calibration=(Pair((3, 4), (0, 5, 6)), (7, 8)))
    assert calibration(kept, captured) == kept.calibration
    with pytest.raises(CompileError, match=r"the answer of calibration prompt 0 is empty"):
        CompileConfig(calibration=(Pair((3, 4), ()),))
    for pair, reason in (
        (Pair((3, 97), (0,)), r"calibration prompt 0 holds the token 97"),
        (Pair((3,), (0, 98)), r"calibration prompt 0 holds the token 98"),
    ):
        with pytest.raises(CompileError, match=reason):
            calibration(CompileConfig(calibration=(pair,)), captured)
    with pytest.raises(CompileError, match=r"is a source and its answer, but the model is a decod"):
        calibration(CompileConfig(calibration=(Pair((3,), (0,)),)), decoder)
