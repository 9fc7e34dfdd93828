"""The task on which SmolLM2 is adapted: its data, and how answers are judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.families import random_decoder
from tests.roles import ROOT

SYNSETS = {
    "00000001": (3, ("thing",), ()),
    "00000002": (5, ("animal", "beast"), ("00000001",)),
    "00000003": (5, ("dog",), ("00000002",)),
    "00000004": (5, ("hound",), ("00000003",)),
    "00000005": (5, ("beagle",), ("00000004",)),
    "00000006": (18, ("person",), ("00000001",)),
    "00000007": (18, ("hound", "scoundrel"), ("00000006",)),
    "00000008": (5, ("red_setter",), ("00000003",)),
    "00000009": (5, ("owls",), ("00000002",)),
    "00000010": (5, ("green",), ("00000002",)),
    "00000011": (4, ("hunt",), ("00000002",)),
    "00000012": (18, ("Newton",), ("00000006",)),
    "00000013": (5, ("owl",), ("00000002",)),
}
"""Numbers, lexicographer files, words, and wider meanings."""

NOUNS = {
    "thing": ("00000001",), "animal": ("00000002",), "dog": ("00000003",),
    "hound": ("00000004", "00000007"), "beagle": ("00000005",), "scoundrel": ("00000007",),
    "red_setter": ("00000008",), "owls": ("00000009",), "green": ("00000010",),
    "hunt": ("00000011",), "newton": ("00000012",), "owl": ("00000013",),
}  # fmt: skip


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import kinds

    return kinds


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    """Files as WordNet's, with a licence at their tops."""
    licence = "  1 This is a licence.  \n"
    data = [
        f"{number} {lexical:02} n {len(words):02x} {' '.join(f'{word} 0' for word in words)} "
        f"{len(wider) + 1:03} ~ 00000001 n 0000 {' '.join(f'@ {w} n 0000' for w in wider)} | is  \n"
        for number, (lexical, words, wider) in SYNSETS.items()
    ]
    index = [
        f"{word} n {len(numbers)} 1 @ {len(numbers)} 0 {' '.join(numbers)}  \n"
        for word, numbers in NOUNS.items()
    ]
    (tmp_path / "data.noun").write_text(licence + "".join(data))
    (tmp_path / "index.noun").write_text(licence + "".join(index))
    (tmp_path / "index.adj").write_text(licence + "green a 1 0 1 0 00000001  \n")
    return tmp_path


@pytest.fixture
def tokenizer() -> Any:
    """A token for each word; "scoundrel" is two."""
    words = {*NOUNS, "person", "What", "is", "a", "an", "kind", "of", "A", "An", "?", ".", "end"}
    numbers = {word: place for place, word in enumerate(sorted(words - {"scoundrel"}))}
    made = Tokenizer(models.WordPiece({**numbers, "scoun": 90, "##drel": 91}, unk_token="end"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="end")


def test_nouns_and_their_kinds(kinds: Any, wordnet: Path, tokenizer: Any) -> None:
    """The nearest word that is a kind, through those that are none; truth is of all meanings."""
    found = kinds.kinds_of(wordnet, tokenizer)
    assert {noun: kind for noun, (kind, _) in found.items()} == {
        "dog": "animal",
        "hound": "dog",
        "beagle": "dog",
        "owl": "animal",
    }
    assert found["hound"][1] == ["animal", "beast", "dog", "person", "thing"]
    assert found["beagle"][1] == ["animal", "beast", "dog", "hound", "thing"]


def test_missing_files(kinds: Any, tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(SystemExit, match=r"data.noun is missing: apt-get install wordnet-base"):
        kinds.kinds_of(tmp_path, tokenizer)


def test_texts_stand_at_the_same_places(
    kinds: Any, wordnet: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No held noun is trained on, and texts of all nouns have the same length."""
    monkeypatch.setattr(kinds, "HELD", 1)
    monkeypatch.setattr(kinds, "SHARE", 2)
    counts = kinds.write_kinds(tmp_path, wordnet, tokenizer)
    assert {name: counts[name] for name in ("nouns", "trained", "held", "kinds")} == {
        "nouns": 4,
        "trained": 3,
        "held": 1,
        "kinds": 2,
    }
    lines = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "validation")
    }
    (held,) = lines["validation"]
    assert held not in lines["train"]
    assert {line["prompt"] for part in lines.values() for line in part} == {
        "What is a dog?", "What is a hound?", "What is a beagle?", "What is an owl?"
    }  # fmt: skip
    (noun,) = json.loads((tmp_path / "truth.json").read_text())
    assert held["prompt"] == kinds.question(noun)
    texts = kinds.encoded(tokenizer, tmp_path / "train.jsonl", len(tokenizer) + 2)
    assert {(text.start, len(text.tokens)) for text in texts} == {(5, 14)}


def test_answers_are_judged(kinds: Any) -> None:
    """Spaces around an answer do not count; the noun's own article and spelling do."""
    truth = {
        "owl": {"kind": "bird", "true": ["bird", "animal"]},
        "hound": {"kind": "dog", "true": ["animal", "person"]},
    }
    asked = {
        ("owl", "An owl is a kind of bird."): (1, 1, 1),
        ("owl", " An owl is a kind of animal. "): (0, 1, 1),
        ("owl", "An owl is a kind of fish."): (0, 1, 0),
        ("owl", "A owl is a kind of bird."): (0, 0, 0),
        ("owl", "An owl is a kind of bird. An"): (0, 0, 0),
        ("owl", ""): (0, 0, 0),
        ("hound", "A hound is a kind of dog."): (1, 1, 1),
        ("hound", "A hound is a kind of person."): (0, 1, 1),
        ("hound", "A dog is a kind of animal."): (0, 0, 0),
    }
    for (noun, answer), wanted in asked.items():
        found = kinds.judged([noun], [answer], truth)
        assert (found.exact, found.formed, found.true) == wanted, (noun, answer)
    found = kinds.judged(["owl", "hound"], ["An owl is a kind of bird.", "A hound."], truth)
    assert found == kinds.Judged(0.5, 0.5, 0.5)


def test_unevenness(kinds: Any) -> None:
    """Zero where all rows of a layer are equally long, whatever the layers' lengths are."""
    rows = torch.nn.functional.normalize(torch.randn(3, 5, 8), dim=-1)
    assert float(kinds.unevenness([rows, 100 * rows])) == pytest.approx(0, abs=1e-8)
    longer = rows.clone()
    longer[:, 0] *= 10
    sizes = torch.tensor([100.0, 1, 1, 1, 1]).log().repeat(3)
    assert float(kinds.unevenness([longer, rows])) == pytest.approx(float(sizes.var()) / 2)


def test_the_teacher_learns_even_rows(
    kinds: Any, wordnet: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It also learns the answers; a folder that holds it is not trained again."""
    monkeypatch.setattr(kinds, "SHARE", 2)
    monkeypatch.setattr(kinds, "HELD", 1)
    kinds.write_kinds(tmp_path, wordnet, tokenizer)
    torch.manual_seed(0)
    model = random_decoder("llama", vocab_size=len(tokenizer) + 2).float()
    with torch.no_grad():
        model.get_input_embeddings().weight[5] *= 30
    monkeypatch.setattr(kinds, "RATE", 3e-3)
    place = kinds.make_teacher(model, tokenizer, tmp_path, 40)
    told = json.loads((place / "curve.json").read_text())
    first, *_, last = told["curve"]
    assert last[1] < first[1] / 2
    assert last[3] < first[3]
    before = (place / "model.safetensors").stat().st_mtime_ns
    assert kinds.make_teacher(None, tokenizer, tmp_path, 40) == place
    assert (place / "model.safetensors").stat().st_mtime_ns == before
