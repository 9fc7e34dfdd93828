"""Chat templates: Jinja in a sandbox, with the same tag, filters and functions as in transformers.

A template comes with a bundle, so it is a stranger's program. It can read the conversation and
nothing else: the sandbox refuses attributes of Python objects and changes of what it is given.
transformers' own environment is not used, because a client need not have transformers, and because
a prompt must not depend on what is installed. The tests compare both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from mergec.runtime.core.errors import PromptError


def render(template: str, messages: Sequence[Mapping[str, Any]], special: Mapping[str, str]) -> str:
    """The prompt of a conversation, ready for the model's answer.

    messages: JSON values, each with `role` and `content`; keys that are None are dropped, as
    templates test whether a key is there. special: special tokens by name. Raises PromptError, in
    one line, for whatever goes wrong in the template.
    """
    try:
        # A copy of plain values: objects would bring methods that the sandbox does not know.
        turns = [
            {key: value for key, value in message.items() if value is not None}
            for message in json.loads(json.dumps([dict(message) for message in messages]))
        ]
        return (
            _environment()
            .from_string(template)
            .render(
                messages=turns,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **special,
            )
        )
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise PromptError(f"the chat template fails ({said[:200]}); use --no-chat") from error


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


class _Generation(Extension):
    """The tag `{% generation %}`, which marks the answer for training, and changes nothing here."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_same")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _same(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """The function `dict` without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """A namespace without names that begin with an underscore, which lead into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        found = dict(*args[1:], **kwargs)
        for name in found:
            _check_name(name)
        Namespace.__init__(args[0], found)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes what HTML would read.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
