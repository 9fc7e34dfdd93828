"""The token sequences that a compile measures on: by default, and as given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from mergec.compiler.backend.emit import tokenizer_files
from mergec.compiler.config import CompileConfig
from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.calibration import calibration

VOCAB, LIMIT = 256, 40
MODEL: Any = SimpleNamespace(vocab_size=VOCAB, max_length=LIMIT, encodes=False)


def fast(model: Any, *special: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    made.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=made)


def of_bytes(*special: str) -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return fast(models.BPE({c: n for n, c in enumerate(alphabet)}, []), *special)


def test_without_a_tokenizer() -> None:
    first, second = calibration(CompileConfig(), MODEL)
    assert first == list(reversed(second))
    assert len(set(first)) == 32
    assert max(first) < VOCAB


def test_with_a_tokenizer() -> None:
    spread, *sentences = calibration(CompileConfig(), MODEL, of_bytes())
    assert spread == calibration(CompileConfig(), MODEL)[0]
    assert len(sentences) == 3
    assert all(len(tokens) == 32 for tokens in sentences)


def test_tokens_that_the_model_does_not_know_are_left_out() -> None:
    """An added token, of a model that was not resized."""
    tokenizer = of_bytes("<|im_start|>")
    assert tokenizer("<|im_start|>")["input_ids"] == [VOCAB]
    *_, chat = calibration(CompileConfig(), MODEL, tokenizer)
    assert len(chat) == 31
    assert max(chat) < VOCAB


@pytest.mark.parametrize(
    "model",
    [
        models.BPE({c: n for n, c in enumerate("αβγδ")}, []),
        models.WordLevel({c: n for n, c in enumerate("αβγδ")}, "none"),
        models.WordLevel({"x": 999}, "x"),
    ],
    ids=["encodes nothing", "raises", "encodes what the model does not know"],
)
def test_a_tokenizer_that_knows_no_sentence_is_as_none(model: Any) -> None:
    found = calibration(CompileConfig(), MODEL, fast(model))
    assert found == calibration(CompileConfig(), MODEL)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (((),), "prompt 0 is empty"),
        (((1,), range(41)), "prompt 1 has 41 tokens, .* at most 40; shorten it"),
        (((1, 256),), "prompt 0 holds the token 256, which is not in the vocabulary of 256"),
        (((-1,),), "holds the token -1"),
        (((1.5,),), "1.5"),
        (((True,),), "True"),
        ((("a",),), "'a'"),
        (("text",), "prompt 0 is 'text'; it must be a sequence of token numbers"),
        ((5,), "prompt 0 is 5; it must be a sequence of token numbers"),
    ],
)
def test_a_given_sequence_must_run(given: Any, words: str) -> None:
    with pytest.raises(CompileError, match=words) as caught:
        calibration(CompileConfig(calibration=given), MODEL)
    assert len(str(caught.value).splitlines()) == 1


def test_given_sequences_are_used() -> None:
    given: Any = ((1, 2), [3], range(4), (np.int64(5),))
    found = calibration(CompileConfig(calibration=given), MODEL)
    assert list(found) == [(1, 2), (3,), (0, 1, 2, 3), (5,)]
    unknown: Any = SimpleNamespace(vocab_size=0, max_length=0)
    assert calibration(CompileConfig(calibration=((10**6,) * 99,)), unknown)


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        ("gpt2", "of the class str; give one of Hugging Face"),
        (Tokenizer(models.BPE()), "of the class Tokenizer; give one of Hugging Face"),
    ],
)
def test_what_is_no_tokenizer(tokenizer: Any, words: str) -> None:
    with pytest.raises(CompileError, match=words):
        tokenizer_files(tokenizer)


class Unsavable:
    """A tokenizer whose `save_pretrained` writes one file, or raises."""

    def __init__(self, files: dict[str, str] | None) -> None:
        self._files = files

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1]}

    def save_pretrained(self, folder: str) -> None:
        from pathlib import Path

        if self._files is None:
            raise NotImplementedError
        for name, text in self._files.items():
            (Path(folder) / name).write_text(text)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, "Unsavable cannot be saved: NotImplementedError"),
        ({"vocab.txt": "a"}, "is saved without a tokenizer.json"),
        ({"tokenizer.json": "{"}, "the tokenizer Unsavable: the tokenizer cannot be read"),
    ],
)
def test_a_tokenizer_that_the_client_could_not_read(files: Any, words: str) -> None:
    with pytest.raises(CompileError, match=words) as caught:
        tokenizer_files(Unsavable(files))
    assert len(str(caught.value).splitlines()) == 1
