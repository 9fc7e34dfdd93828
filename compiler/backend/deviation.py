"""Measures the distance of a lossy program from its model, on the calibration prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mergec.compiler.frontend.capture import Captured
from mergec.compiler.graph.ranges import prompt
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.program.program import RoleProgram

CONTINUED = 4
"""Tokens at the end of each prompt that the program replaces with its own."""


def measure_deviation(
    program: RoleProgram, captured: Captured, sequences: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Compare the server's program with its model, both in the clear; for `Manifest.deviation`.

    The program continues each prompt with its own best tokens; the model predicts the next token
    at the same places of the same text. This way embedding resending, whose first token is exact,
    is measured on the later tokens too.

    program: the server's, which holds the weights. captured: the model before any pass.
    sequences: the calibration prompts, as token numbers.

    Returns `places`, the number of tokens compared; `agreed`, at how many of them both have the
    same best token; `worst` and `mean`, the distance of the logits; and `spread`, the mean standard
    deviation of the model's own logits at a place, as a scale for these distances.
    """
    plain = PlainExecutor(program)
    agreed, errors, spreads = 0, [], []
    for sequence in sequences:
        given = list(sequence[: max(1, len(sequence) - CONTINUED)])
        answer = list(plain.generate(given, CONTINUED))
        rows = _model_logits(captured, [given, *([token] for token, _ in answer[:-1])])
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


def _model_logits(captured: Captured, pieces: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The model's logits [V] after each piece of a text."""
    found = []
    text: list[int] = []
    caches: list[torch.Tensor] = []
    with torch.inference_mode():
        for piece in pieces:
            text += piece
            fed = piece if caches else text
            ids, *empty = prompt(captured.graph_module, captured.inputs, fed)
            logits, *caches = captured.graph_module(ids, *(caches or empty))
            found.append(logits.reshape(-1, logits.shape[-1])[-1])
    return found
