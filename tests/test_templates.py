"""Chat templates render as transformers renders them, and stay in their sandbox."""

from __future__ import annotations

from typing import Any

import pytest

from mergec.compiler.backend.emit import tokenizer_files
from mergec.runtime.core.errors import PromptError
from mergec.runtime.session.templates import render
from mergec.runtime.session.text import Text

CHAT = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "hé"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "  more?  "},
]

SAME_AS_TRANSFORMERS = {
    "generation": (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    ),
    "generation, trimmed": (
        "{%- for m in messages -%}  {%- generation -%}  {{ m.content }} {%- endgeneration -%} "
        "{%- endfor %}"
    ),
    "no tools": (
        "{% if tools is not none %}TOOLS{% endif %}{% if documents is not none %}DOCS{% endif %}"
        "{% if tools is defined and tools %}T{% endif %}{{ tools }}{{ messages[0].content }}"
    ),
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "tojson, arguments": (
        "{{ messages[1] | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}"
        "{{ '<a href=\"x\">' | tojson(ensure_ascii=False) }}"
    ),
    "loop controls": (
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{{ m.role }}{% endfor %}"
    ),
    "generation prompt": "{{ add_generation_prompt }}{{ bos_token }}{{ eos_token }}{{ unk_token }}",
    "undefined": "{{ nothing }}{{ messages[0].name }}{{ 'x' if thinking is defined else 'y' }}",
    "namespace": (
        "{% set ns = namespace(system='', self=1) %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}{% endfor %}"
        "[{{ ns.system }}]{{ ns.self }}"
    ),
    "dict": "{{ dict(a=1).a }}{{ dict.fromkeys(['x'], 2) }}",
    "blocks": (
        "{% for m in messages %}\n  {% if true %}\n    {{ m.content }}\n  {% endif %}\n{% endfor %}"
    ),
    "date": "{{ strftime_now('%d %B %Y') }}",
    "macro": (
        "{% macro say(m) %}<{{ m.role }}>{% endmacro %}"
        "{% for m in messages %}{{ say(m) }}{% endfor %}"
    ),
    "filters": "{{ messages | map(attribute='content') | map('trim') | join('|') | upper }}",
    "methods": "{{ messages[3].content.strip() }}{{ messages[0].items() | list | length }}",
    "missing": "{% for m in messages %}{{ m.get('tool_calls') }}{{ 'name' in m }}{% endfor %}",
}  # fmt: skip


def tokenizer(template: str) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, "<unk>"))
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    found.chat_template = template
    return found


@pytest.mark.parametrize("name", SAME_AS_TRANSFORMERS)
def test_as_in_transformers(name: str) -> None:
    theirs = tokenizer(SAME_AS_TRANSFORMERS[name])
    wanted = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert Text.from_files(tokenizer_files(theirs), "test").render(CHAT) == wanted
    assert wanted


def test_keys_that_are_none_are_absent() -> None:
    theirs = tokenizer("{% for m in messages %}{{ m.keys() | list }}{{ m.content }}{% endfor %}")
    chat = [{"role": "user", "content": "x", "name": None}, {"role": "assistant", "content": None}]
    wanted = theirs.apply_chat_template(chat, tokenize=False)
    assert Text.from_files(tokenizer_files(theirs), "test").render(chat) == wanted


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__base__ }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.__class__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__ }}",
        "{{ messages[0].content.format.__self__ }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ messages | map(attribute='__class__') | join }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns }}",
        "{{ namespace(__x__=1) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ (messages | attr('__len__'))() }}",
    ],
)
def test_the_sandbox_holds(template: str) -> None:
    """A refusal, or nothing at all: what is undefined renders as empty text."""
    try:
        assert render(template, CHAT, {}).strip("[], ") in ("", ", , , ")
    except PromptError as error:
        assert "the chat template fails" in str(error)
    assert CHAT[0] == {"role": "system", "content": "Be <brief> & kind."}
    assert len(CHAT) == 4


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no\nusers') }}",
        "{% nonsense %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ none.x.y }}",
        "{{ undefined_function() }}",
        "{{ messages | tojson(colour=1) }}",
        "{{ strftime_now(3) }}",
        "{{ range(10 ** 9) | list }}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{{ [].pop() }}",
        "{{ {}['a'].b.c }}",
        "{% include 'x' %}",
    ],
)
def test_whatever_fails_is_one_line(template: str) -> None:
    with pytest.raises(
        PromptError, match=r"the chat template fails \(.+\); use --no-chat"
    ) as error:
        render(template, CHAT, {})
    assert len(str(error.value).splitlines()) == 1


def test_messages_that_are_no_json_values_do_not_reach_the_template() -> None:
    with pytest.raises(PromptError, match="not JSON serializable"):
        render("{{ messages[0].content.read() }}", [{"role": "user", "content": object()}], {})
