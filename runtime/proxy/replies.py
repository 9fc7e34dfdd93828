"""Answers in OpenAI's two formats, whole or in chunks."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mergec.runtime.proxy.reader import Piece, Place, Scored
from mergec.runtime.session.steps import StepReport


@dataclass(frozen=True)
class Usage:
    """Token counts of a prompt and its answer.

    cached: of the prompt, those not computed anew. drafts: how many drafted tokens were right, and
    how many were not; None without drafts.
    """

    prompt: int
    answer: int
    cached: int = 0
    drafts: tuple[int, int] | None = None

    def json(self) -> dict[str, Any]:
        told: dict[str, Any] = {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.answer,
            "total_tokens": self.prompt + self.answer,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }
        if self.drafts is not None:
            accepted, rejected = self.drafts
            told["completion_tokens_details"] = {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": rejected,
            }
        return told


def cost(reports: Sequence[StepReport]) -> dict[str, Any]:
    """Cost of a token, as counted by this party. bytes: online, both directions."""
    return {
        "phase": reports[0].phase,
        "new": sum(report.new for report in reports),
        "seconds": sum(report.seconds for report in reports),
        "bytes": sum(report.sent + report.received for report in reports),
        "rounds": sum(report.rounds for report in reports),
    }


class Form(ABC):
    """Format of the responses to one request. places: whether log-probabilities are requested."""

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, model: str, fingerprint: str, *, places: bool) -> None:
        self._places = places
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, piece: Piece, finish: str, usage: Usage) -> dict[str, Any]:
        """A whole answer."""
        choice = self._choice(self._whole(piece.text), piece.places, finish)
        return {**self._head, "object": self.kind, "choices": [choice], "usage": usage.json()}

    def first(self) -> dict[str, Any] | None:
        """A chunk that precedes all text, if the format has one."""
        return None

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A chunk with a piece of an answer."""
        return self._chunk([self._choice(self._part(piece.text), piece.places, None)])

    def last(self, finish: str) -> dict[str, Any]:
        """The chunk that says why the answer ended."""
        return self._chunk([self._choice(self._part(""), (), finish)])

    def used(self, usage: Usage) -> dict[str, Any]:
        """The chunk with token counts, after the last one."""
        return {**self._chunk([]), "usage": usage.json()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": choices}

    def _choice(
        self, content: dict[str, Any], places: Sequence[Place], finish: str | None
    ) -> dict[str, Any]:
        named = self._named(places) if self._places and (places or finish is None) else None
        return {"index": 0, **content, "logprobs": named, "finish_reason": finish}

    @abstractmethod
    def _whole(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _part(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _named(self, places: Sequence[Place]) -> dict[str, Any]:
        """Log-probabilities in this format."""


class ChatForm(Form):
    """Responses of /v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def first(self) -> dict[str, Any]:
        return self._chunk(
            [self._choice({"delta": {"role": "assistant", "content": ""}}, (), None)]
        )

    def _whole(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _part(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _named(self, places: Sequence[Place]) -> dict[str, Any]:
        def named(scored: Scored) -> dict[str, Any]:
            return {"token": scored.text, "logprob": scored.logprob, "bytes": scored.bytes}

        content = [
            {**named(place.chosen), "top_logprobs": [named(other) for other in place.best]}
            for place in places
        ]
        return {"content": content, "refusal": None}


class CompletionForm(Form):
    """Responses of /v1/completions."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def _whole(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _part(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _named(self, places: Sequence[Place]) -> dict[str, Any]:
        return {
            "tokens": [place.chosen.name for place in places],
            "token_logprobs": [place.chosen.logprob for place in places],
            "top_logprobs": [_by_name(place.best) for place in places],
            "text_offset": [place.offset for place in places],
        }


def _by_name(best: Sequence[Scored]) -> dict[str, float]:
    """Log-probabilities by name, the best first; of two tokens of one name, that of the better."""
    found: dict[str, float] = {}
    for scored in best:
        found.setdefault(scored.name, scored.logprob)
    return found
