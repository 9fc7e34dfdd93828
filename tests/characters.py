"""A tiny random decoder of characters: each token is a character, so any answer is valid text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mergec.runtime.core.spec import ROLES
from mergec.runtime.program.bundle import TOKENIZER, role_path, save_bundle
from mergec.runtime.session.text import SETTINGS, TEMPLATE, VOCABULARY
from tests import decoder

SYMBOLS = " abcdefghijk"
END, STOP = "</s>", len(SYMBOLS)
LENGTH = 96
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def files(chat: str | None = CHAT) -> dict[str, bytes]:
    """A tokenizer's files."""
    made = Tokenizer(models.BPE({c: n for n, c in enumerate(SYMBOLS)}, []))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken(END)])
    found = {VOCABULARY: made.to_str().encode(), SETTINGS: json.dumps({"eos_token": END}).encode()}
    return found | ({TEMPLATE: chat.encode()} if chat else {})


def save(path: Path, chat: str | None = CHAT, **manifest: Any) -> Path:
    """Save the decoder's bundles, with a tokenizer in the client's."""
    told = {"model": "tiny", "max_length": LENGTH, "stop_tokens": [STOP], **manifest}
    kept = {f"{TOKENIZER}/{name}": content for name, content in files(chat).items()}
    for role in ROLES:
        program = decoder.program(role, **told)
        save_bundle(program, role_path(path, role), kept if role == "client" else None)
    return path


def ids(text: str) -> list[int]:
    return [SYMBOLS.index(character) for character in text]


def plaintext(path: Path, prompt: str, count: int) -> str:
    """The greedy answer, computed in the clear, up to the stop token."""
    tokens = decoder.plaintext(path, ids(prompt), count)
    return "".join(SYMBOLS[t] if t < STOP else "\n" for t in tokens).partition("\n")[0]
