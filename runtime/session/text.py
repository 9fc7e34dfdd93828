"""Converts text to tokens and back at the client, with the tokenizer files in its bundle.

It needs only the packages `tokenizers` and `jinja2`, so a client need not install transformers.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mergec.runtime.core.errors import BundleError, PromptError
from mergec.runtime.program.json_values import canonical
from mergec.runtime.session.templates import render
from mergec.runtime.session.vocabulary import Vocabulary

VOCABULARY, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
FILES = (VOCABULARY, SETTINGS, TEMPLATE)
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Text:
    """A tokenizer and, if the model has one, its chat template."""

    def __init__(
        self, tokenizer: Tokenizer, settings: dict[str, Any], template: str | None
    ) -> None:
        # A file may store how a training loop cut and padded its texts; a prompt is used whole.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._vocabulary = Vocabulary(tokenizer)
        self._template = template
        named = {
            key: value.get("content") if isinstance(value, dict) else value
            for key, value in settings.items()
            if key.endswith("_token")
        }
        self._special = {key: value for key, value in named.items() if isinstance(value, str)}

    @classmethod
    def load(cls, folder: str | Path) -> Text:
        """Read the tokenizer's files; raises BundleError if they are missing or damaged."""
        place = Path(folder)
        files = {name: place / name for name in FILES}
        found = {name: file.read_bytes() for name, file in files.items() if file.is_file()}
        return cls.from_files(found, str(place))

    @classmethod
    def given(cls, path: str | Path) -> Text:
        """A user's own tokenizer: a folder as in `load`, or a `tokenizer.json` without template.

        Raises BundleError if there is none at `path`, or if it is damaged.
        """
        place = Path(path)
        if not place.is_file():
            return cls.load(place)
        try:
            return cls.from_files({VOCABULARY: place.read_bytes()}, str(place))
        except OSError as error:
            raise BundleError(f"{place}: cannot be read ({error.strerror})") from error

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], where: str) -> Text:
        """Like `load`, from the contents of the files; errors name `where`."""
        if VOCABULARY not in files:
            raise BundleError(f"{where}: has no {VOCABULARY}; compile with a tokenizer")
        try:
            tokenizer = Tokenizer.from_str(files[VOCABULARY].decode())
            settings = json.loads(files.get(SETTINGS, b"{}"))
            template = files[TEMPLATE].decode() if TEMPLATE in files else None
            if not isinstance(settings, dict):
                raise TypeError(f"{SETTINGS} holds no settings")
        except Exception as error:  # the tokenizers package raises nothing narrower
            raise BundleError(
                f"{where}: the tokenizer cannot be read ({error}); compile again"
            ) from error
        template = template or settings.get("chat_template")
        return cls(tokenizer, settings, template if isinstance(template, str) else None)

    @functools.cached_property
    def vocabulary_hash(self) -> str:
        """SHA-256, in hexadecimal, of what decides which text each token number stands for, and
        how text becomes tokens. Chat templates and special tokens around a text are left out.
        """
        told = json.loads(self._tokenizer.to_str())
        kept = {
            key: told.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")
        }
        return hashlib.sha256(canonical(kept)).hexdigest()

    @property
    def has_chat(self) -> bool:
        return self._template is not None

    def encode(self, prompt: str, chat: bool = False) -> list[int]:
        """Tokens of a prompt; `chat` applies the chat template to it as the user's message."""
        if chat:
            return self.encode_chat([{"role": "user", "content": prompt}])
        return self._ids(prompt, special=True)

    def encode_part(self, text: str) -> list[int]:
        """Tokens of a part of a text, without those that a tokenizer puts around a whole one."""
        return self._ids(text, special=False)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokens of a conversation, each message with its `role` and `content`."""
        return self._ids(self.render(messages), special=False)

    def _ids(self, text: str, *, special: bool) -> list[int]:
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=special).ids)
        except Exception as error:  # the tokenizers package raises nothing narrower
            said = " ".join(str(error).split())
            raise PromptError(
                f"the model's tokenizer cannot encode this text ({said[:200]})"
            ) from error

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text of tokens, without special tokens; after: the tokens that it continues.

        Many tokenizers drop the space before a text's first word, so a text that continues another
        one is decoded together with it.
        """
        if not after:
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
        before, whole = self.decode(after), self.decode([*after, *ids])
        # If the tokens before end within a character, the continuation completes it.
        for start in (before, before.rstrip(_REPLACEMENT)):
            if whole.startswith(start):
                return whole[len(start) :]
        return self.decode(ids)

    def bytes_of(self, token: int, after: Sequence[int] = ()) -> bytes:
        """The bytes that a token stands for; of a special token, those of its name.

        after: the tokens before it, for tokenizers whose vocabulary does not say the bytes.
        """
        known = self._vocabulary.bytes_of(token)
        if known is not None:
            return known
        # One token of context is enough to see the space between two words.
        added = self.decode([token], after[-1:])
        return (added or str(self._tokenizer.id_to_token(token) or "")).encode()

    def template(self) -> str:
        """The chat template; raises PromptError if the model has none."""
        if self._template is None:
            raise PromptError(
                "this model has no chat template; use --no-chat, or for `mergec chat` a model that "
                "has one"
            )
        return self._template

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Apply the chat template to messages."""
        return render(self.template(), messages, self._special)


class Stream:
    """Turns tokens into text, in whole characters: a character may take several tokens."""

    def __init__(
        self, text: Text, write: Callable[[str], object], after: Sequence[int] = ()
    ) -> None:
        """after: the tokens of a prompt that the text continues; none if it stands alone."""
        self._text, self._write, self._after = text, write, tuple(after)
        self._ids: list[int] = []
        self._shown = ""

    def token(self, token: int) -> None:
        self._ids.append(token)
        self._show(self._text.decode(self._ids, self._after).rstrip(_REPLACEMENT))

    def end(self) -> str:
        """Write the rest; returns the whole text."""
        whole = self._text.decode(self._ids, self._after)
        self._show(whole)
        return whole

    def _show(self, whole: str) -> None:
        if len(whole) > len(self._shown) and whole.startswith(self._shown):
            self._write(whole[len(self._shown) :])
            self._shown = whole
