"""How the parties choose a token that is revealed alone."""

from __future__ import annotations

from dataclasses import dataclass

from mergec.runtime.core.errors import PromptError

MAX_TOP_K = 8
"""Most tokens that the parties choose from when the token alone is revealed: the cost of finding
them without opening anything grows with their number (docs/protocols.md)."""

MAX_TEMPERATURE = 64.0
"""Largest temperature when the token alone is revealed: noise must fit beside the logits."""

TEMPERATURE_BITS = 16
"""Fractional bits of a temperature that the parties compute with."""


@dataclass(frozen=True)
class Draw:
    """How the parties choose a token that is revealed alone. All three roles know it.

    units: the temperature in units of 2**-16, 0 for the largest logit. top_k: choose from that many
    tokens, 0 for all.
    """

    units: int = 0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.units <= MAX_TEMPERATURE * 2**TEMPERATURE_BITS:
            raise PromptError(f"the temperature can be 0 to {MAX_TEMPERATURE:g} here")
        if self.top_k and not 2 <= self.top_k <= MAX_TOP_K:
            raise PromptError(
                f"top-k is {self.top_k}; where the token alone is revealed it can be 1 to "
                f"{MAX_TOP_K}, or 0 for all tokens"
            )
