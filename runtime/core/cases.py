"""Sample calls of an op. An op's file states them; tests and the table of costs evaluate them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

PUBLIC = "public"
"""Marks a tensor operand that all parties know."""


@dataclass(frozen=True)
class Case:
    """One call of an op, and how far each protocol's result may be from `Op.reference`.

    args: the arguments in the order of the schema; tensors hold real numbers (float64) or ids.
    error: largest absolute error of the op's own protocol; None leaves the case to `stock`.
    stock: largest absolute error of CrypTen's stock protocol; None where it is not run.
    forms: how a tensor reaches the protocol, by parameter, where that is not the op's own form:
        "weight" (held by the server, under a static mask), "shared" (a constant that is shared,
        opened under its static mask), "held" (by the server), "public", or a form of
        `runtime.core.op.FORMS`.
    """

    args: Sequence[Any]
    error: float | None = None
    stock: float | None = None
    forms: Mapping[str, str] = field(default_factory=dict)


class Sampler:
    """Seeded inputs, so that the cases of an op are the same on every call."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(7)

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Normal numbers, float64."""
        return torch.randn(*shape, dtype=torch.float64, generator=self._generator) * scale

    def small(self, *shape: int) -> torch.Tensor:
        """Normal numbers cut at 3.5, which CrypTen's approximations support."""
        return self.normal(*shape).clamp(-3.5, 3.5)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        """Uniform numbers, float64."""
        numbers = torch.rand(*shape, dtype=torch.float64, generator=self._generator)
        return low + (high - low) * numbers


def spread(limit: float) -> torch.Tensor:
    """The range of a scalar function up to `limit`, its edges, and numbers far beyond its table."""
    far = [-16_000.0, -64.0, 64.0, 16_000.0, 0.0, 2.0**-16, -(2.0**-16)]
    inner = torch.linspace(-limit, limit, 3001, dtype=torch.float64)
    return torch.cat([inner, torch.tensor(far, dtype=torch.float64)])
