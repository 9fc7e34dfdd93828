"""Heads that guess the tokens after the next one: what they say, cost and leave as it is."""

from __future__ import annotations

import functools
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import mergec
from mergec import AdaptConfig, CompileConfig
from mergec.compiler.adaptation import run
from mergec.compiler.adaptation.data import Encoded
from mergec.compiler.adaptation.heads import WEIGHT, TrainedHeads, head_losses
from mergec.compiler.adaptation.losses import collate
from mergec.compiler.adaptation.student import Student
from mergec.compiler.driver import compile_decoder, compile_source
from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.adaptation import (
    FILE,
    TENSORS,
    Adaptation,
    read_adaptation,
    read_heads,
    write_adaptation,
)
from mergec.compiler.frontend.heads import (
    BLOCK,
    BLOCK_BIAS,
    Heads,
    bias_name,
    digest,
    head_name,
)
from mergec.compiler.program import Program
from mergec.runtime.core.errors import BundleError, PromptError
from mergec.runtime.core.spec import CLIENT
from mergec.runtime.engine.audit import audit
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.engine.rehearsal import Rehearsal, step_cost
from mergec.runtime.roles.inprocess import InProcessSession
from mergec.runtime.roles.local import run_local
from mergec.runtime.session.drafting import Speculation
from mergec.runtime.session.drafting.drafter import Target, read
from mergec.runtime.session.drafting.lookup import Lookup
from mergec.runtime.session.drafting.medusa import Medusa
from mergec.runtime.session.generation import answer
from mergec.runtime.session.plain import PlainSession
from mergec.runtime.session.sampling import Sampling
from tests import decoder, session
from tests.adaptation import counting
from tests.families import VOCAB, every_family, float_decoder, random_decoder, slow

COUNT = 3
PROMPT = [3, 4, 5]
CLOSE = 2e-3
"""Logits that are closer than this may be chosen for each other: the parties round them."""


def random_heads(model: Any, *, blocks: bool, count: int = COUNT) -> Heads:
    """Heads that say something else than the model's own, and than each other."""
    own = model.get_output_embeddings()
    matrix, bias = own.weight.detach(), own.bias
    rows, width = matrix.shape
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int, by: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * by

    tensors: dict[str, torch.Tensor] = {}
    for k in range(1, count + 1):
        tensors[head_name(k)] = matrix + normal(rows, width, by=float(matrix.std()))
        if bias is not None:
            tensors[bias_name(k)] = bias.detach() + normal(rows, by=0.1)
    if blocks:
        tensors[BLOCK] = normal(count * width, width, by=0.3)
        tensors[BLOCK_BIAS] = normal(count * width, by=0.3)
    return Heads(count, tensors, digest(matrix))


def store(folder: Path, heads: Heads) -> Path:
    """A folder as `mergec adapt` leaves it, without the model."""
    folder.mkdir(exist_ok=True)
    told = Adaptation("exact", medusa=heads.count, base=heads.base)
    write_adaptation(folder, told, heads)
    return folder


@functools.cache
def compiled(family: str, *, blocks: bool = True, count: int = COUNT, **options: Any) -> Program:
    """A tiny decoder with random heads; must not be modified."""
    model, captured = float_decoder(family)
    with tempfile.TemporaryDirectory(prefix="mergec-") as folder:
        place = store(Path(folder), random_heads(model, blocks=blocks, count=count))
        told = {"max_length": 64, "logit_noise": 0.0, "adapted": place, **options}
        return compile_decoder(model, config=CompileConfig(**told), captured=captured)


def plain(program: Program) -> PlainSession:
    return PlainSession(PlainExecutor(program.roles["server"]))


def by_hand(model: Any, heads: Heads, ids: Sequence[int]) -> torch.Tensor:
    """What each head says at every position [count, N, V], from the rows of the model."""
    seen: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _module, given: seen.append(given[0])
    )
    with torch.no_grad():
        model(torch.tensor([list(ids)]))
    hook.remove()
    (h,) = seen[-1]
    found, width = [], h.shape[-1]
    for k in range(1, heads.count + 1):
        row = h
        if heads.blocks:
            part = slice((k - 1) * width, k * width)
            weight, bias = heads.tensors[BLOCK][part], heads.tensors[BLOCK_BIAS][part]
            row = h + F.silu(F.linear(h, weight, bias))
        said = F.linear(row, heads.tensors[head_name(k)], heads.tensors.get(bias_name(k)))
        found.append(said)
    return torch.stack(found)


# ---------------------------------------------------------------------------------- programs


@every_family(("llama",))
def test_heads_say_what_they_were_trained_to_and_answers_stay(family: str) -> None:
    model, _ = float_decoder(family)
    heads = random_heads(model, blocks=True)
    program = compiled(family)
    assert program.manifest.medusa == program.manifest.speculate_up_to == COUNT
    assert not program.manifest.lossy
    fast = plain(program)
    text = [*PROMPT, 9, 11, 13, 2]
    fast.rows(3, 0, PROMPT)
    assert torch.equal(fast.guesses, by_hand(model, heads, PROMPT)[:, -1:].argmax(-1))
    fast.rows(4, 3, text[3:])
    said = by_hand(model, heads, text)[:, 3:]
    assert torch.equal(fast.guesses, said.argmax(-1))
    assert torch.equal(fast.candidates, said.topk(4).indices)
    slow = plain(session.compiled(family, speculate_up_to=COUNT)[1])
    wanted = [token.token for token in answer(slow, PROMPT, max_tokens=10)]
    for tokens, tree in ((COUNT, False), (1, False), (None, False), (COUNT, True), (None, True)):
        drafts = Speculation(Medusa(), tokens, tree=tree)
        found, shapes = [], set[tuple[int, ...]]()
        for token in answer(fast, PROMPT, max_tokens=10, speculation=drafts):
            found.append(token)
            shapes.add(drafts.parents)
        assert [token.token for token in found] == wanted
        assert shapes <= ({(), (0, 1, 0), (0, 0)} if tree else {()})
        assert tokens is None or ((0, 1, 0) in shapes) is tree
        drafts = Speculation([Lookup(), Medusa()], tokens, tree=tree)
        both = answer(fast, PROMPT, max_tokens=10, speculation=drafts)
        assert [token.token for token in both] == wanted
        assert found[0].logits is not None
        assert found[0].logits.shape == (VOCAB,)
    assert [token.token for token in answer(fast, PROMPT, max_tokens=10)] == wanted


@pytest.mark.parametrize(
    "options",
    [
        {"blocks": False},
        {"reveal": "token"},
        *slow(
            {"network": "wan"},
            {"rounding": "exact"},
            {"weights": "shared"},
            {"blocks": False, "reveal": "token"},
        ),
    ],
)
def test_the_parties_compute_what_heads_say(options: dict[str, Any]) -> None:
    program = compiled("llama", **options)
    model, _ = float_decoder("llama")
    heads = random_heads(model, blocks=options.get("blocks", True))
    clear, text = plain(program), list(PROMPT)
    clear.step(3, 0, PROMPT)
    with InProcessSession(program.roles) as parties:
        parties.step(PROMPT, 0)
        mine = parties._sessions[CLIENT]
        for ids, past in (([4, 5, 6, 7], 3), ([9, 9], 5), ([8], 6)):
            wanted, found = clear.rows(len(ids), past, ids), parties.rows(ids, past)
            assert wanted is not None
            assert wanted.shape == found.shape
            assert len(found) == len(ids)
            assert torch.equal(wanted.argmax(-1), found.argmax(-1))
            assert mine.guesses.shape == (COUNT, len(ids))
            text = [*text[:past], *ids]
            said = by_hand(model, heads, text)[:, past:]
            chosen = said.gather(-1, mine.guesses[..., None])[..., 0]
            assert float((said.amax(-1) - chosen).max()) < CLOSE
            predicted = step_cost(Rehearsal(program.any_role), len(ids), past).cost
            spent = parties.record.total
            assert (spent.rounds, spent.online) == (predicted.rounds, predicted.online)


@pytest.mark.parametrize("network", ["loopback", *slow("wan")])
@pytest.mark.parametrize("family", ["llama", *slow("gpt2", "gemma2")])
def test_heads_without_blocks_take_no_round(family: str, network: str) -> None:
    """Four bytes for each logit; their input is opened already, so nothing else is sent.

    Where the product with the model's own head stands for the final norm, that of the heads does,
    too, and takes 16 bytes more for each logit (`defer_norm`).
    """
    deferred = (family, network) == ("llama", "wan")
    _, without = session.compiled(family, speculate_up_to=COUNT, network=network)
    told = {} if network == "loopback" else {"network": network}
    program = compiled(family, blocks=False, **told)
    for new, past in ((1, 9), (4, 9), (6, 0)):
        rows = new if past else 1
        costs = [step_cost(Rehearsal(p.any_role), new, past).cost for p in (without, program)]
        assert costs[0].rounds == costs[1].rounds
        assert costs[1].online - costs[0].online == (20 if deferred else 4) * VOCAB * COUNT * rows


def test_blocks_take_rounds_for_all_heads_at_once() -> None:
    rounds = [
        step_cost(Rehearsal(compiled("gpt2", count=count).any_role), 2, 9).cost.rounds
        for count in (1, COUNT)
    ]
    assert rounds[0] == rounds[1]


def test_noise_and_audit_cover_the_heads() -> None:
    program = compiled("gpt2", logit_noise=2**-8, speculate_up_to=5)
    assert program.manifest.speculate_up_to == 5
    calls = [item for item in program.any_role.instructions if item.target == "mpc.reveal"]
    assert [item.args[1] for item in calls] == [2**-8] * (1 + COUNT)
    found = audit(program.any_role, queries=10)
    assert not found.unmasked
    assert found.facts["medusa"] == COUNT
    width = 32
    bounds = found.extraction
    assert (bounds.vocabulary, bounds.width) == ((1 + COUNT) * VOCAB, (1 + COUNT) * width)
    assert bounds.honest == 10 * ((1 + COUNT) * VOCAB - 10)
    assert bounds.bits == 10 * 32 * (1 + COUNT) * VOCAB
    assert "each of 3 heads reveals the logits of its guess" in found.to_text()
    alone = audit(compiled("llama", blocks=False).any_role, queries=10)
    assert (alone.extraction.vocabulary, alone.extraction.width) == ((1 + COUNT) * VOCAB, width)
    token = audit(compiled("llama", reveal="token").any_role, queries=10)
    assert token.extraction.honest is None
    assert token.extraction.bits == math.ceil(10 * (1 + COUNT) * math.log2(VOCAB))


def test_a_program_with_heads_is_saved_and_loaded(tmp_path: Path) -> None:
    program = compiled("llama", blocks=False)
    program.save(tmp_path / "bundles")
    loaded = Program.load(tmp_path / "bundles")
    assert loaded.manifest.medusa == COUNT
    wanted, found = (
        [token for token, _ in PlainExecutor(p.roles["server"]).generate(PROMPT, 6)]
        for p in (program, loaded)
    )
    assert found == wanted


@pytest.mark.slow
def test_three_processes_draft_by_heads(tmp_path: Path) -> None:
    program = compiled("llama", blocks=False)
    program.save(tmp_path / "bundles")
    found = run_local(
        tmp_path / "bundles", PROMPT, max_tokens=6, speculate="medusa", speculate_tokens=COUNT
    )
    wanted = [token for token, _ in PlainExecutor(program.roles["server"]).generate(PROMPT, 6)]
    assert list(found.tokens) == wanted


# ---------------------------------------------------------------------------------- the loop


class Foreseeing(PlainSession):
    """Logits that depend on the last token alone, and heads that know what follows, or do not."""

    def __init__(self, right: int) -> None:
        super().__init__(PlainExecutor(decoder.program(speculate_up_to=4, medusa=COUNT)))
        self.right = right
        self.table = torch.randn(13, 13, generator=torch.Generator().manual_seed(1)) * 3

    def _execute(self, inputs: dict[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        ids = inputs["ids"].value
        kept = ids if inputs["cache.k"].shape[2] else ids[:, -1:]
        cache = torch.zeros(1, 1, inputs["cache.k"].shape[2] + ids.shape[1], 8)
        own, heads = self.table[kept], []
        following = own.argmax(-1)
        for k in range(COUNT):
            following = self.table[following].argmax(-1)
            said = following if k < self.right else (following + 1) % 13
            heads.append(F.one_hot(said, 13).to(own.dtype))
        return {**dict.fromkeys(outputs, cache), outputs[0]: torch.cat([*heads, own], 1)}


@pytest.mark.parametrize("right", [0, 1, 2, 3])
def test_drafts_are_those_of_the_last_kept_position(right: int) -> None:
    stub = Foreseeing(right)
    without = [token.token for token in answer(stub, [7], max_tokens=13)]
    drafts = Speculation(Medusa(), COUNT)
    found = list(answer(stub, [7], max_tokens=13, speculation=drafts))
    assert [token.token for token in found] == without
    reports = [report for token in found for report in token.reports]
    assert len(reports) == 1 + math.ceil(12 / (1 + right))
    assert sum(report.accepted for report in reports) == 13 - len(reports)


def test_sampled_answers_are_those_without_heads() -> None:
    """The same numbers of the generator choose the same tokens, so the distribution is the same."""
    stub = Foreseeing(3)
    accepted = 0
    for seed in range(40):
        sampling = Sampling(temperature=1.5, top_k=4, seed=seed)
        without = [t.token for t in answer(stub, [7], max_tokens=13, sampling=sampling)]
        drafts = Speculation(Medusa(), COUNT)
        found = list(answer(stub, [7], max_tokens=13, sampling=sampling, speculation=drafts))
        assert [token.token for token in found] == without
        accepted += sum(report.accepted for token in found for report in token.reports)
    assert accepted > 40


def test_what_does_not_reveal_its_heads_is_refused() -> None:
    silent = PlainSession(PlainExecutor(decoder.program(speculate_up_to=4)))
    silent.program.manifest = replace(silent.program.manifest, medusa=2)
    with pytest.raises(BundleError, match="does not reveal what its heads say"):
        list(answer(silent, [7], max_tokens=3))
    with pytest.raises(BundleError, match="medusa is 9; it can be 0 to 8 heads"):
        decoder.program(medusa=9)


def test_the_drafter_needs_heads() -> None:
    ((kind, place),) = read("medusa")
    assert (kind, place) == (Medusa, "")
    with pytest.raises(
        PromptError, match=r"has no heads that guess; train some with `mergec adapt"
    ):
        Medusa.open("", Target(13, None))
    manifest = decoder.program(speculate_up_to=4).manifest
    with pytest.raises(PromptError, match="has no heads that guess"):
        Speculation.open("medusa", None, manifest, None)
    made = Medusa.open("", Target(13, None, 2))
    assert made.draft([1, 2], 4) == []
    made.guess([5, 6])
    assert made.draft([1, 2], 4) == [5, 6]
    assert made.draft([1, 2], 1) == [5]


# ---------------------------------------------------------------------------------- folders


def test_heads_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, captured = float_decoder("gpt2")
    heads = random_heads(model, blocks=True)

    def refused(heads: Heads, said: str) -> None:
        place = store(tmp_path / "bad", heads)
        with pytest.raises(CompileError, match=said):
            compile_decoder(model, config=CompileConfig(adapted=place), captured=captured)

    refused(replace(heads, base="0" * 64), "were trained beside another model")
    for changed in (
        {name: value for name, value in heads.tensors.items() if name != head_name(2)},
        {name: value for name, value in heads.tensors.items() if name != BLOCK_BIAS},
        {**heads.tensors, head_name(1): heads.tensors[head_name(1)][:, :5]},
        {**heads.tensors, "medusa.9.weight": torch.zeros(2)},
    ):
        refused(replace(heads, tensors=changed), "is missing or has another shape")
    refused(
        replace(heads, tensors={**heads.tensors, BLOCK: heads.tensors[BLOCK] / 0}),
        "NaN or infinite",
    )
    place = store(tmp_path / "good", heads)
    again = read_heads(place)
    assert again is not None
    assert again.tensors.keys() == heads.tensors.keys()
    assert read_adaptation(place).constants == {}
    with pytest.raises(CompileError, match="for the preset 'exact', not for 'merge-mm'"):
        config = CompileConfig(adapted=place, preset="merge-mm")
        compile_decoder(model, config=config, captured=captured)
    settings = json.loads((place / FILE).read_text())
    for value in (9, -1, "3", True):
        (place / FILE).write_text(json.dumps({**settings, "medusa": value}))
        with pytest.raises(CompileError, match="is damaged"):
            read_heads(place)
    (place / FILE).write_text(json.dumps({**settings, "medusa": 0}))
    assert read_heads(place) is None


# ---------------------------------------------------------------------------------- training

SHORT: dict[str, Any] = {**counting.SHORT, "medusa": 2, "answer": 4}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return counting.write_counting(tmp_path)


@pytest.fixture(scope="module")
def model() -> Any:
    return random_decoder("gpt2", n_layer=1).float()


def test_the_loss_is_the_papers(model: Any) -> None:
    """By hand: the sum of 0.8**k times the cross entropy k tokens further on, over the answers."""
    student = Student(model, CompileConfig(), [[1, 2]])
    heads = TrainedHeads(student, 2, 1)
    with torch.no_grad():
        for value in heads.parameters():
            value += torch.randn(value.shape, generator=torch.Generator().manual_seed(2)) * 0.1
    texts = [Encoded(tuple(range(start, start + 8)), 3) for start in (0, 20)]
    short = Encoded((1, 2, 3, 4), 3)
    found = head_losses(heads, collate([*texts, short]))
    ids = torch.tensor([text.tokens for text in texts])
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[-1]
        total = 0.0
        for k in (1, 2):
            said = heads(hidden[:, 2 : 7 - k], k).reshape(-1, VOCAB)
            loss = F.cross_entropy(said, ids[:, 3 + k :].reshape(-1))
            assert float(found.parts[f"head {k}"]) == pytest.approx(float(loss), rel=1e-4)
            total += WEIGHT**k * float(loss)
    assert found.total.item() == pytest.approx(total, rel=1e-4)
    nothing = head_losses(heads, collate([short]))
    assert nothing.total.item() == 0
    assert nothing.parts == {}
    nothing.total.backward()


@pytest.mark.parametrize("layers", [0, 1])
def test_untrained_heads_say_what_the_model_says(layers: int, model: Any) -> None:
    student = Student(model, CompileConfig(), [[1, 2]])
    heads = TrainedHeads(student, 2, layers)
    result = student(torch.tensor([[4, 5, 6]]))
    for k in (1, 2):
        assert torch.allclose(heads(result.hidden, k), result.logits, atol=1e-5)
    assert heads.trained().base == digest(model.get_output_embeddings().weight)
    assert heads.trained().blocks is bool(layers)


def test_from_the_model_to_the_program(model: Any, data: Path, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    said: list[str] = []
    folder = tmp_path / "heads"
    report = mergec.adapt(model, data, folder, AdaptConfig(**SHORT), progress=said.append)
    assert any(line.startswith("step 1 of 4: loss") and "head 2" in line for line in said)
    assert [row["name"] for row in report.rows] == ["heads, untrained", "heads, trained"]
    assert report.rows[1]["tokens a step"] >= 1
    assert not {run.RUN, run.CHECKPOINTS} & {file.name for file in folder.iterdir()}
    page = (folder / "report.md").read_text()
    assert "# heads: 2 heads that guess" in page
    assert "| head 1 right | head 2 right | tokens a step |" in page
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in saved.items())
    program = compile_source(folder, {"max_length": 16, "preset": "exact"})
    assert (program.manifest.medusa, program.manifest.speculate_up_to) == (2, 2)
    assert program.manifest.deviation == {}
    heads = read_heads(folder)
    assert heads is not None
    own = model.get_output_embeddings().weight
    assert not torch.equal(heads.tensors[head_name(1)], own), "the heads have learnt something"
    with pytest.raises(CompileError, match=r"already has heads; give the model from before"):
        mergec.adapt(folder, data, tmp_path / "again", AdaptConfig(**SHORT))
    with pytest.raises(CompileError, match=r"for the preset 'exact', not for 'merge'"):
        compile_source(folder, {"preset": "merge"})
    # Heads beside another model, as if a folder were put together by hand.
    other = random_decoder("gpt2", n_layer=1, tie_word_embeddings=False).float()
    with torch.no_grad():
        other.get_output_embeddings().weight.add_(0.1)
    other.save_pretrained(folder)
    with pytest.raises(CompileError, match="were trained beside another model"):
        compile_source(folder, {})


@pytest.mark.slow
def test_an_interrupted_run_continues(
    model: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the very weights that a run without interruption ends with."""
    monkeypatch.setattr(run._HeadRun, "_compile", lambda *_: None)
    asked = AdaptConfig(**SHORT)
    whole = mergec.adapt(model, data, tmp_path / "whole", asked)

    def stop(line: str) -> None:
        if line.startswith("step 3 of 4: loss"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mergec.adapt(model, data, tmp_path / "cut", asked, progress=stop)
    with pytest.raises(CompileError, match=r"interrupted run with another medusa \(2, not 3\)"):
        mergec.adapt(model, data, tmp_path / "cut", AdaptConfig(**{**SHORT, "medusa": 3}))
    said: list[str] = []
    again = mergec.adapt(model, data, tmp_path / "cut", asked, progress=said.append)
    assert not any(line.startswith("step 1 of") for line in said)
    assert again.rows == whole.rows
    assert (tmp_path / "cut" / TENSORS).read_bytes() == (tmp_path / "whole" / TENSORS).read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"medusa": 0}, "medusa is 0; it can be 1 to 8"),
        ({"medusa": 9}, "medusa is 9; it can be 1 to 8"),
        ({"medusa": 2, "medusa_layers": 2}, "medusa_layers is 2; it can be 0 to 1"),
        ({"medusa": 2, "preset": "merge-mm"}, "leave out preset and enable, or leave out medusa"),
        ({"medusa": 2, "enable": ("quadratic_gelu",)}, "leave out preset and enable"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(CompileError, match=said):
        AdaptConfig(**options)


def test_defaults() -> None:
    found = AdaptConfig(medusa=3).complete()
    assert (found.preset, found.objective, found.learning_rate) == ("exact", "data", 1e-3)
    assert AdaptConfig().preset == "merge"


def test_models_and_data_without_anything_to_guess(model: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 31, "d_model": 8, "d_ff": 8, "d_kv": 4, "num_heads": 2, "num_layers": 1}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    file = tmp_path / "short.jsonl"
    file.write_text('{"prompt": [1, 2], "answer": [3]}\n' * 40)
    with pytest.raises(CompileError, match=r"is an encoder-decoder; heads are for decoders"):
        mergec.adapt(t5, file, tmp_path / "out", AdaptConfig(**SHORT))
    with pytest.raises(CompileError, match=r"no answer of two tokens or more to train on"):
        mergec.adapt(model, file, tmp_path / "out", AdaptConfig(**SHORT))


@pytest.mark.slow
@pytest.mark.parametrize("layers", [0, 1])
def test_trained_heads_give_more_tokens_a_step(layers: int, data: Path, tmp_path: Path) -> None:
    """Of a model that counts; by client, server and dealer as processes, too."""
    teacher = random_decoder("gpt2", n_layer=1).float()
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    texts = torch.tensor([[(start + i) % VOCAB for i in range(8)] for start in range(VOCAB)])
    for _ in range(200):
        loss = teacher(texts, labels=texts).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    more = {"steps": 150, "evaluate_every": 150, "save_every": 150, "learning_rate": 3e-3}
    asked = AdaptConfig(**{**SHORT, **more, "batch": 16, "medusa_layers": layers})
    report = mergec.adapt(teacher, data, tmp_path / "out", asked)
    untrained, trained = report.rows
    assert trained["head 1 right"] > untrained["head 1 right"]
    assert trained["tokens a step"] > 1.3
    program = compile_source(tmp_path / "out", {"max_length": 32})
    program.save(tmp_path / "bundles")
    told: dict[str, Any] = {"max_tokens": 6}
    without = run_local(tmp_path / "bundles", [10, 11], **told)
    found = run_local(
        tmp_path / "bundles", [10, 11], **told, speculate="medusa", speculate_tokens=2
    )
    assert found.tokens == without.tokens
    assert len(found.records) < len(without.records)


def test_tensors_of_the_folder_are_read_apart(tmp_path: Path) -> None:
    model, _ = float_decoder("gpt2")
    place = store(tmp_path / "both", random_heads(model, blocks=False))
    tensors = load_file(place / TENSORS)
    save_file({**tensors, "h.0.table": torch.ones(1)}, place / TENSORS)
    assert set(read_adaptation(place).constants) == {"h.0.table"}
    heads = read_heads(place)
    assert heads is not None
    assert set(heads.tensors) == set(tensors)
