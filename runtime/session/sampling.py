"""How the next token is chosen: by the client from revealed logits, or by the parties."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mergec.runtime.core.draw import TEMPERATURE_BITS, Draw
from mergec.runtime.core.errors import PromptError
from mergec.runtime.kernels.transfers import to_host
from mergec.runtime.program.generation_settings import BUILT_IN, GenerationSettings
from mergec.runtime.program.manifest import Manifest
from mergec.runtime.session.processors import (
    Answering,
    apply,
    first_warpers,
    last_warpers,
    processors,
    require,
)


@dataclass(frozen=True)
class Sampling:
    """What a request says about the choice of tokens. What it leaves None, the checkpoint's
    generation settings say; if they say nothing either, the choice is greedy: the largest logit,
    the first one of equals.

    temperature: 0 is greedy; larger ones flatten the distribution. top_k: only the k most likely
    tokens (0: all). top_p: only the most likely tokens that together have this probability, and at
    least one. seed: makes a run repeatable; None draws a fresh one. min_p: only tokens that are at
    least this fraction as likely as the likeliest (0: all). repetition_penalty: divides the logits
    of tokens that occurred, or multiplies negative ones (1: none). The last two need transformers.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        if not _within(self.temperature, 0):
            raise PromptError(f"the temperature must be 0 or more, not {self.temperature}")
        if self.top_k is not None and not 0 <= self.top_k < 2**63:
            raise PromptError(f"top-k must be 0 (all tokens) or more, not {self.top_k}")
        if not _within(self.top_p, 0, 1) or self.top_p == 0:
            raise PromptError(f"top-p must be above 0 and at most 1, not {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise PromptError(f"the seed must be between 0 and 2**63 - 1, not {self.seed}")
        if not _within(self.min_p, 0, 1):
            raise PromptError(f"min-p must be 0 to 1, not {self.min_p}")
        if not _within(self.repetition_penalty, 0) or self.repetition_penalty == 0:
            raise PromptError(
                f"the repetition penalty must be above 0, not {self.repetition_penalty}"
            )

    @property
    def greedy(self) -> bool:
        return not self.temperature

    def over(self, settings: GenerationSettings) -> GenerationSettings:
        """The settings that an answer is chosen by: the checkpoint's, where the request says
        nothing. `temperature` is always given: it is 0 if the choice is greedy. Values that have no
        effect are left out.
        """
        temperature = self.temperature
        if temperature is None:
            default = 1.0 if settings.temperature is None else settings.temperature
            temperature = default if settings.do_sample else 0.0

        def chosen(mine: float | None, theirs: float | None, neutral: float) -> float | None:
            value = theirs if mine is None else mine
            return None if value == neutral else value

        top_k = settings.top_k if self.top_k is None else self.top_k
        result = replace(
            settings,
            do_sample=None,
            temperature=temperature,
            top_k=top_k or None,
            top_p=chosen(self.top_p, settings.top_p, 1),
            min_p=chosen(self.min_p, settings.min_p, 0),
            repetition_penalty=chosen(self.repetition_penalty, settings.repetition_penalty, 1),
        )
        return result if temperature else replace(result, **dict.fromkeys(_OF_DRAWS))

    def generator(self) -> torch.Generator:
        """The random generator of a run's choices."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return torch.Generator().manual_seed(seed)


_OF_DRAWS = ("top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Settings that change only how a token is drawn, not which one is the best."""


def _within(value: float | None, low: float, high: float = math.inf) -> bool:
    return value is None or (math.isfinite(value) and low <= value <= high)


def draw_for(sampling: Sampling, manifest: Manifest, mode: str = "mergec") -> Draw:
    """The choice that the client requests in each step.

    If the program reveals the logits, the client chooses alone and requests nothing. Raises
    PromptError if the program cannot make the choice, and MergecError if the client needs a package
    for it that is not installed.
    """
    settings = sampling.over(manifest.generation)
    if manifest.reveals_logits:
        require(settings)
        return Draw()
    draw = _drawn(settings, sampling.seed, manifest.vocab_size)
    if mode == "crypten" and draw != Draw():
        raise PromptError(
            "CrypTen's stock protocols support only greedy choice; set the temperature to 0"
        )
    return draw


def _drawn(settings: GenerationSettings, seed: int | None, vocabulary: int) -> Draw:
    """A choice that the parties make, for a program that reveals only the token."""
    hidden = [name for name in settings.to_dict() if name == "top_p" or name not in BUILT_IN]
    if hidden:
        name = hidden[0].replace("_", "-")
        raise PromptError(
            f"{name} needs the logits, and this program reveals only the token; leave it out, "
            'or compile with reveal="logits"'
        )
    if seed is not None:
        raise PromptError(
            "this program draws tokens with noise that nobody may know; leave the seed "
            'out, or compile with reveal="logits"'
        )
    top_k = settings.top_k or 0
    if not settings.temperature or top_k == 1:
        return Draw()
    units = round(settings.temperature * 2**TEMPERATURE_BITS)
    return Draw(units, top_k if top_k < vocabulary else 0)


class Chooser:
    """Chooses the tokens of one answer from revealed logits, one after the other.

    First the processors of the checkpoint's generation settings change the scores, then
    temperature, top-k, top-p and further limits say what to draw from, in the order of
    transformers' `generate`.
    """

    def __init__(
        self, sampling: Sampling, manifest: Manifest, prompt: Sequence[int], max_tokens: int
    ) -> None:
        """max_tokens: most tokens of the answer. Raises MergecError if a package is missing."""
        settings = sampling.over(manifest.generation)
        require(settings)
        begun = list(prompt)
        if manifest.answer_start >= 0:
            begun = [manifest.answer_start]
        about = Answering(begun, len(begun) + max_tokens, manifest.stop_tokens, prompt)
        self._settings = settings
        self._tokens = begun
        self._generator = sampling.generator()
        self._processors = processors(settings, about)
        self._first, self._last = first_warpers(settings), last_warpers(settings)

    def __call__(self, logits: torch.Tensor) -> int:
        """The next token, from the logits of its position, [V] or [1, V]."""
        scores = self.scores(logits)
        if not self._settings.temperature:
            token = int(scores.argmax())
        else:
            drawn = torch.multinomial(torch.softmax(scores, -1), 1, generator=self._generator)
            token = int(drawn)
        self._tokens.append(token)
        return token

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """The scores [V] whose softmax the next token is drawn from, or whose largest it is."""
        flat = to_host(logits.detach(), "output").reshape(-1)
        if flat.numel() == 0 or not bool(torch.isfinite(flat).all()):
            raise PromptError(
                "the revealed logits are not finite; use the bundles of one compilation"
            )
        scores = apply(self._processors, self._tokens, flat).to(torch.float64)
        best = scores.max()
        if not bool(torch.isfinite(best)):
            raise PromptError(
                "the model's generation settings leave no token to choose; set fewer of them"
            )
        temperature = self._settings.temperature
        if not temperature:
            return scores
        # Dividing the distance to the largest keeps low temperatures from overflowing.
        scores = (scores - best) / temperature
        scores = apply(self._first, self._tokens, scores).to(torch.float64)
        scores = _keep_likely(scores, self._settings.top_k or 0, self._settings.top_p or 1.0)
        return apply(self._last, self._tokens, scores).to(torch.float64)


def _keep_likely(scores: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Scores [V] with minus infinity for all tokens but the `top_k` best, and then for those
    without which the better ones already have the probability `top_p`.
    """
    if 0 < top_k < scores.numel():
        kept = torch.topk(scores, top_k).indices
        limited = torch.full_like(scores, -math.inf)
        limited[kept] = scores[kept]
        scores = limited
    if top_p < 1:
        ordered, order = torch.sort(torch.softmax(scores, -1), descending=True, stable=True)
        # A token stays if those before it do not reach top_p; so the first one always stays.
        before = ordered.cumsum(-1) - ordered
        scores = scores.index_fill(0, order[before >= top_p], -math.inf)
    return scores
