"""Measures the distance of a lossy program from its model, on the calibration prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from mergec.compiler.config import Pair, Sample
from mergec.compiler.frontend.capture import Captured
from mergec.compiler.graph.ranges import prompt
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.program.program import RoleProgram

CONTINUED = 4
"""Tokens at the end of each prompt that the program replaces with its own."""


def measure_deviation(
    program: RoleProgram, captured: Captured, sequences: Sequence[Sample]
) -> dict[str, Any]:
    """Compare the server's program with its model, both in the clear; for `Manifest.deviation`.

    The program continues each prompt with its own best tokens; the model predicts the next token
    at the same places of the same text. This way embedding resending, whose first token is exact,
    is measured on the later tokens too. An encoder-decoder answers each prompt as its source, and
    the whole source of a pair.

    program: the server's, which holds the weights. captured: the model before any pass.
    sequences: the calibration prompts, as token numbers.

    Returns `places`, the number of tokens compared; `agreed`, at how many of them both have the
    same best token; `worst` and `mean`, the distance of the logits; and `spread`, the mean standard
    deviation of the model's own logits at a place, as a scale for these distances.
    """
    # The manifest is written when all is measured; of an answer it says how it begins.
    begun = replace(program.manifest, answer_start=captured.start)
    plain = PlainExecutor(replace(program, manifest=begun))
    agreed, errors, spreads = 0, [], []
    for sample in sequences:
        if isinstance(sample, Pair):
            given = list(sample.source)
        else:
            given = list(sample[: max(1, len(sample) - CONTINUED)])
        answer = list(plain.generate(given, CONTINUED))
        rows = _model_logits(captured, given, [token for token, _ in answer[:-1]])
        for (_, found), wanted in zip(answer, rows, strict=True):
            agreed += int(found.argmax()) == int(wanted.argmax())
            errors.append((found - wanted).abs())
            spreads.append(wanted.std())
    apart = torch.stack(errors)
    return {
        "places": len(errors),
        "agreed": agreed,
        "worst": float(apart.max()),
        "mean": float(apart.mean()),
        "spread": float(torch.stack(spreads).mean()),
    }


def _model_logits(
    captured: Captured, given: Sequence[int], answered: Sequence[int]
) -> list[torch.Tensor]:
    """The model's logits [V] after a prompt, and after each token that continues it."""
    source = [torch.tensor([list(given)], dtype=torch.int64)] if captured.encodes else []
    text = [captured.start] if captured.encodes else list(given)
    caches = prompt(captured.graph_module, captured.inputs, text)[1 + len(source) :]
    fed, found = text, []
    with torch.inference_mode():
        for token in (*answered, None):
            ids = torch.tensor([fed], dtype=torch.int64)
            logits, *following = captured.graph_module(*source, ids, *caches)
            caches = following[: len(caches)]
            found.append(logits.reshape(-1, logits.shape[-1])[-1])
            if token is not None:
                text = [*text, token]
                fed = [token] if caches else text
    return found
