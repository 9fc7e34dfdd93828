"""Drafts with a small model that the client runs in the clear."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch

from mergec.runtime.core.errors import MergecError, PromptError
from mergec.runtime.session.drafting.drafter import Drafter, Target
from mergec.runtime.session.text import VOCABULARY, Text


class DraftModel(Drafter):
    """The most likely tokens by a small public model, with the program's tokenizer.

    The model is the client's own copy and runs on its machine, so it learns nothing that the client
    does not know. Source: Leviathan et al., "Fast Inference from Transformers via Speculative
    Decoding" (ICML 2023), with a greedy draft.
    """

    name = "draft"
    place = "DIR"

    def __init__(self, model: Any) -> None:
        """model: a Hugging Face causal decoder."""
        self._model = model
        self._limit = int(getattr(model.config, "max_position_embeddings", 0) or 0)
        self._fed: list[int] = []
        self._cache: Any = None

    @classmethod
    def open(cls, place: str, target: Target) -> Self:
        if importlib.util.find_spec("transformers") is None:
            raise MergecError(
                "a draft model needs the package transformers at the client; run "
                "`pip install 'mergec[generation]'`"
            )
        if not (Path(place) / VOCABULARY).is_file():
            raise PromptError(f"{place} holds no model with a {VOCABULARY}; give its folder")
        if Text.load(place).vocabulary_hash != target.tokens_of(place):
            raise PromptError(
                f"the draft model in {place} has another tokenizer than this program; give one of "
                "the same family"
            )
        from transformers import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(place, local_files_only=True)
        except Exception as error:  # whatever transformers raises for a damaged folder
            said = " ".join(str(error).split())[:200]
            raise PromptError(f"the draft model in {place} cannot be loaded: {said}") from error
        return cls(model.eval())

    @torch.inference_mode()
    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        if self._limit:
            most = min(most, self._limit - len(tokens) + 1)
        if most < 1:
            return []
        drafted: list[int] = []
        feed = self._rest(tokens)
        for _ in range(most):
            result = self._model(
                input_ids=torch.tensor([feed]), past_key_values=self._cache, use_cache=True
            )
            self._cache = result.past_key_values
            self._fed += feed
            drafted.append(int(result.logits[0, -1].argmax()))
            feed = drafted[-1:]
        return drafted

    def _rest(self, tokens: Sequence[int]) -> list[int]:
        """What the model has not seen of `tokens`, at least one; the rest stays cached."""
        same = 0
        for mine, theirs in zip(self._fed, tokens[:-1], strict=False):
            if mine != theirs:
                break
            same += 1
        if self._cache is not None and same < len(self._fed) and not self._cut(same):
            self._cache, same = None, 0
        self._fed = self._fed[:same]
        return list(tokens[same:])

    def _cut(self, length: int) -> bool:
        """Cut the cache to its first tokens, at least one; returns whether that is possible."""
        if not length:
            return False
        try:
            self._cache.crop(length - len(self._fed))
        except (RuntimeError, ValueError, AttributeError):
            # A sliding window has dropped tokens that are needed again, or the model has no keys.
            return False
        return True
