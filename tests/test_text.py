"""Text at the client: template, tokens, and streaming of characters that take several tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
)

from mergec.runtime.core.errors import BundleError, PromptError
from mergec.runtime.proxy.reader import Reader
from mergec.runtime.session.text import SETTINGS, TEMPLATE, VOCABULARY, Stream, Text

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A byte-level tokenizer: each byte a token, so that `ü` takes two."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: n for n, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
    tokenizer.add_special_tokens([AddedToken(mark) for mark in marks])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.save(str(tmp_path / VOCABULARY))
    (tmp_path / SETTINGS).write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    (tmp_path / TEMPLATE).write_text(CHAT)
    return tmp_path


HI = [{"role": "user", "content": "hi"}]


def test_plain_and_chat(folder: Path) -> None:
    text = Text.load(folder)
    assert text.has_chat
    assert text.decode(text.encode("hi you")) == "hi you"
    assert text.encode("hi")[0] == 256, "the tokenizer's own start token"
    assert text.render(HI) == "<|user|>hi</s><|assistant|>"
    chat = text.encode("hi", chat=True)
    assert (chat[0], chat[-1], len(chat)) == (258, 259, 5)


def test_streaming_waits_for_whole_characters(folder: Path) -> None:
    text = Text.load(folder)
    shown: list[str] = []
    stream = Stream(text, shown.append)
    for token in text.encode("aü→b"):
        stream.token(token)
    assert stream.end() == "aü→b"
    assert shown == ["a", "ü", "→", "b"]


def test_streaming_shows_a_broken_character_at_the_end(folder: Path) -> None:
    text = Text.load(folder)
    shown: list[str] = []
    stream = Stream(text, shown.append)
    for token in text.encode("aü")[:-1]:
        stream.token(token)
    assert stream.end() == "a\N{REPLACEMENT CHARACTER}" == "".join(shown)


def test_no_template(folder: Path) -> None:
    (folder / TEMPLATE).unlink()
    text = Text.load(folder)
    assert not text.has_chat
    with pytest.raises(PromptError, match="--no-chat"):
        text.encode("hi", chat=True)


def test_template_in_the_settings_and_one_that_refuses(folder: Path) -> None:
    (folder / TEMPLATE).unlink()
    settings = {"chat_template": "{{ raise_exception('no users') }}"}
    (folder / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(PromptError, match="no users"):
        Text.load(folder).render(HI)


def test_a_template_cannot_reach_out(folder: Path) -> None:
    (folder / TEMPLATE).write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(PromptError, match="template fails"):
        Text.load(folder).render(HI)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe"])
def test_damaged_files(folder: Path, content: bytes) -> None:
    (folder / VOCABULARY).write_bytes(content)
    with pytest.raises(BundleError, match="cannot be read"):
        Text.load(folder)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no tokenizer\.json"):
        Text.load(tmp_path)


def test_settings_that_are_none(folder: Path) -> None:
    (folder / SETTINGS).write_text("[]")
    with pytest.raises(BundleError, match="cannot be read"):
        Text.load(folder)


def test_stored_truncation_and_padding_are_off(folder: Path) -> None:
    """Any training loop leaves them in the file."""
    whole = Text.load(folder).encode("a text of many tokens"), Text.load(folder).encode("a")
    stored = Tokenizer.from_file(str(folder / VOCABULARY))
    stored.enable_truncation(4)
    stored.enable_padding(length=8)
    stored.save(str(folder / VOCABULARY))
    text = Text.load(folder)
    assert (text.encode("a text of many tokens"), text.encode("a")) == whole
    assert text.encode("hi", chat=True) == [258, *text.encode("hi")[1:], 257, 259]


def test_a_text_that_the_tokenizer_cannot_encode(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({"a": 0}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / VOCABULARY))
    for prompt in ("b", "\ud800"):
        with pytest.raises(PromptError, match="cannot encode this text") as caught:
            Text.load(folder).encode(prompt)
        assert len(str(caught.value).splitlines()) == 1


# Bytes of tokens.


def byte_level(words: list[str]) -> Text:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: n for n, c in enumerate([*alphabet, *words])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|ü|>"])
    return Text(made, {}, None)


def sentencepiece(words: list[str], *, strip: bool = True) -> Text:
    """Words with the decoder of Llama 2 and Mistral, and tokens of single bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    made = Tokenizer(models.BPE({w: n for n, w in enumerate(pieces)}, [], unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strip else [])])
    made.add_special_tokens(["<s>"])
    return Text(made, {}, None)


def test_bytes_of_a_byte_level_vocabulary() -> None:
    text = byte_level(["Ġthe", "ing"])
    for said in ("é👋", "a\n\t\x00\x7f\xad", "日本 語"):
        assert b"".join(map(text.bytes_of, text.encode(said))) == said.encode()
    assert sorted(text.bytes_of(token)[0] for token in range(256)) == list(range(256))
    assert text.bytes_of(256) == b" the"
    assert text.bytes_of(258) == "<|ü|>".encode(), "a special token, by its name"


def test_bytes_of_a_sentencepiece_vocabulary() -> None:
    text = sentencepiece(["▁Paris", "▁", "is", "▁▁▁x"])
    assert [text.bytes_of(257 + n) for n in range(4)] == [b" Paris", b" ", b"is", b"   x"]
    assert [text.bytes_of(1 + byte) for byte in range(256)] == [bytes([b]) for b in range(256)]
    assert text.bytes_of(261) == b"<s>"


@pytest.mark.parametrize(
    ("decoder", "piece", "expected"),
    [
        (decoders.Metaspace(), "▁a", b" a"),
        (decoders.Metaspace("_"), "_a▁", " a▁".encode()),
        (decoders.BPEDecoder("</w>"), "word</w>", b"word "),
        (decoders.Fuse(), "▁é", "▁é".encode()),
        (decoders.Sequence([decoders.Strip("_", 1, 1), decoders.Fuse()]), "__a_", b"_a"),
        (decoders.WordPiece(), "##ing", b"ing"),
        (decoders.WordPiece(), "word", b" word"),
        (None, "word", b" word"),
        (decoders.Replace(Regex("a"), "b"), "aa", b"bb"),
    ],
)
def test_bytes_by_the_decoder(decoder: object, piece: str, expected: bytes) -> None:
    made = Tokenizer(models.WordLevel({"first": 0, piece: 1}, "first"))
    if decoder is not None:
        made.decoder = decoder
    text = Text(made, {}, None)
    assert text.bytes_of(1, [0]) == expected
    assert text.bytes_of(99) == b"", "no such token"


# A completion continues its prompt.


def test_a_continuation_keeps_its_space() -> None:
    text = sentencepiece(["▁The", "▁capital", "▁is", "▁Paris", "."])
    prompt, answer = [257, 258, 259], [260, 261]
    assert text.decode(prompt + answer) == "The capital is Paris."
    assert text.decode(answer) == "Paris."
    assert text.decode(answer, prompt) == " Paris."
    shown: list[str] = []
    stream = Stream(text, shown.append, prompt)
    for token in answer:
        stream.token(token)
    assert stream.end() == " Paris."
    assert shown == [" Paris", "."]


def test_a_continuation_of_special_tokens_begins_a_text() -> None:
    text = sentencepiece(["▁Paris"])
    assert text.decode([257], [258]) == "Paris"


def test_a_continuation_completes_a_character() -> None:
    text = byte_level([])
    whole = text.encode("aé👋b")
    for cut in range(len(whole)):
        continued = text.decode(whole[cut:], whole[:cut])
        assert text.decode(whole[:cut]).rstrip("\ufffd") + continued == "aé👋b"


def test_a_stop_string_may_begin_with_a_space() -> None:
    text = sentencepiece(["▁The", "▁Paris", "."])
    reader = Reader(text, [" Paris"], best=0, after=[257])
    pieces = [reader.token(257), reader.token(258, torch.zeros(260))]
    assert [piece.text for piece in pieces] == [" The", ""]
    assert reader.stopped
