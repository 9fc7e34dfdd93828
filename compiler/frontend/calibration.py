"""The token sequences on which a compile measures, and the longest text that it allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mergec.compiler.config import DEFAULT_LENGTH, CompileConfig, Pair, Sample, as_pair
from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.capture import Captured

Sequences = Sequence[Sample]
"""Token sequences, and pairs of them, on which the compiler measures how large each wire gets."""

_SENTENCES = (
    "The capital of France is Paris, and it lies on the river Seine.",
    "def main():\n    for i in range(10):\n        print(i * i)\n",
    "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n",
)
_CALIBRATION_TOKENS = 32


def calibration(config: CompileConfig, captured: Captured, tokenizer: Any = None) -> Sequences:
    """The token sequences on which every later stage measures.

    Those of `config.calibration` if given. Otherwise up to 32 token numbers spread evenly over the
    vocabulary, and a few fixed sentences, without tokens that the model does not know; the same
    numbers in reverse instead of the sentences, if there is no tokenizer or it knows none of them.

    Raises CompileError if the model cannot run on a given sequence.
    """
    if config.calibration:
        _check_calibration(config, captured)
        return config.calibration
    vocab_size = captured.vocab_size
    size = min(_CALIBRATION_TOKENS, captured.max_length or _CALIBRATION_TOKENS)
    step = max(1, vocab_size // size)
    spread = [(i * step + i) % vocab_size for i in range(size)]
    read = [_read(tokenizer, text)[:size] for text in _SENTENCES] if tokenizer is not None else []
    known = [[token for token in ids if 0 <= token < vocab_size] for ids in read]
    found = [spread, *(filter(None, known) if any(known) else [spread[::-1]])]
    # An encoder-decoder reads each as the source and as its answer, which begins like this.
    begun = [captured.start] if captured.encodes else []
    return [[*begun, *sequence][:size] for sequence in found]


def _read(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text; none if the tokenizer cannot encode it, as one for other symbols."""
    try:
        return list(tokenizer(text)["input_ids"])
    except Exception:  # noqa: BLE001  (what tokenizers raise has no common class)
        return []


def _check_calibration(config: CompileConfig, captured: Captured) -> None:
    limit = captured.max_length
    for position, sample in enumerate(config.calibration):
        known = captured.vocab_size or math.inf
        if isinstance(sample, Pair) and not captured.encodes:
            raise CompileError(
                f"calibration prompt {position} is a source and its answer, but the model is a "
                "decoder; give both as one sequence"
            )
        pair = as_pair(sample)
        tokens = (*pair.source, *pair.answer) if isinstance(sample, Pair) else pair.answer
        wrong = [token for token in tokens if not 0 <= token < known]
        if wrong:
            raise CompileError(
                f"calibration prompt {position} holds the token {wrong[0]}, which is not in the "
                f"vocabulary of {captured.vocab_size}"
            )
        if limit and len(tokens) > limit:
            raise CompileError(
                f"calibration prompt {position} has {len(tokens)} tokens, but the model was "
                f"captured for at most {limit}; shorten it"
            )


def longest(config: CompileConfig, captured: Captured) -> int:
    """Most tokens of prompt and answer together: what `config` asks for, or else what is possible.

    Raises CompileError if the model cannot take as many, or is not what was captured for as many.
    """
    asked, limit, branch = config.max_length, captured.limit, captured.branch
    if asked is not None and limit is not None and asked > limit.length:
        raise CompileError(
            f"max_length is {asked}, but the model takes at most {limit.length} tokens: "
            f"{limit.reason}; ask for {limit.length} or fewer"
        )
    length = asked or DEFAULT_LENGTH
    if limit is not None:
        length = min(length, limit.length)
    if branch is not None and length > branch.length:
        raise CompileError(
            f"the model is not one function of its tokens: {branch.reason}; compile with "
            f"max_length={branch.length} or less, or rewrite it without that branch"
        )
    return length
