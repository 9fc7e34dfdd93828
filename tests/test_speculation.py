"""Several tokens a step: what drafts, how many, and that answers stay what they are."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mergec.compiler.backend.cost import cost_report
from mergec.compiler.config import CompileConfig
from mergec.compiler.driver import compile_decoder
from mergec.compiler.errors import CompileError
from mergec.compiler.program import Program
from mergec.runtime.cli import app
from mergec.runtime.core.errors import BundleError, MergecError, PromptError
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.program.generation_settings import GenerationSettings
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.roles.inprocess import InProcessSession
from mergec.runtime.roles.local import run_local
from mergec.runtime.session.drafting import Drafter, Speculation
from mergec.runtime.session.drafting.datastore import Datastore, read_texts
from mergec.runtime.session.drafting.draft_model import DraftModel
from mergec.runtime.session.drafting.drafter import Target, drafters, read
from mergec.runtime.session.drafting.lookup import Lookup
from mergec.runtime.session.drafting.medusa import Medusa
from mergec.runtime.session.drafting.pace import Acceptance, Seconds, best_count
from mergec.runtime.session.drafting.recycle import Recycle
from mergec.runtime.session.drafting.retrieve import Retrieve
from mergec.runtime.session.drafting.tree import Tree
from mergec.runtime.session.generation import answer
from mergec.runtime.session.plain import PlainSession
from mergec.runtime.session.sampling import Sampling
from mergec.runtime.session.text import Text
from tests import characters, decoder, session
from tests.sampled import BEST, DRAWS, FIRST, HEAT, LAW, ByLastToken, check_law
from tests.services import deployment

MOST = 4
PROMPT = [5, 1, 7]


class Fixed(Drafter):
    """Drafts what a function of the tokens so far says."""

    name = "fixed"

    def __init__(self, rule: Any) -> None:
        self.rule = rule

    @classmethod
    def open(cls, place: str, target: Target) -> Fixed:
        raise NotImplementedError

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        return list(self.rule(list(tokens)))[:most]


class Remembering(PlainExecutor):
    """Computes each step once: answers to one prompt share most of them, whatever is drafted."""

    def __init__(self, program: RoleProgram) -> None:
        super().__init__(program)
        self._known: dict[Any, dict[str, torch.Tensor]] = {}

    def step(
        self, inputs: dict[str, torch.Tensor], outputs: Sequence[str] | None = None
    ) -> dict[str, torch.Tensor]:
        given = tuple((name, _content(value)) for name, value in inputs.items())
        key = given, None if outputs is None else tuple(outputs)
        if key not in self._known:
            self._known[key] = super().step(inputs, outputs)
        return dict(self._known[key])


def _content(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    words = None if value.is_meta else value.numpy().tobytes()
    return value.dtype, value.shape, words


@functools.cache
def _executor() -> PlainExecutor:
    """Must not be modified."""
    return Remembering(decoder.program(speculate_up_to=MOST))


def plain(**manifest: Any) -> PlainSession:
    if not manifest:
        return PlainSession(_executor())
    told = {"speculate_up_to": MOST, **manifest}
    return PlainSession(PlainExecutor(decoder.program(**told)))


def run(drafter: Drafter | None, tokens: int | None = MOST, **options: Any) -> list[Any]:
    manifest = options.pop("manifest", {})
    made = None if drafter is None else Speculation(drafter, tokens)
    given = {"max_tokens": 12, **options}
    return list(answer(plain(**manifest), PROMPT, speculation=made, **given))


def oracle(right: Sequence[int], wrong_at: int = 99) -> Fixed:
    """Drafts the tokens of a known answer, with a mistake after so many."""

    def rule(tokens: list[int]) -> list[int]:
        ahead = list(right[len(tokens) - len(PROMPT) :])
        return [(t + (place == wrong_at)) % 13 for place, t in enumerate(ahead)]

    return Fixed(rule)


GREEDY = [token.token for token in run(None)]


# ---------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize("most", [1, 2, MOST])
@pytest.mark.parametrize("wrong_at", [0, 1, 2, 99])
def test_greedy_answers_are_those_without_drafts(most: int, wrong_at: int) -> None:
    found = run(oracle(GREEDY, wrong_at), most)
    assert [token.token for token in found] == GREEDY
    reports = [report for token in found for report in token.reports]
    assert sum(report.tokens for report in reports[1:]) == len(GREEDY) - 1
    steps = [(report.new, report.drafted, report.accepted) for report in reports[1:]]
    assert all(new == 1 + drafted for new, drafted, _ in steps)
    # Each step gives the right drafts and one token more; the last may have less to draft.
    expected = 1 + min(wrong_at, most)
    assert all(1 + accepted == expected for _, _, accepted in steps[:-1])
    assert len(steps) == math.ceil((len(GREEDY) - 1) / expected)


def test_any_drafter_leaves_greedy_and_seeded_answers_alone() -> None:
    random = np.random.default_rng(3)
    wild = Fixed(lambda _: random.integers(0, 13, random.integers(0, 7)).tolist())
    for sampling in (Sampling(), Sampling(temperature=1.5, seed=8), Sampling(2.0, 5, 0.9, 9)):
        without = [token.token for token in run(None, sampling=sampling)]
        for drafter in (wild, oracle(without), Lookup(), Recycle(), Fixed(lambda _: [])):
            for tokens in (MOST, None):
                found = run(drafter, tokens, sampling=sampling)
                assert [token.token for token in found] == without


def test_the_first_drafter_that_has_drafts_makes_the_line() -> None:
    def rule(tokens: list[int]) -> list[int]:
        return GREEDY[len(tokens) - len(PROMPT) :] if len(tokens) % 2 else []

    second = oracle(GREEDY, wrong_at=1)
    both = Speculation([Fixed(rule), second], MOST)
    found = list(answer(plain(), PROMPT, max_tokens=12, speculation=both))
    assert [token.token for token in found] == GREEDY
    steps = [report for token in found for report in token.reports][1:]
    for step in steps[:-1]:
        odd = (step.past + 1) % 2 == 1
        assert step.accepted == (min(MOST, len(GREEDY) - step.past - 1 + len(PROMPT)) if odd else 1)
    assert Speculation([], 2).fill([5], 2) == [5, 5]


def test_processors_see_the_history_of_each_position() -> None:
    pytest.importorskip("transformers")
    settings = GenerationSettings(repetition_penalty=1.8, no_repeat_ngram_size=2)
    manifest = {"generation": settings, "stop_tokens": [12]}
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=4)):
        without = run(None, sampling=sampling, manifest=manifest)
        assert [token.token for token in without] != GREEDY
        right = [token.token for token in without]
        for wrong_at in (1, 99):
            found = run(oracle(right, wrong_at), sampling=sampling, manifest=manifest)
            assert [token.token for token in found] == right
            for mine, theirs in zip(found, without, strict=True):
                assert float((mine.logits - theirs.logits).abs().max()) < 1e-4


def test_sampled_tokens_have_the_distribution_of_the_model() -> None:
    """Four tokens, each one of three: 800 draws with good drafts, and 800 with bad ones."""
    likely = int(LAW[FIRST].argmax())
    stub = ByLastToken(PlainExecutor(decoder.program(speculate_up_to=MOST)))
    for drafter in (
        Fixed(lambda tokens: [int(LAW[tokens[-1]].argmax()), likely, likely]),
        Fixed(lambda tokens: [int((LAW[tokens[-1]] > 0).nonzero()[-1]), 0, 0]),
    ):
        seen: Counter[tuple[int, ...]] = Counter()
        drafted = 0
        for seed in range(DRAWS):
            sampling = Sampling(temperature=HEAT, top_k=BEST, seed=seed)
            made = Speculation(drafter, MOST)
            found = answer(stub, [FIRST], max_tokens=4, sampling=sampling, speculation=made)
            tokens = list(found)
            drafted += sum(report.accepted for token in tokens for report in token.reports)
            seen[tuple(token.token for token in tokens)] += 1
        assert drafted > DRAWS / 4, "drafts were accepted"
        check_law(seen, 4)


def test_a_stop_token_within_a_run_ends_the_answer() -> None:
    place = next(i for i in range(2, 9) if GREEDY[i] not in GREEDY[:i])
    found = run(oracle(GREEDY), stop=(GREEDY[place],))
    assert [token.token for token in found] == GREEDY[: place + 1]
    accepted = [report for token in found for report in token.reports][-1].accepted
    assert accepted <= MOST


def test_no_draft_goes_beyond_the_answer_or_the_program() -> None:
    for count in (1, 2, 3, 13):
        steps: list[tuple[int, int]] = []
        found = run(
            Fixed(lambda tokens: [1] * 9),
            max_tokens=count,
            announce=lambda *lengths, steps=steps: steps.append(lengths),
        )
        assert len(found) == count
        assert max(new + past for new, past in steps) <= len(PROMPT) + count - 1


def test_what_cannot_be_drafted_is_refused() -> None:
    made = Speculation(Lookup())
    with pytest.raises(PromptError, match="compile with speculate_up_to=7"):
        next(answer(plain(speculate_up_to=0), PROMPT, max_tokens=3, speculation=made))
    with pytest.raises(PromptError, match="which fixed_length is to hide"):
        next(answer(plain(), PROMPT, max_tokens=3, speculation=made, fixed_length=True))
    _, program = session.compiled("gpt2", preset="merge-er")
    resending = PlainSession(PlainExecutor(program.roles["server"]))
    with pytest.raises(PromptError, match="no caches to roll back"):
        next(answer(resending, PROMPT, max_tokens=3, speculation=made))
    # A bundle that says that it checks drafts, and gives one result.
    lying = plain(speculate_up_to=0)
    lying.program.manifest = replace(lying.program.manifest, speculate_up_to=3)
    with pytest.raises(BundleError, match="does not check drafts"):
        list(answer(lying, PROMPT, max_tokens=9, speculation=Speculation(oracle(GREEDY), 2)))


# ---------------------------------------------------------------------------------- how many


def best_length(seconds: list[float], acceptance: float) -> int:
    """For drafts in a line, each of which is right with this probability if those before it are."""
    return best_count(seconds, Tree.line([1] * (len(seconds) - 1)).chances(acceptance))


def test_the_best_length_weighs_time_and_chance() -> None:
    assert best_length([1.0, 1.0, 1.0, 1.0], 0.5) == 3, "free drafts"
    assert best_length([1.0, 2.0, 3.0, 4.0], 0.99) == 0, "each costs a step"
    assert best_length([1.0, 1.2, 1.4, 1.6], 0.1) == 0
    assert best_length([1.0, 1.2, 1.4, 1.6], 0.95) == 3
    assert best_length([1.0], 1.0) == 0
    # By hand: 1.5 / 1.2 = 1.25 and 1.75 / 1.5 = 1.17.
    assert best_length([1.0, 1.2, 1.5], 0.5) == 1


def test_acceptance_and_seconds_follow_what_is_seen() -> None:
    acceptance = Acceptance()
    assert acceptance.value == 0.5
    acceptance.learn([4, 5, 6], [4, 9])
    assert 0.4 < acceptance.value < 0.6
    for _ in range(30):
        acceptance.learn([1, 2], [1, 2, 3])
    assert acceptance.value > 0.95
    for _ in range(30):
        acceptance.learn([1, 2], [7])
    assert acceptance.value < 0.05
    seconds = Seconds({1: 1.0, 4: 4.0})
    assert seconds.of(4) == pytest.approx([1, 2, 3, 4])
    for _ in range(50):
        seconds.learn(1, 10.0)
        seconds.learn(3, 11.0)
    assert seconds.of(3) == pytest.approx([10, 10.5, 11], rel=0.02)
    assert min(Seconds({1: 5.0}).of(3)) == 5.0


def test_a_drafter_that_is_never_right_is_given_up_and_one_that_is_gets_on() -> None:
    made = Speculation(Fixed(lambda _: [1, 1, 1, 1]))
    made.begin(decoder.program(speculate_up_to=MOST), 3)
    for _ in range(30):
        count = len(made.draft([1], 9))
        made.learn(1 + count, 1.0 + count, [2])
    assert made.draft([1], 9) == []
    for _ in range(60):  # what it would have drafted is compared all the same
        count = len(made.draft([1], 9))
        made.learn(1 + count, 1.0 + 0.01 * count, [1, 1, 1, 1, 1][: count + 1])
    assert made.draft([1], 9) == [1, 1, 1, 1]


# ---------------------------------------------------------------------------------- drafters


def test_lookup_drafts_what_followed_the_longest_match() -> None:
    look = Lookup()
    assert look.draft([1, 2, 3, 9, 1, 2, 3, 8, 5, 2, 3], 3) == [8, 5, 2]
    assert look.draft([1, 2, 3, 9, 7, 2, 3, 8, 1, 2, 3], 2) == [9, 7], "longer before later"
    assert look.draft([1, 2, 3], 3) == look.draft([4], 3) == look.draft([4, 5, 6, 4], 3) == []
    assert look.draft([1, 1, 1], 4) == [1]
    random = np.random.default_rng(0)
    for _ in range(400):
        ids = random.integers(0, random.integers(3, 9), random.integers(1, 20)).tolist()
        ids += [int(t) if random.random() < 0.9 else 9 for t in ids]
        best: list[int] = []
        for length in range(2, min(16, len(ids) - 1) + 1):
            ends = [e for e in range(length, len(ids)) if ids[e - length : e] == ids[-length:]]
            best = ids[ends[-1] : ends[-1] + 3] if ends else best
        for changed in (1, 2, 3):
            known = ids[:-changed]
            ends = [e for e in range(8, len(known)) if known[e - 8 : e] == known[-8:]]
            if ends and not best:
                best = ids[ends[-1] + changed : ends[-1] + changed + 3]
        assert look.draft(ids, 3) == best


def test_lookup_goes_on_behind_what_was_changed() -> None:
    look, text = Lookup(), [*range(1, 14), 0, *range(2, 10)]
    assert look.draft([*text, 99], 2) == [11, 12]
    assert look.draft([*text, 99, 98], 3) == [12, 13, 0]
    assert look.draft([*text, 99, 98, 97], 3) == [13, 0, 2]
    assert look.draft([*text, 99, 98, 97, 96], 3) == [], "too many were changed"
    assert look.draft([*range(1, 14), 0, *range(3, 10), 99], 2) == [], "too few before them"
    assert look.tree([*text, 99], 2) == Tree.line([11, 12])


def test_recycled_tokens_are_the_likeliest_behind_the_same_ones() -> None:
    recycle = Recycle()
    logits = torch.full((2, 20), -20.0)
    logits[0, [3, 5, 4]] = torch.tensor([0.6, 0.3, 0.1]).log()
    logits[1, [7, 8]] = torch.tensor([0.9, 0.1]).log()
    recycle.expect([2, 3], logits)
    assert recycle.draft([1, 2], 4) == [3, 7], "the likeliest behind each, until none is known"
    assert recycle.draft([1, 2], 1) == [3]
    assert recycle.draft([1, 2, 9], 4) == [], "nothing is known behind it"
    tree = recycle.tree([1, 2, 9, 2], 4)
    assert (tree.tokens, tree.parents) == ([3, 7, 5, 4], [0, 1, 0, 0])
    assert tree.shares == pytest.approx([0.6, 0.9, 0.3, 0.1])
    recycle.expect([2], torch.nn.functional.one_hot(torch.tensor([6]), 20).float() * 9)
    assert recycle.draft([1, 2, 9, 2], 1) == [6], "what was seen last"
    recycle.expect([6, 7], torch.tensor([[1], [6]]))  # revealed tokens
    assert recycle.draft([1, 2, 9, 2, 7], 4) == [6, 1]
    assert recycle.tree([1, 2, 9, 2, 7], 3).tokens == [6, 1]
    assert recycle.draft([1, 3, 7], 4) == [], "another text"


@pytest.mark.parametrize("parents", [[0, 1, 2], [0, 0, 2]])
def test_drafters_are_told_what_each_step_gives(parents: list[int]) -> None:
    """Behind each token and each draft, right or wrong: the logits of that text."""
    seen: list[tuple[list[int], torch.Tensor]] = []

    class Listening(Fixed):
        def expect(self, tokens: Sequence[int], rows: torch.Tensor) -> None:
            seen.append((list(tokens), rows))

        def tree(self, tokens: Sequence[int], most: int) -> Tree:
            drafts = self.draft(tokens, min(most, 3))
            return Tree(drafts, parents[: len(drafts)], [0.4] * len(drafts))

    # Of a line the first one is right; of a tree the second and the third.
    line, whole = parents == [0, 1, 2], [*PROMPT, *GREEDY]
    listening = Listening(
        lambda t: [*whole[len(t) :][:1], 5, 6] if line else [5, *whole[len(t) :][:2]]
    )
    made = Speculation(listening, 3, tree=True)
    found = list(answer(plain(), PROMPT, max_tokens=12, speculation=made))
    assert [token.token for token in found] == GREEDY
    assert len(seen) == sum(len(token.reports) for token in found)
    right = wrong = 0
    length = len(PROMPT)
    for tokens, rows in seen:
        texts = [whole[:length]]
        for token, parent in zip(tokens[1:], parents, strict=False):
            texts.append([*texts[parent], token])
        assert tokens[0] == whole[length - 1]
        for text, row in zip(texts, rows, strict=True):
            expected = next(answer(plain(), text, max_tokens=1)).logits
            assert float((row - expected).abs().max()) < 1e-4
        good = [text for text in texts if text == whole[: len(text)]]
        right, wrong = right + len(good) - 1, wrong + len(texts) - len(good)
        length = max(map(len, good)) + 1
    assert right
    assert wrong


def test_recycling_repeats_what_an_answer_repeats() -> None:
    """A decoder whose next token depends on the last one alone, so its answer goes in a circle."""
    stub = ByLastToken(PlainExecutor(decoder.program(speculate_up_to=MOST)))
    without = list(answer(stub, [FIRST], max_tokens=12))
    for tree in (False, True):
        made = Speculation(Recycle(), MOST, tree=tree)
        found = list(answer(stub, [FIRST], max_tokens=12, speculation=made))
        assert [token.token for token in found] == [token.token for token in without]
        circle = len({token.token for token in found})
        steps = [report for token in found for report in token.reports]
        assert sum(not report.accepted for report in steps) <= 1 + circle
        assert max(report.accepted for report in steps) == MOST


def test_retrieval_finds_the_longest_match_and_the_most_frequent_continuation(
    tmp_path: Path,
) -> None:
    pytest.importorskip("pydivsufsort")
    random = np.random.default_rng(1)
    texts = [random.integers(0, 4, random.integers(1, 60)).tolist() for _ in range(8)]
    texts.append([49151, 300, 70000, 49151, 300, 70000])
    Datastore.of(texts, "v").save(tmp_path / "store")
    store = Datastore.load(tmp_path / "store")
    assert store.size == sum(map(len, texts))
    for _ in range(100):
        end = random.integers(0, 4, 12).tolist()
        places: list[tuple[int, int]] = []
        for length in range(1, 13):
            found = [
                (row, at + length)
                for row, text in enumerate(texts)
                for at in range(len(text) - length + 1)
                if text[at : at + length] == end[-length:]
            ]
            places = found or places
        mine = store.followers(end, 1, 16, 10_000)
        starts = np.cumsum([0, *(len(text) + 1 for text in texts)])
        assert mine.tolist() == sorted(int(starts[row]) + at for row, at in places)
    assert Retrieve(store).draft([5, 49151, 300], 4) == [70000, 49151, 300, 70000]
    assert Retrieve(store).draft([77, 78], 4) == []
    frequent = Datastore.of([[1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 5, 7], [1, 2, 5, 7]], "v")
    assert Retrieve(frequent).draft([9, 1, 2], 5) == [5, 7], "and not into the next text"


def test_a_datastore_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pydivsufsort")
    text = Text.from_files(characters.files(), "test")
    with pytest.raises(PromptError, match="holds no datastore"):
        read("retrieve:x")[0][0].open(str(tmp_path), Target(12, text))
    Datastore.of([[1, 2, 3]], "another").save(tmp_path / "d")
    with pytest.raises(PromptError, match="was built for another tokenizer"):
        Retrieve.open(str(tmp_path / "d"), Target(12, text))
    with pytest.raises(PromptError, match="this program has none to compare"):
        Retrieve.open(str(tmp_path / "d"), Target(12, None))
    Datastore.of([[1, 2, 3]], text.vocabulary_hash).save(tmp_path / "e")
    assert Retrieve.open(str(tmp_path / "e"), Target(12, text)).draft([0, 1, 2], 3) == [3]
    for content in (b"", b"x" * 100):
        (tmp_path / "e/datastore.safetensors").write_bytes(content)
        with pytest.raises(PromptError, match="build it again"):
            Datastore.load(tmp_path / "e")
    with pytest.raises(PromptError, match="hold no text"):
        Datastore.of([], "v")
    (tmp_path / "bad").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "bad.jsonl").write_text('{"texts": 1}\n')
    for name in ("bad", "bad.jsonl", "none"):
        with pytest.raises(PromptError, match=f"{name}: "):
            read_texts([tmp_path / name])
    (tmp_path / "good.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert read_texts([tmp_path / "good.jsonl"]) == ["a", "b"]


def test_chat_templates_do_not_change_what_tokens_stand_for() -> None:
    files = characters.files()
    same = [Text.from_files(characters.files(chat), "test") for chat in (None, characters.CHAT)]
    assert same[0].vocabulary_hash == same[1].vocabulary_hash
    changed = files["tokenizer.json"].replace(b'"b"', b'"x"')
    other = Text.from_files({**files, "tokenizer.json": changed}, "test")
    assert other.vocabulary_hash != same[0].vocabulary_hash


def test_a_draft_model_with_a_sliding_window_starts_again_after_a_wrong_draft() -> None:
    """Its cache cannot go back behind what the window has dropped."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=13, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=24,
        sliding_window=4, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).eval()
    drafter = DraftModel(model)
    for tokens in ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 0], [1, 2, 3, 4, 5, 6, 8, 1]):
        whole = list(tokens)
        for _ in range(4):
            whole.append(int(model(torch.tensor([whole])).logits[0, -1].argmax()))
        assert drafter.draft(tokens, 4) == whole[-4:]


def test_a_draft_model_says_what_it_would_generate(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=13, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=24,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    text = Text.from_files(characters.files(), "test")
    with pytest.raises(PromptError, match=r"holds no model with a tokenizer\.json"):
        DraftModel.open(str(tmp_path), Target(13, text))
    for name, content in characters.files().items():
        (tmp_path / name).write_bytes(content)
    drafter = DraftModel.open(str(tmp_path), Target(13, text))
    for tokens in ([1, 2, 3], [1, 2, 3, 4], [1, 2, 9], [5], [1, 2, 9, 9, 9]):
        whole = list(tokens)
        for _ in range(4):
            whole.append(int(model(torch.tensor([whole])).logits[0, -1].argmax()))
        assert drafter.draft(tokens, 4) == whole[-4:]
    assert [len(drafter.draft([1] * n, 4)) for n in (21, 22, 23, 24)] == [4, 3, 2, 1]
    assert drafter.draft([1] * 25, 4) == []
    changed = (tmp_path / "tokenizer.json").read_text().replace('"b"', '"x"')
    (tmp_path / "tokenizer.json").write_text(changed)
    with pytest.raises(PromptError, match="has another tokenizer"):
        DraftModel.open(str(tmp_path), Target(13, text))


def test_drafters_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"lookup", "recycle", "retrieve", "draft", "medusa"} <= set(drafters())
    for wrong in ("look", "lookup:x", "retrieve", "retrieve:", "draft:", "lookup:"):
        with pytest.raises(
            PromptError, match="it can be: draft:DIR, lookup, medusa, recycle, retrieve:DIR, none"
        ):
            read(wrong)
    assert read("lookup+retrieve:a+b/c+medusa") == [
        (Lookup, ""), (Retrieve, "a+b/c"), (Medusa, "")
    ]  # fmt: skip
    for wrong in ("lookup+", "+lookup", "lookup+look", "lookup+retrieve", "lookup+none"):
        with pytest.raises(PromptError, match="several joined by"):
            read(wrong)
    manifest = decoder.program(speculate_up_to=2).manifest
    assert Speculation.open("none", None, manifest, None) is None
    both = Speculation.open("lookup+lookup", 2, manifest, None)
    assert both is not None
    assert [type(drafter) for drafter in both.drafters] == [Lookup, Lookup]
    assert isinstance(Speculation.open("lookup", 2, manifest, None), Speculation)
    with pytest.raises(PromptError, match="needs speculate"):
        Speculation.open("none", 3, manifest, None)
    with pytest.raises(PromptError, match="can be 1 or more"):
        Speculation.open("lookup", 0, manifest, None)

    class Point:
        value, group = "package:Fixed", "mergec.drafters"

        def load(self) -> Any:
            return self.made

    point = Point()
    where = "mergec.runtime.session.drafting.drafter.offered"
    monkeypatch.setattr(where, lambda group: [point] if group == "mergec.drafters" else [])
    for made, said in ((Fixed, ""), (int, "is not a named subclass"), (Lookup2, "two drafters")):
        drafters.cache_clear()
        point.made = made
        if said:
            with pytest.raises(PromptError, match=said):
                drafters()
        else:
            assert drafters()["fixed"] is Fixed
    monkeypatch.undo()
    drafters.cache_clear()


class Lookup2(Lookup):
    """Another one of the same name."""


# ---------------------------------------------------------------------------------- programs


@pytest.mark.parametrize(
    "family",
    ["llama", *(pytest.param(family, marks=pytest.mark.slow) for family in ("gpt2", "gemma2"))],
)
def test_a_step_with_drafts_gives_what_single_steps_give(family: str, tmp_path: Path) -> None:
    _, several = session.compiled(family, speculate_up_to=MOST)
    _, single = session.compiled(family)
    fast, slow = (PlainSession(PlainExecutor(p.roles["server"])) for p in (several, single))
    one, other = fast.rows(6, 0, [1, 2, 3, 4, 5, 6]), slow.rows(6, 0, [1, 2, 3, 4, 5, 6])
    assert one.shape == other.shape == (1, one.shape[-1])  # type: ignore[union-attr]
    for count in range(1, MOST + 2):
        ids = [7, 8, 9, 10, 11][:count]
        rows = fast.rows(count, 6, ids)
        steps = torch.cat([slow.rows(1, 6 + i, [token]) for i, token in enumerate(ids)])  # type: ignore[misc]
        assert rows.shape == steps.shape  # type: ignore[union-attr]
        assert float((rows - steps).abs().max()) < 1e-5
    assert len(fast.rows(MOST + 2, 6, [1] * (MOST + 2))) == 1  # type: ignore[arg-type]
    for new, past in ((1, 9), (6, 0), (2, 0), (MOST + 2, 3)):
        costs = [cost_report(p.roles["client"], new, past).total for p in (several, single)]
        assert costs[0] == costs[1], "steps without drafts cost what they cost"
    assert any(change.name == "hoist_last_position" for change in several.history.changes)
    several.save(tmp_path)
    loaded = Program.load(tmp_path)
    assert loaded.manifest.speculate_up_to == MOST
    assert loaded.manifest.shapes["outputs"][loaded.any_role.outputs[0]]["shape"][1] == "rows"
    rounds = {cost_report(several.roles["client"], new, 9).total.rounds for new in (1, MOST + 1)}
    assert len(rounds) == 1


@pytest.mark.parametrize(
    "options",
    [{}, {"reveal": "token"}, pytest.param({"network": "wan"}, marks=pytest.mark.slow)],
)
def test_the_parties_check_drafts(options: dict[str, Any]) -> None:
    _, program = session.compiled("llama", speculate_up_to=MOST, **options)
    clear = PlainSession(PlainExecutor(program.roles["server"]))
    clear.step(3, 0, [1, 2, 3])
    with InProcessSession(program.roles) as parties:
        parties.step([1, 2, 3], 0)
        for ids, past in (([4, 5, 6, 7], 3), ([9, 9], 5), ([8], 6)):
            mine, theirs = clear.rows(len(ids), past, ids), parties.rows(ids, past)
            assert mine.shape == theirs.shape  # type: ignore[union-attr]
            assert len(theirs) == len(ids)
            if options.get("reveal"):
                assert theirs.shape[1] == 1
                assert torch.equal(mine.long(), theirs.long())  # type: ignore[union-attr]
            else:
                assert float((mine - theirs).abs().max()) < 2e-2
            predicted = cost_report(program.roles["client"], len(ids), past).total
            found = parties.record.total
            assert (found.rounds, found.online) == (predicted.rounds, predicted.online)


def test_programs_that_cannot_check_drafts_are_refused() -> None:
    with pytest.raises(CompileError, match="resend_hidden"):
        CompileConfig(speculate_up_to=2, preset="merge-er")
    with pytest.raises(CompileError, match="can be 0 to 31"):
        CompileConfig(speculate_up_to=32)

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(11, 4)
            self.head = torch.nn.Linear(4, 11)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(ids))  # type: ignore[no-any-return]

    with pytest.raises(CompileError, match="needs a decoder with a cache"):
        compile_decoder(Plain(), config=CompileConfig(max_length=16, speculate_up_to=2))


# ---------------------------------------------------------------------------------- sessions


def test_clients_of_services_get_several_tokens_a_step(tmp_path: Path) -> None:
    folder = characters.save(tmp_path / "bundles", speculate_up_to=MOST)
    prompt = characters.ids("abcab")
    expected = decoder.plaintext(folder, prompt, 20)
    with deployment(folder, serve=("--tokens", "20")) as services:
        with services.connection() as connection:
            right = Fixed(lambda tokens: expected[len(tokens) - len(prompt) :])
            wrong = Fixed(lambda tokens: [0, 0, 0, 0])
            for drafter in (right, wrong, "lookup", None):
                found = list(
                    connection.generate(
                        prompt,
                        max_tokens=20,
                        stop=(),
                        speculate=drafter,
                        speculate_tokens=drafter and MOST,
                    )
                )
                assert [token.token for token in found] == expected
                steps = [report for token in found for report in token.reports]
                assert sum(report.tokens for report in steps[1:]) == 19
                if drafter is right:
                    assert len(steps) == 1 + math.ceil(19 / (1 + MOST))
            with pytest.raises(PromptError, match="it can be"):
                next(connection.generate(prompt, speculate="loop"))
            assert connection.is_open
        steps = [line for line in services.server.log if line["event"] == "session ended"]
        assert len(steps) <= 1


@pytest.mark.slow
def test_three_processes_draft(tmp_path: Path) -> None:
    folder = decoder.save(tmp_path, speculate_up_to=MOST)
    result = run_local(folder, PROMPT, max_tokens=12, speculate="lookup", speculate_tokens=3)
    assert result.tokens == GREEDY
    assert sum(record.tokens for record in result.records[1:]) == 11
    assert any(record.drafted for record in result.records)
    with pytest.raises(PromptError, match="it can be"):
        run_local(folder, PROMPT, max_tokens=3, speculate="loop")
    with pytest.raises(PromptError, match="compile with speculate_up_to"):
        single = decoder.save(tmp_path / "single")
        run_local(single, PROMPT, max_tokens=3, speculate="lookup")


def test_stored_randomness_is_for_single_tokens(tmp_path: Path) -> None:
    from mergec.runtime.session.requests import Plan

    folder = decoder.save(tmp_path / "bundles", speculate_up_to=MOST)
    key = tmp_path / "key"
    key.write_text("00" * 32)
    stores = ("--stores", str(tmp_path / "server"), "--store-key", str(key))
    with deployment(folder, serve=stores) as services:
        place, _ = services.connection().prepare(Plan(1, 3, 4), tmp_path / "mine", b"\0" * 32)
        from mergec.runtime.session.stores.reader import Store

        opened = Store.open(place, b"\0" * 32)
        with services.connection(dealer=None, store=opened) as connection:
            with pytest.raises(PromptError, match="dealt for one token a step"):
                next(connection.generate(PROMPT, max_tokens=3, speculate="lookup"))
            found = [token.token for token in connection.generate(PROMPT, max_tokens=3)]
            assert found == GREEDY[:3]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pydivsufsort", None)
    with pytest.raises(MergecError, match=r"mergec\[datastore\]"):
        Datastore.of([[1]], "v")


def test_the_command_line_builds_a_datastore(tmp_path: Path) -> None:
    pytest.importorskip("pydivsufsort")
    folder = characters.save(tmp_path / "bundles", speculate_up_to=MOST)
    (tmp_path / "a.txt").write_text("abcabcabd")
    given = ["datastore", "build", str(tmp_path / "a.txt"), "-o", str(tmp_path / "store")]
    done = CliRunner().invoke(app, [*given, "--bundle", str(folder)])
    assert "9 tokens of 1 texts" in done.output, done.output
    text = Text.load(folder / "client/tokenizer")
    drafter = Retrieve.open(str(tmp_path / "store"), Target(0, text))
    assert drafter.draft(characters.ids("kab"), 1) == characters.ids("c")
