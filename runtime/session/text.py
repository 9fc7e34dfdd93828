"""Converts text to tokens and back at the client, with the tokenizer files in its bundle.

It needs only the packages `tokenizers` and `jinja2`, so a client need not install transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from mergec.runtime.core.errors import BundleError, PromptError

VOCABULARY, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
FILES = (VOCABULARY, SETTINGS, TEMPLATE)
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Text:
    """A tokenizer and, if the model has one, its chat template."""

    def __init__(
        self, tokenizer: Tokenizer, settings: dict[str, Any], template: str | None
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._special = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in settings.items()
            if key.endswith("_token") and isinstance(value, (str, dict))
        }

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
        except Exception as error:  # the tokenizers package raises nothing narrower
            raise BundleError(
                f"{where}: the tokenizer cannot be read ({error}); compile again"
            ) from error
        template = template or settings.get("chat_template")
        return cls(tokenizer, settings, template if isinstance(template, str) else None)

    @property
    def has_chat(self) -> bool:
        return self._template is not None

    def encode(self, prompt: str, chat: bool = False) -> list[int]:
        """Tokens of a prompt; `chat` applies the chat template to it as the user's message."""
        if chat:
            return self.encode_chat([{"role": "user", "content": prompt}])
        return list(self._tokenizer.encode(prompt).ids)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Tokens of a conversation, each message with its `role` and `content`."""
        return list(self._tokenizer.encode(self.render(messages), add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def piece(self, token: int, after: Sequence[int] = ()) -> str:
        """The text that a token adds after the tokens before it; of a special token, its name."""
        # Some tokenizers drop the space before a text's first word; one token of context is enough.
        before = list(after[-1:])
        added = self.decode([*before, token])[len(self.decode(before)) :]
        return added or str(self._tokenizer.id_to_token(token) or "")

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Apply the chat template to messages."""
        if self._template is None:
            raise PromptError("this model has no chat template; use --no-chat")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        try:
            return environment.from_string(self._template).render(
                messages=list(messages),
                add_generation_prompt=True,
                **self._special,
            )
        except jinja2.TemplateError as error:
            raise PromptError(f"the chat template fails ({error}); use --no-chat") from error


class Stream:
    """Turns tokens into text, in whole characters: a character may take several tokens."""

    def __init__(self, text: Text, write: Callable[[str], object]) -> None:
        self._text, self._write = text, write
        self._ids: list[int] = []
        self._shown = ""

    def token(self, token: int) -> None:
        self._ids.append(token)
        self._show(self._text.decode(self._ids).rstrip(_REPLACEMENT))

    def end(self) -> str:
        """Write the rest; returns the whole text."""
        whole = self._text.decode(self._ids)
        self._show(whole)
        return whole

    def _show(self, whole: str) -> None:
        if len(whole) > len(self._shown) and whole.startswith(self._shown):
            self._write(whole[len(self._shown) :])
            self._shown = whole


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)
