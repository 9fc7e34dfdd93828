"""How the next token is chosen: by the client from revealed logits, or by the parties."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

import torch

from mergec.runtime.core.draw import TEMPERATURE_BITS, Draw
from mergec.runtime.core.errors import PromptError
from mergec.runtime.program.manifest import Manifest


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. The default is greedy: the largest logit, the first one of equals.

    temperature: 0 is greedy; larger ones flatten the distribution. top_k: only the k most likely
    tokens (0: all). top_p: only the most likely tokens that together have this probability, and at
    least one. seed: makes a run repeatable; None draws a fresh one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise PromptError(f"the temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise PromptError(f"top-k must be 0 (all tokens) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise PromptError(f"top-p must be above 0 and at most 1, not {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise PromptError(f"the seed must be between 0 and 2**63 - 1, not {self.seed}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def draw(self, vocabulary: int) -> Draw:
        """The same choice made by the parties, for a program that reveals only the token."""
        if self.top_p < 1:
            raise PromptError(
                "top-p needs the logits, and this program reveals only the token; leave it out, "
                'or compile with reveal="logits"'
            )
        if self.seed is not None:
            raise PromptError(
                "this program draws tokens with noise that nobody may know; leave the seed "
                'out, or compile with reveal="logits"'
            )
        if self.greedy or self.top_k == 1:
            return Draw()
        units = round(self.temperature * 2**TEMPERATURE_BITS)
        return Draw(units, self.top_k if self.top_k < vocabulary else 0)

    def generator(self) -> torch.Generator:
        """The random generator of a run's choices."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return torch.Generator().manual_seed(seed)


def draw_for(sampling: Sampling, manifest: Manifest, mode: str = "mergec") -> Draw:
    """The choice that the client requests in each step; PromptError if the program cannot make it.

    If the program reveals the logits, the client chooses alone and requests nothing.
    """
    if manifest.reveals_logits:
        return Draw()
    draw = sampling.draw(manifest.vocab_size)
    if mode == "crypten" and draw != Draw():
        raise PromptError(
            "CrypTen's stock protocols support only greedy choice; leave the temperature at 0"
        )
    return draw


def probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution that a token is drawn from: temperature, then top-k, then top-p."""
    scores = logits.detach().to("cpu", torch.float64).reshape(-1)
    if sampling.greedy:
        result = torch.zeros_like(scores)
        result[scores.argmax()] = 1.0
        return result
    # Dividing the distance to the largest keeps low temperatures from overflowing.
    scores = (scores - scores.max()) / sampling.temperature
    if 0 < sampling.top_k < scores.numel():
        kept = torch.topk(scores, sampling.top_k).indices
        limited = torch.full_like(scores, -math.inf)
        limited[kept] = scores[kept]
        scores = limited
    result = torch.softmax(scores, -1)
    if sampling.top_p < 1:
        ordered, order = torch.sort(result, descending=True, stable=True)
        # A token stays if those before it do not reach top_p; so the first one always stays.
        before = ordered.cumsum(-1) - ordered
        result[order[before >= sampling.top_p]] = 0.0
        result = result / result.sum()
    return result


def choose(
    logits: torch.Tensor, sampling: Sampling, generator: torch.Generator | None = None
) -> int:
    """One token from the logits of one position."""
    flat = logits.reshape(-1)
    if flat.numel() == 0 or not bool(torch.isfinite(flat).all()):
        raise PromptError("the revealed logits are not finite; use the bundles of one compilation")
    if sampling.greedy:
        return int(flat.argmax())
    drawn = torch.multinomial(probabilities(flat, sampling), 1, generator=generator)
    return int(drawn)
