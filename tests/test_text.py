"""Text at the client: template, tokens, and streaming of characters that take several tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from mergec.runtime.core.errors import BundleError, PromptError
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
