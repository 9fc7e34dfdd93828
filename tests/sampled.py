"""A law of tokens that is known, and whether sampled answers have it."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import torch

from mergec.runtime.session.plain import PlainSession

DRAWS = 800
"""Answers that are drawn."""

HEAT, BEST = 2.0, 3
"""The temperature, and the top k."""

FIRST = 7
"""The prompt."""

_TABLE = torch.randn(13, 13, generator=torch.Generator().manual_seed(1)) * 2
_BEST = _TABLE.topk(BEST)

LAW = torch.softmax(
    torch.full((13, 13), -math.inf)
    .double()
    .scatter_(1, _BEST.indices, _BEST.values.double() / HEAT),
    -1,
)
"""The chance of each token behind each other one."""


class ByLastToken(PlainSession):
    """Logits that depend on the last token alone."""

    def _compute(
        self, phase: Any, new: int, past: int, ids: Any, parents: tuple[int, ...] = ()
    ) -> dict[str, Any]:
        cache = torch.zeros(1, 1, past + new, 8)
        logits = _TABLE[torch.tensor(ids)]
        return {**dict.fromkeys(phase.outputs, cache), phase.outputs[0]: logits}


def check_law(seen: Counter[tuple[int, ...]], length: int) -> None:
    """Whether the first `length` tokens of so many answers have the law."""
    statistic, outcomes, rest = 0.0, 0, [0.0, 0.0]
    for key in itertools.product(range(13), repeat=length):
        chance = math.prod(float(LAW[a, b]) for a, b in itertools.pairwise((FIRST, *key)))
        if not chance:
            assert key not in seen
            continue
        times, expected = seen[key], chance * DRAWS
        if expected < 5:  # rare outcomes are one class, or the statistic is no chi-square
            rest = [rest[0] + times, rest[1] + expected]
            continue
        statistic, outcomes = statistic + (times - expected) ** 2 / expected, outcomes + 1
    if rest[1]:
        statistic += (rest[0] - rest[1]) ** 2 / rest[1]
    # A chi-square of so many degrees of freedom is beyond this once in a million.
    assert statistic < outcomes + 5 * math.sqrt(2 * outcomes)
