"""Requests that the endpoint accepts, and its errors for those that it does not."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from mergec.runtime.proxy.errors import invalid
from mergec.runtime.proxy.requests import ChatRequest, CompletionRequest, StreamOptions
from mergec.runtime.session.sampling import Sampling

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
PLAIN = {"model": "tiny", "prompt": "hi"}


def said(**more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "hi", **more}]


def refusal(kind: Any, fields: dict[str, Any]) -> tuple[str, str, str]:
    with pytest.raises(ValidationError) as found:
        kind.model_validate(fields)
    errors = [{**e, "loc": ("body", *e["loc"])} for e in found.value.errors()]
    told = invalid(errors).fields
    return told["code"], told["param"], told["message"]


@pytest.mark.parametrize(
    ("more", "code", "param", "message"),
    [
        ({"n": 2}, "unsupported_value", "n", "not supported"),
        ({"tools": [{"type": "function"}]}, "unsupported_value", "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "unsupported_value", "response_format", ""),
        ({"frequency_penalty": 0.5}, "unsupported_value", "frequency_penalty", ""),
        ({"colour": "red"}, "unknown_parameter", "colour", "not supported"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens", "must be at least 1"),
        ({"max_tokens": "5"}, "invalid_value", "max_tokens", "must be a whole number"),
        ({"temperature": 3}, "invalid_value", "temperature", "must be at most 2"),
        ({"top_p": 0}, "invalid_value", "top_p", "must be above 0"),
        ({"stop": ["a"] * 5}, "invalid_value", "stop", "at most 4"),
        ({"stop": ""}, "invalid_value", "stop.0", "must not be empty"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs", "needs logprobs"),
        ({"stream_options": {}}, "invalid_value", "stream_options", "requires a stream"),
        ({"messages": []}, "invalid_value", "messages", "at least 1 item"),
        ({"messages": None}, "invalid_value", "messages", "must be a list"),
        ({"messages": ["hi"]}, "invalid_value", "messages.0", "must be an object"),
        ({"messages": [{"role": "user"}]}, "invalid_value", "messages.0.content", "must be text"),
        ({"messages": said(content=5)}, "invalid_value", "messages.0.content", "must be text or a"),
        ({"messages": said(content="\ud800")}, "invalid_value", "messages.0.content", "Unicode"),
        ({"messages": said(content=["x"])}, "invalid_value", "messages.0.content.0", "an object"),
        (
            {"messages": said(content=[{"type": "image_url"}])},
            "invalid_value", "messages.0.content.0.type", "must be 'text'",
        ),
        (
            {"messages": said(content=[{"type": "text", "text": "x", "colour": 1}])},
            "unknown_parameter", "messages.0.content.0.colour", "not supported",
        ),
        (
            {"messages": said(tool_calls=[{"id": "1"}])},
            "unsupported_value", "messages.0.tool_calls", "not supported",
        ),
        ({"model": None}, "invalid_value", "model", "must be text"),
        ({"logprobs": 1}, "invalid_value", "logprobs", "must be true or false"),
        ({"temperature": "hot"}, "invalid_value", "temperature", "must be a number"),
        ({"min_p": 2}, "invalid_value", "min_p", "must be at most 1"),
        ({"repetition_penalty": 0}, "invalid_value", "repetition_penalty", "must be above 0"),
        ({"stop": 5}, "invalid_value", "stop", "must be a list"),
        ({"stop": [5]}, "invalid_value", "stop.0", "must be text"),
        ({"stream": True, "stream_options": 1}, "invalid_value", "stream_options", "an object"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "invalid_value", "messages.0.role", "must be 'system', 'developer'",
        ),
    ],
)  # fmt: skip
def test_refusals(more: dict[str, Any], code: str, param: str, message: str) -> None:
    found = refusal(ChatRequest, {**CHAT, **more})
    assert found[:2] == (code, param)
    assert found[2].startswith(f"{param}: ")
    assert message in found[2]
    for internal in ("Input", "validat", "function", "List", "pydantic", "item(s)"):
        assert internal not in found[2]


@pytest.mark.parametrize("prompt", [["a", "b"], [], [[1], [2]], 5, [1.5], [True], None])
def test_prompts_that_are_none(prompt: object) -> None:
    assert refusal(CompletionRequest, {**PLAIN, "prompt": prompt})[1] == "prompt"


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_null_says_the_same_as_nothing(kind: Any) -> None:
    given = CHAT if kind is ChatRequest else PLAIN
    nothing = kind.model_validate(given)
    optional = [name for name, field in kind.model_fields.items() if not field.is_required()]
    assert "stop" in optional
    for name in optional:
        assert kind.model_validate({**given, name: None}) == nothing, name
    streamed = {**given, "stream": True}
    options = dict.fromkeys(StreamOptions.model_fields)
    found = kind.model_validate({**streamed, "stream_options": options}).stream_options
    assert not (found.include_usage or found.include_cost)


def test_an_answer_may_have_no_content() -> None:
    for more in ({}, {"content": None}, {"content": ""}, {"content": [], "tool_calls": []}):
        message = {"role": "assistant", **more, **dict.fromkeys(["name", "refusal", "audio"])}
        found = ChatRequest.model_validate({**CHAT, "messages": [*said(), message, *said()]})
        assert found.messages[1].turn() == {"role": "assistant", "content": ""}


def test_what_steers_a_cache_is_taken() -> None:
    part = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
    found = ChatRequest.model_validate({**CHAT, "messages": said(content=[part])})
    assert found.messages[0].turn()["content"] == "x"


def test_what_a_request_says_of_the_choice() -> None:
    asked = {"top_k": 0, "top_p": 1, "min_p": 0.1, "repetition_penalty": 1, "seed": 5}
    found = ChatRequest.model_validate({**CHAT, **asked}).sampling(None)
    assert found == Sampling(None, 0, 1, 5, 0.1, 1)
    assert ChatRequest.model_validate(CHAT).sampling(0.6) == Sampling(temperature=0.6)
    assert ChatRequest.model_validate({**CHAT, "temperature": 0}).sampling(0.6).greedy


def test_prompts_and_tokens() -> None:
    for prompt, meant in ((["a"], "a"), ([[1, 2]], [1, 2]), ([1, 2], [1, 2]), ("", "")):
        assert CompletionRequest.model_validate({**PLAIN, "prompt": prompt}).prompt == meant
    assert CompletionRequest.model_validate(PLAIN).most_tokens == 16
    assert ChatRequest.model_validate(CHAT).most_tokens is None
    asked = {**CHAT, "max_tokens": 9, "max_completion_tokens": 3}
    assert ChatRequest.model_validate(asked).most_tokens == 3


def test_what_asks_for_nothing_is_taken() -> None:
    neutral = {
        "n": 1, "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "tools": [],
        "tool_choice": "auto", "response_format": {"type": "text"}, "user": "ann",
        "metadata": {"a": "b"}, "parallel_tool_calls": True, "store": False, "seed": None,
    }  # fmt: skip
    echoed = {"role": "assistant", "content": "ho", "refusal": None, "tool_calls": None}
    parts = {"role": "developer", "content": [{"type": "text", "text": t} for t in ("a", "b")]}
    messages = [parts, *CHAT["messages"], echoed]
    found = ChatRequest.model_validate({**CHAT, **neutral, "messages": messages})
    assert [message.turn() for message in found.messages] == [
        {"role": "system", "content": "ab"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
    ]
    assert found.sampling(1.0).temperature == 1.0
    assert ChatRequest.model_validate({**CHAT, "seed": -1}).sampling(0.0).seed == 2**63 - 1
