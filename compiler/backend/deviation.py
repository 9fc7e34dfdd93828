"""How far a lossy program is from its model, on the calibration prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mergec.compiler.frontend.capture import Captured
from mergec.compiler.graph.ranges import prompt
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.program.program import RoleProgram

CONTINUED = 4
"""Tokens that take the place of the last ones of each prompt."""


def measure_deviation(
    program: RoleProgram, captured: Captured, sequences: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """For the manifest: what the server's program and its model, both in the clear, say.

    The program continues each prompt by its own best tokens; the model is asked for the next token
    at the same places of the same text. So embedding resending, of which the first token is exact,
    counts with what it makes of the others. places: how many tokens were compared. agreed: of how
    many the two best were the same. worst, mean: how far logits are apart. spread: the standard
    deviation of the model's own logits at a place, to compare these with.
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
    """The model's logits after each piece of a text, [V]."""
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
