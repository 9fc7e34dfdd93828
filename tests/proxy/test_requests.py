"""Requests that the endpoint accepts, and its errors for those that it does not."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from mergec.runtime.proxy.errors import invalid
from mergec.runtime.proxy.requests import ChatRequest, CompletionRequest

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
PLAIN = {"model": "tiny", "prompt": "hi"}


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
        ({"max_tokens": 0}, "invalid_value", "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "5"}, "invalid_value", "max_tokens", "valid integer"),
        ({"temperature": 3}, "invalid_value", "temperature", "less than or equal to 2"),
        ({"top_p": 0}, "invalid_value", "top_p", "greater than 0"),
        ({"stop": ["a"] * 5}, "invalid_value", "stop", "at most 4"),
        ({"stop": ""}, "invalid_value", "stop.0", "at least 1 character"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs", "needs logprobs"),
        ({"stream_options": {}}, "invalid_value", "stream_options", "requires a stream"),
        ({"messages": []}, "invalid_value", "messages", "at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_value", "messages.0.role", ""),
    ],
)
def test_refusals(more: dict[str, Any], code: str, param: str, message: str) -> None:
    found = refusal(ChatRequest, {**CHAT, **more})
    assert found[:2] == (code, param)
    assert found[2].startswith(f"{param}: ")
    assert message in found[2]


@pytest.mark.parametrize("prompt", [["a", "b"], [], [[1], [2]], 5, [1.5], [True], None])
def test_prompts_that_are_none(prompt: object) -> None:
    assert refusal(CompletionRequest, {**PLAIN, "prompt": prompt})[1] == "prompt"


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
