"""How many drafted tokens a step should check."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from mergec.runtime.core.network import Network
from mergec.runtime.engine.rehearsal import Rehearsal, step_cost

_PRIOR = 0.5
"""Weight of a modelled second beside a measured one."""

_REMEMBERED = 64
"""Measured steps that count; earlier ones followed shorter texts."""

_FADING = 0.9
"""How much an earlier draft counts, for each draft since."""


def best_count(seconds: Sequence[float], chances: Sequence[float] | np.ndarray) -> int:
    """The number of drafts with which tokens come fastest.

    seconds: of a step with 0, 1, 2 … drafts. chances: the probability that each draft is right, and
    all those that it follows. A step gives one token, and in the mean as many more as they add up
    to.
    """
    gained = np.cumsum([1.0, *chances])
    return int(np.argmax(gained / np.asarray(seconds)))


class Acceptance:
    """The recent probability that a draft is right if those before it in its step are.

    Starts at one half, as if two drafts had been seen, and forgets: drafts are right in runs.
    """

    def __init__(self) -> None:
        self._right, self._seen = 1.0, 2.0

    @property
    def value(self) -> float:
        return self._right / self._seen

    def learn(self, drafted: Sequence[int], tokens: Sequence[int]) -> None:
        """Compare a draft with the tokens that came; drafts behind a wrong one say nothing."""
        for mine, theirs in zip(drafted, tokens, strict=False):
            self._right = self._right * _FADING + (mine == theirs)
            self._seen = self._seen * _FADING + 1
            if mine != theirs:
                return


class Seconds:
    """Seconds of a step by its number of tokens: a straight line through what is known.

    What the cost model says for the program's network counts a little, and what steps took counts
    more, as computation does not show in the model.
    """

    def __init__(self, modelled: Mapping[int, float]) -> None:
        """modelled: seconds by number of tokens."""
        share = _PRIOR / len(modelled)
        self._modelled = [(float(new), seconds, share) for new, seconds in modelled.items()]
        self._measured: deque[tuple[float, float, float]] = deque(maxlen=_REMEMBERED)

    def learn(self, new: int, seconds: float) -> None:
        """Note what a step of `new` tokens took."""
        self._measured.append((float(new), seconds, 1.0))

    def of(self, most: int) -> list[float]:
        """Seconds of steps of 1 to `most` tokens."""
        counts, seconds, weights = np.array([*self._modelled, *self._measured]).T
        centre = np.average(counts, weights=weights)
        spread = np.average((counts - centre) ** 2, weights=weights)
        level = np.average(seconds, weights=weights)
        slope = np.average((counts - centre) * seconds, weights=weights) / spread if spread else 0.0
        # More tokens never take less time, and a step takes some.
        line = level + max(slope, 0.0) * (np.arange(1, most + 1) - centre)
        least: float = max(float(seconds.min()) * 0.1, 1e-6)
        return [max(float(value), least) for value in line]


def modelled_seconds(
    rehearsal: Rehearsal, past: int, counts: Sequence[int], network: Network
) -> dict[int, float]:
    """What the cost model says of steps with so many tokens after `past` ones, in seconds."""
    costs = {new: step_cost(rehearsal, new, past) for new in counts}
    return {
        new: cost.waiting(network).prepared + network.making(cost.dealt)
        for new, cost in costs.items()
    }
