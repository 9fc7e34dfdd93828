"""A linear function of a truncated secret where secret bits select it, and zero elsewhere.

A polynomial b of opened bits is a public linear combination of dealt words, and so is b times a
masked number (`formula`). If x is open as z = x + 2**30 + r modulo 2**32, x >> shift is a public
linear combination of 1, low = r >> shift and top = the top bit of r (`truncate.Truncation`). So

    b (scale (x >> shift) + constant) = (scale base + constant) b - scale b low + scale wrap b top

where `base` and `wrap` are public, and b, b low and b top are combinations of dealt words. To
multiply the result by a factor y that is open as y' = y + s, the dealer also shares all the words
times s. The product is y' times the combination of the first words, minus the same combination of
the second ones. Two of these words need not be dealt: the number 1, and s, of which each party has
its share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.values import Masked
from mergec.runtime.kernels.backends import Kernel
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.protocols.compare import WINDOW_BITS
from mergec.runtime.protocols.formula import Formula
from mergec.runtime.protocols.truncate import (
    PARTS,
    Truncation,
    base_of,
    low_of,
    truncation_parts,
    wrap_of,
)


@dataclass(frozen=True)
class Line:
    """scale * (x >> shift) + constant, modulo 2**64, for an x of less than 30 bits.

    Raises ValueError if `shift` is not in 0 to 30. Processors shift by 70 bits as if by 6, so a
    wrong shift need not show in the result.
    """

    shift: int = 0
    scale: int = 1
    constant: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.shift <= WINDOW_BITS - 2:
            raise ValueError(f"30 bits cannot be shifted by {self.shift}")

    @property
    def parts(self) -> int:
        """How many of 1, low and top the dealer multiplies by the products of mask bits."""
        return PARTS if self.scale else 1


@dataclass(frozen=True, eq=False)
class Selection:
    """A line where a formula of bits is 1, and zero where it is 0."""

    formula: Formula
    line: Line

    def words(self, factors: int = 0) -> int:
        """Number of words dealt per element."""
        return (self.formula.words * self.line.parts - 1) * (1 + factors)

    def deal(
        self, ctx: Context, bit_mask: torch.Tensor, mask: torch.Tensor, factor: Masked | None
    ) -> torch.Tensor:
        """Shares of the words for elements [n]: int64 [n, parts, words of the formula].

        bit_mask: uint8 [n], masks the bits. mask: int32 [n], masks x. factor: y, opened; doubles
        the parts.
        """
        times = factor.mask if factor else None
        size, count = self.formula.words * self.line.parts, len(mask)
        # The first word of a set is the empty product of mask bits: 1, or the factor's mask.
        sets = 1 if factor is None else 2

        def secret() -> torch.Tensor:
            found: torch.Tensor = _WORDS(bit_mask, mask, self, times)
            return found.view(count, sets, size)[..., 1:].flatten(1)

        dealt = ctx.deal((count, sets * (size - 1)), secret)
        words = torch.empty((count, sets, size), dtype=torch.int64, device=dealt.device)
        if not dealt.is_meta:
            words[..., 1:] = dealt.view(count, sets, size - 1)
            words[:, 0, 0] = ctx.public(torch.ones_like(words[:, 0, 0]))
            if times is not None:
                words[:, 1, 0] = times
        return words.view(count, sets * self.line.parts, self.formula.words)

    def add(
        self,
        total: torch.Tensor,
        bits: torch.Tensor,
        words: torch.Tensor,
        opened: torch.Tensor,
        factor: Masked | None,
    ) -> None:
        """Add shares of the value to `total`, int64 [n].

        bits: uint8 [n], opened. words: returned by `deal`. opened: int32 [n], z. factor: as in
        `deal`.
        """
        _ADD(total, bits, words, opened, self, factor.opened if factor else None)


def _words_of(values: torch.Tensor | None) -> np.ndarray:
    return np.empty(0, np.int64) if values is None else values.numpy()


def _words_host(
    bit_mask: torch.Tensor,
    mask: torch.Tensor,
    selection: Selection,
    times: torch.Tensor | None,
) -> torch.Tensor:
    formula, line = selection.formula, selection.line
    parts = line.parts * (1 if times is None else 2)
    out = torch.empty((len(mask), parts, formula.words), dtype=torch.int64)
    _write_words(
        bit_mask.numpy(), formula.products, mask.numpy(), line.shift, line.parts,
        _words_of(times), out.numpy(),
    )  # fmt: skip
    return out


def _words_tensors(
    bit_mask: torch.Tensor,
    mask: torch.Tensor,
    selection: Selection,
    times: torch.Tensor | None,
) -> torch.Tensor:
    line = selection.line
    numbers = truncation_parts(mask, line.shift)[:, : line.parts]
    if times is not None:
        numbers = torch.cat([numbers, numbers * times[:, None]], 1)
    rows = selection.formula.masked_rows(mask.device)[bit_mask.long()]
    return numbers[..., None] * rows[:, None]


def _add_host(
    total: torch.Tensor,
    bits: torch.Tensor,
    words: torch.Tensor,
    opened: torch.Tensor,
    selection: Selection,
    factors: torch.Tensor | None,
) -> None:
    line = selection.line
    _add_line(
        bits.numpy(), selection.formula.coefficients, words.numpy(), opened.numpy(), line.shift,
        line.scale, line.constant, _words_of(factors), total.numpy(),
    )  # fmt: skip


def _add_tensors(
    total: torch.Tensor,
    bits: torch.Tensor,
    words: torch.Tensor,
    opened: torch.Tensor,
    selection: Selection,
    factors: torch.Tensor | None,
) -> None:
    line, parts = selection.line, selection.line.parts
    cut = Truncation(opened, line.shift)
    weights = (line.scale * cut.weights)[:, :parts]
    weights[:, 0] += line.constant
    found = (selection.formula.rows(total.device)[bits.long()][:, None] * words).sum(-1)
    if factors is not None:
        found = found[:, :parts] * factors[:, None] - found[:, parts:]
    total += (weights * found).sum(-1)


_WORDS = Kernel("selection.words", _words_host, _words_tensors, triton=False)
_ADD = Kernel("elements.add_line", _add_host, _add_tensors)


@compiled()
def _write_words(  # type: ignore[no-untyped-def]
    bits, products, mask, shift, parts, factors, out
):
    for i in range(mask.shape[0]):
        row = products[bits[i]]
        low = low_of(mask[i], shift, WINDOW_BITS)
        for part in range(out.shape[1]):
            which = part % parts
            number = low if which == 1 else np.int64(mask[i] < 0) if which else np.int64(1)
            if part >= parts:
                number *= factors[i]
            target = out[i, part]
            for j in range(products.shape[1]):
                target[j] = number * row[j]


@compiled()
def _add_line(  # type: ignore[no-untyped-def]
    bits, coefficients, words, opened, shift, scale, constant, factors, total
):
    crossed = factors.shape[0] > 0
    parts = words.shape[1] // 2 if crossed else words.shape[1]
    weights = np.zeros(PARTS, np.int64)
    weights[1] = -scale
    for i in range(opened.shape[0]):
        weights[0] = scale * base_of(opened[i], shift, WINDOW_BITS) + constant
        weights[2] = scale * wrap_of(opened[i], shift, WINDOW_BITS)
        row = coefficients[bits[i]]
        value = np.int64(0)
        for part in range(words.shape[1]):
            dealt = words[i, part]
            found = np.int64(0)
            for j in range(coefficients.shape[1]):
                found += row[j] * dealt[j]
            if not crossed:
                value += weights[part] * found
            elif part < parts:
                value += weights[part] * found * factors[i]
            else:
                value -= weights[part - parts] * found
        total[i] += value
