"""How the parties choose a token when only the token is revealed."""

from __future__ import annotations

from dataclasses import dataclass

from mergec.runtime.core.errors import PromptError

MAX_TOP_K = 8
"""Largest top-k when only the token is revealed. The cost of finding the best tokens without
opening anything grows with their number (docs/protocols.md)."""

MAX_TEMPERATURE = 64.0
"""Largest temperature when only the token is revealed: the noise must fit beside the logits."""

TEMPERATURE_BITS = 16
"""Fractional bits of a temperature in the parties' computation."""


@dataclass(frozen=True)
class Draw:
    """How the parties choose a token when only the token is revealed. All three roles know it.

    units: the temperature in units of 2**-16; 0 chooses the largest logit. top_k: choose from that
    many tokens; 0 for all. Raises PromptError for a temperature above 64, or a top-k other than 0
    or 2 to 8.
    """

    units: int = 0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.units <= MAX_TEMPERATURE * 2**TEMPERATURE_BITS:
            raise PromptError(
                f"the temperature can be 0 to {MAX_TEMPERATURE:g} when only the token is revealed"
            )
        if self.top_k and not 2 <= self.top_k <= MAX_TOP_K:
            raise PromptError(
                f"top-k is {self.top_k}; when only the token is revealed it can be 1 to "
                f"{MAX_TOP_K}, or 0 for all tokens"
            )
