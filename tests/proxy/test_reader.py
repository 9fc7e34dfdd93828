"""Text of an answer: stop strings across tokens, characters across tokens, log-probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mergec.runtime.proxy.reader import Reader
from mergec.runtime.session.text import Text
from tests import characters

TEXT = Text.from_files(characters.files(), "test")


def read(reader: Reader, text: str) -> tuple[list[str], list]:
    """The text returned after each token and at the end, up to a stop string, and all places."""
    pieces = []
    for token in characters.ids(text):
        pieces.append(reader.token(token, torch.arange(13.0)))
        if reader.stopped:
            break
    pieces.append(reader.end())
    return [piece.text for piece in pieces], [place for piece in pieces for place in piece.places]


def test_what_may_be_a_stop_string_is_held_back() -> None:
    given_, _ = read(Reader(TEXT, ["cab"]), "ccacab")
    assert given_ == ["", "c", "", "ca", "", "", ""]
    assert read(Reader(TEXT, ["cab"]), "aca")[0] == ["a", "", "", "ca"], "it was none after all"


@given(
    st.text("ab", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=4),
)
def test_the_answer_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    # The token that first completes a stop string ends the answer, whatever would have come after.
    seen = text[: min(ends)] if ends else text
    whole = min((seen.find(stop) for stop in stops if stop in seen), default=len(seen))
    reader = Reader(TEXT, stops, best=1)
    pieces, places = read(reader, text)
    assert "".join(pieces) == seen[:whole]
    assert reader.stopped == bool(ends)
    assert [place.chosen.text for place in places] == list(seen[:whole])
    assert [place.offset for place in places] == list(range(whole))


def test_places_name_the_best_tokens() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, *[-50.0] * 10])
    (place,) = Reader(TEXT, best=2).token(2, logits).places
    total = 1 + math.exp(3) + math.exp(1)
    assert (place.chosen.text, place.chosen.bytes) == ("b", [98])
    assert place.chosen.logprob == pytest.approx(1 - math.log(total))
    assert [(o.text, o.logprob) for o in place.best] == [
        ("a", pytest.approx(3 - math.log(total))),
        ("b", pytest.approx(1 - math.log(total))),
    ]
    assert Reader(TEXT, best=0).token(12, logits).places[0:1] == (), "it has no text yet"


def test_a_character_of_several_tokens() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: n for n, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = Text.from_files({"tokenizer.json": tokenizer.to_str().encode()}, "test")
    reader = Reader(text, ["→"], best=0)
    pieces = [reader.token(token, torch.zeros(256)) for token in text.encode("aü→b")[:6]]
    assert [piece.text for piece in pieces] == ["a", "", "ü", "", "", ""]
    assert [len(piece.places) for piece in pieces] == [1, 0, 2, 0, 0, 0]
    half, other = (place.chosen for place in pieces[2].places)
    assert (half.bytes, other.bytes) == ([0xC3], [0xBC])
    assert (half.text, half.name) == ("\\xc3", "bytes:\\xc3")
    assert reader.stopped
