"""Generation settings of a checkpoint: how its answers are meant to be chosen from logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from mergec.runtime.core.errors import BundleError
from mergec.runtime.program.json_values import is_a


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """What a checkpoint's generation_config says about the choice of tokens; None where nothing.

    Names and meanings are those of transformers' `GenerationConfig`. Tokens are numbers; a sequence
    bias is a pair of tokens and a number. Raises BundleError, naming the setting, if a value is not
    one that the setting can have.

    >>> GenerationSettings(do_sample=True, top_p=0.9).to_dict()
    {'do_sample': True, 'top_p': 0.9}
    """

    do_sample: bool | None = None
    temperature: float | None = None
    top_h: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    sequence_bias: list[Any] | None = None
    encoder_repetition_penalty: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    encoder_no_repeat_ngram_size: int | None = None
    bad_words_ids: list[list[int]] | None = None
    min_length: int | None = None
    min_new_tokens: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | list[int] | None = None
    exponential_decay_length_penalty: list[Any] | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None

    def __post_init__(self) -> None:
        for name, value in self.to_dict().items():
            allowed, words = _ALLOWED[name]
            if not allowed(value):
                raise BundleError(
                    f"the generation setting {name} must be {words}, not {cut(value)}"
                )

    def __bool__(self) -> bool:
        return bool(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The settings that say something, as JSON values by name."""
        values = {name: getattr(self, name) for name in NAMES}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` returned. Raises BundleError for settings that do not exist: to leave
        out one that a newer compiler wrote would change answers.
        """
        unknown = [name for name in data if name not in NAMES]
        if unknown:
            raise BundleError(
                f"the generation setting {cut(unknown[0])} is not known to this version"
            )
        return cls(**data)

    def check_tokens(self, vocab_size: int) -> None:
        """Raise BundleError, naming the setting, if one names a token outside of the vocabulary.

        vocab_size: number of tokens that the model knows; 0 if unknown.
        """
        for name, token in self._tokens():
            if vocab_size and token >= vocab_size:
                raise BundleError(
                    f"the generation setting {name} names token {token}, which is not in the "
                    f"vocabulary of {vocab_size}"
                )

    def _tokens(self) -> Iterator[tuple[str, int]]:
        """Tokens that must exist, with the setting that names them. Those that are suppressed need
        not.
        """
        if self.forced_bos_token_id is not None:
            yield "forced_bos_token_id", self.forced_bos_token_id
        for token in as_list(self.forced_eos_token_id):
            yield "forced_eos_token_id", token
        for word in self.bad_words_ids or ():
            yield from (("bad_words_ids", token) for token in word)
        for tokens, _ in self.sequence_bias or ():
            yield from (("sequence_bias", token) for token in tokens)


def as_list(value: int | list[int] | None) -> list[int]:
    """One token, several, or none, as a list."""
    return [] if value is None else [value] if isinstance(value, int) else value


def cut(value: object) -> str:
    """A value in a message, cut: it may come from a stranger's file."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _is_number(value: object) -> bool:
    if is_a(value, int):
        return abs(value) < 2**63  # a larger one might not fit a float
    return is_a(value, float) and math.isfinite(value)


def _from(low: float, high: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: _is_number(value) and low <= value <= high


def _above(low: float, high: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: _is_number(value) and low < value <= high


def _count(value: object) -> bool:
    return is_a(value, int) and 0 <= value < 2**63


def _tokens(value: object) -> bool:
    return is_a(value, list) and bool(value) and all(map(_count, value))


def _words(value: object) -> bool:
    return is_a(value, list) and bool(value) and all(map(_tokens, value))


def _biases(value: object) -> bool:
    return (
        is_a(value, list)
        and bool(value)
        and all(is_a(pair, list) and len(pair) == 2 for pair in value)
        and all(_tokens(tokens) and _is_number(bias) for tokens, bias in value)
    )


def _decay(value: object) -> bool:
    if not is_a(value, list) or len(value) != 2:
        return False
    start, factor = value
    return _count(start) and _above(0)(factor)


_SHARE = (_above(0, 1), "a number above 0 and at most 1")
_PENALTY = (_above(0), "a number above 0")
_COUNT = (_count, "a whole number, 0 or more")
_CUTOFF = (_from(0, math.nextafter(1, 0)), "a number, 0 or more and below 1")
_TOKENS = (_tokens, "a list of tokens")

_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    "temperature": (_from(0), "a number, 0 or more"),
    "top_h": _SHARE,
    "top_k": _COUNT,
    "top_p": _SHARE,
    "min_p": (_from(0, 1), "a number from 0 to 1"),
    "typical_p": _SHARE,
    "epsilon_cutoff": _CUTOFF,
    "eta_cutoff": _CUTOFF,
    "sequence_bias": (_biases, "a list of pairs, each of tokens and a number"),
    "encoder_repetition_penalty": _PENALTY,
    "repetition_penalty": _PENALTY,
    "no_repeat_ngram_size": _COUNT,
    "encoder_no_repeat_ngram_size": _COUNT,
    "bad_words_ids": (_words, "a list of lists of tokens"),
    "min_length": _COUNT,
    "min_new_tokens": _COUNT,
    "forced_bos_token_id": (_count, "a token"),
    "forced_eos_token_id": (lambda value: _count(value) or _tokens(value), "a token or several"),
    "exponential_decay_length_penalty": (_decay, "a number of tokens and a factor above 0"),
    "suppress_tokens": _TOKENS,
    "begin_suppress_tokens": _TOKENS,
}
"""Which values each setting can have, and the same in words."""

NAMES = tuple(item.name for item in fields(GenerationSettings))
"""All settings."""

BUILT_IN = frozenset({"do_sample", "temperature", "top_k", "top_p"})
"""Settings that the client applies by itself; the others need transformers."""
