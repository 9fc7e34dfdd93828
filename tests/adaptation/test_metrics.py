from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergec.compiler.adaptation.config import AdaptConfig
from mergec.compiler.adaptation.data import Encoded
from mergec.compiler.adaptation.losses import IGNORED, collate
from mergec.compiler.adaptation.metrics import (
    agreement,
    distinct,
    missing,
    text_scores,
    wordnet,
)
from mergec.compiler.adaptation.report import Report
from mergec.compiler.errors import CompileError


def test_agreement_counts_places() -> None:
    assert agreement([[1, 2, 3], [4]], [[1, 9, 3], [4]]) == 3 / 4
    assert agreement([[1, 2]], [[1, 2, 3, 4]]) == 1 / 2
    assert agreement([], []) == 0


def test_answers_end_with_their_first_stop_token() -> None:
    """As a program's do; the tokens after it were never learned, and say nothing."""
    from mergec.compiler.adaptation.train import Measures

    class Fixed:
        limit = None
        encodes = False

        def generate(self, prompts: list[tuple[int, ...]], count: int) -> list[list[int]]:
            return [[7, 0, 5, 0], [7, 8, 9, 6], [0, 1, 2, 3]][: len(prompts)]

    texts = [Encoded((1, 2, 7, 8), 2)] * 3
    config = AdaptConfig(preset="merge", samples=3, answer=4).complete()
    student: Any = Fixed()
    assert Measures(student, texts, config, [0]).wanted == [[7, 0], [7, 8, 9, 6], [0]]
    assert Measures(student, texts, config).wanted[0] == [7, 0, 5, 0]


def test_distinct_counts_over_all_answers() -> None:
    assert distinct([[1, 2, 1], [1, 2]], 1) == 2 / 5
    assert distinct([[1, 2, 1], [1, 2]], 2) == 2 / 3
    assert distinct([[1]], 2) == 0


@pytest.mark.skipif(bool(missing()), reason="the extra `adapt` is not installed")
def test_scores_of_text() -> None:
    same = ["the dog runs over the green hill", "a cat sleeps on the warm stone wall"]
    perfect = text_scores(same, [[text] for text in same])
    perfect.pop("METEOR", None)
    assert perfect == pytest.approx({"BLEU": 100, "chrF++": 100, "ROUGE-L": 100})
    # The best of several references counts, and a text may have fewer than another.
    several = text_scores(same, [[same[0]], ["nothing alike", same[1]]])
    several.pop("METEOR", None)
    assert several == pytest.approx(perfect)
    far = text_scores(["x y z w", "q r s t"], [[text] for text in same])
    assert max(far.values()) < 10


def unread() -> Any:
    """nltk's WordNet before it is looked for."""
    from nltk.corpus.reader.wordnet import WordNetCorpusReader
    from nltk.corpus.util import LazyCorpusLoader

    return LazyCorpusLoader("wordnet", WordNetCorpusReader, None)


def write_wordnet(folder: Path) -> None:
    """nltk's files of a WordNet that knows a dog, which is a hound, and a cat."""
    words = ("cat", "dog hound")
    header, data, index = "  1 a license\n", "  1 a license\n", {}
    for names in words:
        offset, lemmas = len(data), names.split()
        listed = " ".join(f"{lemma} 0" for lemma in lemmas)
        index |= {lemma: f"{lemma} n 1 0 1 0 {offset:08d}  \n" for lemma in lemmas}
        data += f"{offset:08d} 05 n {len(lemmas):02x} {listed} 000 | an animal  \n"
    folder.mkdir(parents=True)
    for part in ("noun", "verb", "adj", "adv"):
        (folder / f"data.{part}").write_text(data if part == "noun" else header)
        lines = "".join(index[word] for word in sorted(index)) if part == "noun" else ""
        (folder / f"index.{part}").write_text(header + lines)
        (folder / f"{part}.exc").touch()
    for name in ("cntlist.rev", "index.sense"):
        (folder / name).touch()
    (folder / "lexnames").write_text("".join(f"{n:02d}\tpart{n}\t1\n" for n in range(45)))


def test_meteor_knows_words_of_one_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the formula of Banerjee and Lavie (2005) with nltk's defaults, alpha .9, beta 3, gamma .5:
    all words match in one chunk, which costs half of (1 / words) cubed."""
    nltk = pytest.importorskip("nltk", reason="the extra `adapt` is not installed")
    write_wordnet(tmp_path / "corpora" / "wordnet")
    monkeypatch.setattr("nltk.corpus.wordnet", unread())
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    matched = 100 * (1 - 0.5 / 3**3)
    for text in ("the dog runs", "the hound runs"):
        assert text_scores([text], [["the dog runs"]])["METEOR"] == pytest.approx(matched)
    # Two of three words, in two chunks: precision and recall are 2/3, and the penalty is a half.
    cat = text_scores(["the cat runs"], [["the dog runs"]])["METEOR"]
    assert cat == pytest.approx(100 * 2 / 3 * 0.5)
    both = text_scores(["the hound runs"], [["the cat sits", "the dog runs"]])
    assert both["METEOR"] == pytest.approx(matched), "the best reference counts"


def test_without_its_data_meteor_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nltk = pytest.importorskip("nltk", reason="the extra `adapt` is not installed")
    monkeypatch.setattr("nltk.corpus.wordnet", unread())
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    assert wordnet() is None
    assert "METEOR" not in text_scores(["a b c d"], [["a b c d"]])
    rows = [{"name": "the model", "BLEU": 1.0}]
    said = Report(tmp_path, AdaptConfig(), rows, [], 1, 1).to_markdown()
    assert "Not measured: METEOR, which needs WordNet" in said


def test_without_the_packages_scores_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert missing() == ["sacrebleu", "rouge_score"]
    assert text_scores(["a"], [["a"]]) == {}


def test_batches_are_padded_at_their_ends() -> None:
    batch = collate([Encoded((5, 6, 7), 2), Encoded((8, 9), 1)])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7], [IGNORED, 9, IGNORED]]
    assert torch.equal(batch["kept"], torch.tensor([[True, True, True], [True, True, False]]))


def test_recipes() -> None:
    paper = AdaptConfig().complete()
    assert (paper.noise, paper.dropout, paper.evaluate_training) == (0.7, 0.6, False)
    assert (paper.steps, paper.batch, paper.learning_rate) == (50_000, 16, 8e-5)
    assert (paper.objective, paper.cosine, paper.evaluate_every) == ("data", 0.75, 5_000)
    run = AdaptConfig(recipe="as-run").complete()
    assert (run.noise, run.dropout, run.evaluate_training) == (0.2, 0.7, True)
    other = AdaptConfig(preset="thex", recipe="as-run", steps=7).complete()
    assert (other.noise, other.dropout, other.evaluate_training) == (0, 0, False)
    assert (other.objective, other.evaluate_every, other.log_every) == ("teacher", 1, 1)
    assert AdaptConfig(noise=0.1).complete().noise == 0.1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"preset": "exact"}, "there is nothing to train; choose one of: mpcformer-2quad"),
        ({"preset": "fast"}, "unknown preset 'fast'; there are: mpcformer-2quad"),
        ({"enable": "quadratic_gelu"}, "enable"),
        ({"format": "csv"}, "format is 'csv'; it can be: auto, text"),
        ({"recipe": "mine"}, "recipe is 'mine'; it can be: paper, as-run"),
        ({"objective": "both"}, "objective is 'both'; it can be: data, teacher"),
        ({"steps": 0}, "steps is 0; it can be 1 or more"),
        ({"dropout": 1.0}, "dropout is 1; it can be 0 to 0.99"),
        ({"cosine": -0.1}, "cosine is -0.1; it can be 0 to 1"),
        ({"chat": 1}, "chat"),
        ({"resent": 1, "resent_ramp": 1.5}, "resent_ramp is 1.5; it can be 0 to 1"),
        ({"resent_ramp": 0.5}, "resent_ramp is for rows that are resent; set resent, too"),
        ({"layer_weight": -1}, r"layer_weight is -1; it can be 0 to 1e\+06"),
    ],
)
def test_wrong_options(options: dict, said: str) -> None:
    with pytest.raises(CompileError, match=said.replace("(", r"\(")):
        AdaptConfig(**options)
