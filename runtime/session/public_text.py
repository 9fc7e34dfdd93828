"""Public text: the beginning of a prompt that client and server both know.

The server computes its keys and values in the clear, and they enter the caches of a session once.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergec.runtime.core.errors import PartyError, PromptError
from mergec.runtime.core.values import encode
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.program.json_values import is_a
from mergec.runtime.program.program import InputSpec, RoleProgram, is_text
from mergec.runtime.session.conversations import common_length

if TYPE_CHECKING:
    from mergec.runtime.session.text import Text

MOST_PREFIXES = 32
"""Most public texts of one session: each takes memory at all three roles."""

_DIGEST_HEX = 64
_FOLLOWERS = (*string.printable, "\n\n", "\N{LATIN SMALL LETTER E WITH ACUTE}", "\N{EURO SIGN}")
"""Texts that begin in different ways. A token that one of them changes stays secret."""


@dataclass(frozen=True)
class PublicText:
    """A public text, as one role knows it.

    length: the number of its tokens. rows: at the server, its cache rows as fixed-point integers,
    by the caches' names. tokens: at the client, its tokens. head: those before it, which a block
    sees (`session.public_blocks`), likewise; None for a text that begins prompts.
    """

    length: int
    rows: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tokens: Sequence[int] = ()
    head: Sequence[int] | None = None

    @property
    def digest(self) -> str:
        """The name by which client and server compare it, which follows from its tokens."""
        if self.head is None:
            return digest_of_tokens(self.tokens)
        words = bytes.fromhex(digest_of_tokens(self.head) + digest_of_tokens(self.tokens))
        return hashlib.sha256(b"mergec public block\0" + words).hexdigest()


def digest_of_tokens(tokens: Sequence[int]) -> str:
    """The name of a public text: the SHA-256 of its tokens."""
    words = b"".join(token.to_bytes(8, "big") for token in tokens)
    return hashlib.sha256(b"mergec public text\0" + words).hexdigest()


def read_digests(fields: Mapping[str, Any], peer: str) -> list[str]:
    """The public texts that a client names; raises PartyError if they are malformed."""
    found = fields.get("public", [])
    named = isinstance(found, list) and len(found) <= MOST_PREFIXES
    if (
        not named
        or not all(isinstance(x, str) and len(x) == _DIGEST_HEX for x in found)
        or len(set(found)) < len(found)
    ):
        raise PartyError(f"the {peer} names no public text; install the same mergec everywhere")
    return found


def read_lengths(fields: Mapping[str, Any], most: int, peer: str) -> list[int]:
    """The lengths of public texts that a server names; raises PartyError if they are malformed."""
    found = fields.get("public", [])
    named = isinstance(found, list) and len(found) <= MOST_PREFIXES
    if not named or not all(is_a(n, int) and 0 < n <= (most or 1 << 20) for n in found):
        raise PartyError(f"the {peer} names a public text that this program cannot run")
    return found


def public_tokens(text: Text, content: str, chat: bool) -> list[int]:
    """The tokens that a public text begins every prompt with, whatever comes after it.

    chat: the text is the system message of a conversation. Client and server compute the same
    tokens. Those at the end that the next character could change are not among them. If a prompt
    begins with other tokens all the same, it is computed as a whole.
    """
    if not content.strip():
        raise PromptError("the public text is empty; give some")

    def followed(by: str) -> list[int]:
        if not chat:
            return text.encode(content + by)
        system = {"role": "system", "content": content}
        return text.encode_chat([system, {"role": "user", "content": by}])

    found, *others = [followed(by) for by in _FOLLOWERS]
    found = found[: min(common_length(found, other) for other in others)]
    if not found:
        raise PromptError("no token of this public text is the same whatever follows it")
    return found


def prompt_tokens(text: Text, prompt: str, chat: bool, public: str | None = None) -> list[int]:
    """The tokens of a prompt that begins with a public text, if one is given.

    chat: the prompt is the user's message, and the public text the system message; otherwise the
    prompt continues the public text.
    """
    if public is None:
        return text.encode(prompt, chat)
    if not chat:
        return text.encode(public + prompt)
    messages = [{"role": "system", "content": public}, {"role": "user", "content": prompt}]
    return text.encode_chat(messages)


def tokens_of_file(path: Path, text: Text | None) -> list[list[int]]:
    """At the server: the tokens of a public text, for every form in which a client may use it.

    A file of text stands for a system message and, without the chat template, for the beginning of
    a prompt; one with a list of numbers, as [1, 2, 3], for these tokens. text: the model's
    tokenizer, which a list does not need.
    """
    content = read_public_text(path)
    found = listed_tokens(content)
    if found is not None:
        return [found]
    if text is None:
        raise no_tokenizer(path)
    forms = (True, False) if text.has_chat else (False,)
    return [public_tokens(text, content, chat) for chat in forms]


def listed_tokens(content: str) -> list[int] | None:
    """The token numbers that a file lists, as [1, 2, 3]; None if it holds a text."""
    try:
        found = json.loads(content)
    except ValueError:
        return None
    listed = isinstance(found, list) and found and all(is_a(token, int) for token in found)
    return found if listed else None


def no_tokenizer(path: Path) -> PromptError:
    """The error for a file of text where there is no tokenizer."""
    return PromptError(
        f"{path}: needs the model's tokenizer; give --tokenizer, or a file with a list of token "
        "numbers"
    )


def read_public_text(path: Path) -> str:
    """The text of a file, without line breaks at its end."""
    try:
        return path.read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise PromptError(f"{path}: the public text cannot be read ({reason})") from error


def check_text(program: RoleProgram, text: PublicText) -> None:
    """Like `check_public`, for a text as a role knows it; a block has its head before it."""
    check_public(program, text.length and text.length + len(text.head or ()), text.tokens)


def check_public(program: RoleProgram, length: int, tokens: Sequence[int]) -> None:
    """Raise PromptError if a program cannot begin with public text, before anything is sent.

    length: its number of tokens. tokens: these, where they are known.
    """
    manifest = program.manifest
    if program.resends:
        raise PromptError(
            "this program resends its hidden state, so no prompt of it can begin with public text"
        )
    if program.encodes:
        raise PromptError(
            "this program is an encoder-decoder, whose encoder reads a prompt as a whole; leave "
            "public text out"
        )
    if not any(spec.cache_output is not None for spec in program.inputs):
        raise PromptError("this program has no caches, so none can hold public text")
    if not length:
        raise PromptError("the public text is empty; give at least one token")
    vocabulary, limit = manifest.vocab_size, manifest.max_length
    for token in tokens:
        if token < 0 or (vocabulary and token >= vocabulary):
            raise PromptError(
                f"the public text's token {token} is not in the vocabulary of {vocabulary}; use "
                "the model's own tokenizer"
            )
    if limit and length >= limit:
        raise PromptError(
            f"the public text has {length} tokens, which leaves no room in this program's "
            f"{limit}; shorten it, or compile with a larger max_length"
        )


def plain_rows(
    plain: PlainExecutor,
    tokens: Sequence[int],
    begun: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Cache rows of tokens in the clear, by the caches' names; begun: those of tokens before."""
    caches = [spec for spec in plain.program.inputs if spec.cache_output is not None]
    (given,) = [spec.name for spec in plain.program.inputs if is_text(spec)]
    ids = torch.tensor([list(tokens)], dtype=torch.int64)
    outputs = [spec.cache_output for spec in caches if spec.cache_output is not None]
    found = plain.step({given: ids, **plain.start(), **(begun or {})}, outputs)
    count = len(tokens)
    return {
        spec.name: found[output].narrow(past_of(spec), -count, count)
        for spec, output in zip(caches, outputs, strict=True)
    }


def past_of(cache: InputSpec) -> int:
    """The dimension of a cache along which tokens are."""
    return cache.shape.index("past")


def encoded_rows(program: RoleProgram, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cache rows as fixed-point integers of the caches' fractional bits."""
    fracs = {spec.name: spec.frac for spec in program.inputs}
    return {name: encode(values, fracs[name]) for name, values in rows.items()}
