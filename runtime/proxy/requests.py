"""Requests: the parameters of OpenAI's API that are supported.

A parameter that would change an answer and is not supported is rejected by name, unless its value
requests nothing. Parameters that only identify the user, or only steer a cache, are accepted and
ignored. Every parameter that may be left out may also be null, which says the same.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    field_validator,
)
from pydantic_core import PydanticCustomError

from mergec.runtime.session.sampling import Sampling

MOST_STOPS, MOST_LOGPROBS, MOST_COMPLETION_LOGPROBS = 4, 20, 5
COMPLETION_TOKENS = 16
"""Tokens of a completion if the request sets no limit, as in OpenAI's API."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
"""Unsupported parameters, and the values of them that request nothing."""


def _unicode(text: str) -> str:
    """Reject lone surrogates, which JSON can express and no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("invalid_value", "is not Unicode text") from error
    return text


Words = Annotated[str, AfterValidator(_unicode)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _few(value: list[str] | None) -> list[str] | None:
    if value is not None and len(value) > MOST_STOPS:
        raise PydanticCustomError("invalid_value", f"may hold at most {MOST_STOPS} texts")
    return value


def _once(value: list[int] | None) -> list[int] | None:
    if value is not None and len(set(value)) < len(value):
        raise PydanticCustomError("invalid_value", "names a block twice; name each once")
    return value


def _as_prompt(value: Any) -> str | list[int]:
    """The single prompt of a list of prompts."""
    several = isinstance(value, list) and value and isinstance(value[0], (str, list))
    if several and len(value) > 1:
        raise PydanticCustomError(
            "unsupported_value", "one prompt at a time; send several requests"
        )
    found = value[0] if several else value
    whole = isinstance(found, list) and found and all(type(item) is int for item in found)
    if not whole and not isinstance(found, str):
        raise PydanticCustomError("invalid_value", "must be text or a list of token numbers")
    return _unicode(found) if isinstance(found, str) else found


def _as_parts(value: Any) -> Any:
    """Content as a list of parts: a text is a single one."""
    if isinstance(value, str):
        return [{"type": "text", "text": _unicode(value)}]
    if value is not None and not isinstance(value, list):
        raise PydanticCustomError("invalid_value", "must be text or a list of parts")
    return value


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Model):
    """Extra information in a stream. include_cost: cost of each token; not part of OpenAI's API."""

    include_usage: bool | None = None
    include_cost: bool | None = None
    include_obfuscation: bool | None = None


class Wanted(_Model):
    """Parameters that both kinds of request share."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**63)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]] | None,
        BeforeValidator(_as_list),
        AfterValidator(_few),
    ] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    public_blocks: Annotated[list[Annotated[int, Field(ge=0)]] | None, AfterValidator(_once)] = None

    user: Any = None
    metadata: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    n: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None

    @field_validator(*NEUTRAL, mode="before", check_fields=False)
    @classmethod
    def _neutral(cls, value: Any, info: Any) -> None:
        if value is not None and value not in NEUTRAL[info.field_name]:
            raise PydanticCustomError("unsupported_value", "is not supported; leave it out")

    @field_validator("stream_options")
    @classmethod
    def _streams(cls, value: StreamOptions | None, info: Any) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise PydanticCustomError("invalid_value", "requires a stream; set stream to true")
        return value

    @property
    def most_tokens(self) -> int | None:
        """Most tokens requested; None for as many as fit."""
        return self.max_tokens

    @property
    def best(self) -> int | None:
        """Number of candidates to list at each place; None for no log-probabilities."""
        raise NotImplementedError

    def sampling(self, temperature: float | None) -> Sampling:
        """How tokens are chosen. temperature: default if the request sets none."""
        return Sampling(
            temperature if self.temperature is None else self.temperature,
            self.top_k,
            self.top_p,
            None if self.seed is None else self.seed % 2**63,
            self.min_p,
            self.repetition_penalty,
        )


class CompletionRequest(Wanted):
    """A request to continue a text."""

    prompt: Annotated[str | list[int], PlainValidator(_as_prompt)]
    logprobs: int | None = Field(None, ge=0, le=MOST_COMPLETION_LOGPROBS)

    best_of: Any = None
    echo: Any = None
    suffix: Any = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens or COMPLETION_TOKENS

    @property
    def best(self) -> int | None:
        return self.logprobs


class TextPart(_Model):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: Words
    cache_control: Any = None


class Message(_Model):
    """A message of a conversation. Apps send answers back with fields that are always None here."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart] | None, BeforeValidator(_as_parts)] = Field(
        None, validate_default=True
    )
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None
    annotations: Any = None

    @field_validator("content")
    @classmethod
    def _said(cls, value: list[TextPart] | None, info: Any) -> list[TextPart] | None:
        if value is None and info.data.get("role") not in (None, "assistant"):
            raise PydanticCustomError("invalid_value", "must be text or a list of parts")
        return value

    @field_validator("tool_calls", mode="before")
    @classmethod
    def _no_calls(cls, value: Any) -> None:
        if value not in (None, []):
            raise PydanticCustomError("unsupported_value", "is not supported; leave it out")

    def turn(self) -> dict[str, str]:
        """The message for a chat template; templates do not know the role "developer".

        An answer without content is empty text, as many templates read the content of every turn.
        """
        text = "".join(part.text for part in self.content or ())
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Wanted):
    """A request to answer a conversation."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    tools: Any = None
    functions: Any = None
    tool_choice: Any = None
    function_call: Any = None
    parallel_tool_calls: Any = None
    response_format: Any = None
    modalities: Any = None
    service_tier: Any = None
    store: Any = None

    @field_validator("top_logprobs")
    @classmethod
    def _with_logprobs(cls, value: int | None, info: Any) -> int | None:
        if value and not info.data.get("logprobs"):
            raise PydanticCustomError("invalid_value", "needs logprobs; set it to true")
        return value

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def best(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
