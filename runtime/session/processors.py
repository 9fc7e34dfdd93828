"""Builds transformers' own logits processors from generation settings, in the order of `generate`.

transformers is imported only where a setting needs it, so a client need not install it otherwise.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mergec.runtime.core.errors import BundleError, MergecError
from mergec.runtime.program.generation_settings import BUILT_IN, GenerationSettings, as_list

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Maps tokens so far [1, N] and their scores [1, V] to scores [1, V]."""


@dataclass(frozen=True)
class Answering:
    """What processors must know of an answer.

    prompt: its tokens; of an encoder-decoder, the one that its answers begin with. length: most
    tokens of prompt and answer together. stop: tokens that end it. source: tokens that an encoder
    read; of a decoder, the prompt.
    """

    prompt: Sequence[int]
    length: int
    stop: Sequence[int]
    source: Sequence[int]


def require(settings: GenerationSettings) -> None:
    """Raise MergecError if transformers is needed for these settings and is not installed."""
    needed = [name for name in settings.to_dict() if name not in BUILT_IN]
    if needed and importlib.util.find_spec("transformers") is None:
        raise MergecError(
            f"{', '.join(needed)} of this model's answers need the package transformers at the "
            "client; run `pip install 'mergec[generation]'`"
        )


def processors(settings: GenerationSettings, about: Answering) -> list[Processor]:
    """What changes the scores of every token, whether it is the best one or drawn."""
    made: list[Processor] = []

    def add(kind: str, *arguments: Any) -> None:
        made.append(_make(kind, *arguments))

    source = torch.tensor([list(about.source)], dtype=torch.int64)
    stop, start = list(about.stop), len(about.prompt)
    if settings.sequence_bias:
        add(
            "SequenceBiasLogitsProcessor",
            [[tokens, float(bias)] for tokens, bias in settings.sequence_bias],
        )
    if settings.encoder_repetition_penalty is not None:
        penalty = float(settings.encoder_repetition_penalty)
        add("EncoderRepetitionPenaltyLogitsProcessor", penalty, source)
    if settings.repetition_penalty is not None:
        add("RepetitionPenaltyLogitsProcessor", float(settings.repetition_penalty))
    if settings.no_repeat_ngram_size:
        add("NoRepeatNGramLogitsProcessor", settings.no_repeat_ngram_size)
    if settings.encoder_no_repeat_ngram_size:
        size = settings.encoder_no_repeat_ngram_size
        add("EncoderNoRepeatNGramLogitsProcessor", size, source)
    # As in transformers, a stop token alone is never a bad word; without others nothing is left.
    bad = [word for word in settings.bad_words_ids or () if word not in [[t] for t in stop]]
    if bad:
        add("NoBadWordsLogitsProcessor", bad)
    if stop and settings.min_length and settings.min_new_tokens is None:
        add("MinLengthLogitsProcessor", settings.min_length, stop)
    if stop and settings.min_new_tokens:
        add("MinNewTokensLengthLogitsProcessor", start, settings.min_new_tokens, stop)
    if settings.forced_bos_token_id is not None:
        add("ForcedBOSTokenLogitsProcessor", settings.forced_bos_token_id)
    if settings.forced_eos_token_id is not None:
        forced = as_list(settings.forced_eos_token_id)
        add("ForcedEOSTokenLogitsProcessor", about.length, forced)
    if stop and settings.exponential_decay_length_penalty:
        decay = tuple(settings.exponential_decay_length_penalty)
        add("ExponentialDecayLengthPenalty", decay, stop, start)
    if settings.suppress_tokens:
        add("SuppressTokensLogitsProcessor", settings.suppress_tokens)
    if settings.begin_suppress_tokens:
        forced_first = start == 1 and settings.forced_bos_token_id is not None
        begin = start + 1 if forced_first else start
        add("SuppressTokensAtBeginLogitsProcessor", settings.begin_suppress_tokens, begin)
    return made


def first_warpers(settings: GenerationSettings) -> list[Processor]:
    """What limits the tokens to draw from, between temperature and top-k."""
    return [_make("TopHLogitsWarper", float(settings.top_h))] if settings.top_h is not None else []


def last_warpers(settings: GenerationSettings) -> list[Processor]:
    """What limits the tokens to draw from, after top-p."""
    chosen = {
        "MinPLogitsWarper": settings.min_p,
        "TypicalLogitsWarper": settings.typical_p if settings.typical_p != 1 else None,
        "EpsilonLogitsWarper": settings.epsilon_cutoff,
        "EtaLogitsWarper": settings.eta_cutoff,
    }
    return [_make(kind, float(value)) for kind, value in chosen.items() if value]


def apply(chain: Sequence[Processor], tokens: Sequence[int], scores: torch.Tensor) -> torch.Tensor:
    """Scores [V] after all of `chain`, for the token after `tokens`."""
    if not chain:
        return scores
    ids = torch.tensor([list(tokens)], dtype=torch.int64)
    row = scores.to(torch.float32)[None]
    for processor in chain:
        row = _guarded(type(processor).__name__, lambda p=processor, row=row: p(ids, row))  # type: ignore[misc]
    return row[0]


def _make(kind: str, *arguments: Any) -> Processor:
    from transformers.generation import logits_process

    return _guarded(kind, lambda: getattr(logits_process, kind)(*arguments))


def _guarded(kind: str, work: Callable[[], Any]) -> Any:
    """The result of transformers' code; its errors in one line."""
    try:
        return work()
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise BundleError(
            f"a generation setting of this model fails in transformers' {kind}: {said[:200]}"
        ) from error
