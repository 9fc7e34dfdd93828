"""Functions of a secret from tables that are dealt entry by entry, all of it to the server.

With z = x + r open, split z - start at bit s: its upper part v modulo the number of windows is
public, and so is its lower part y. What x is for each y, with v given, the dealer knows but for
whole tables: x = x0 + y, where x0 depends on v and r. So it deals, for each v, the coefficients of
the function on [x0, x0 + 2**s) with respect to public functions Y_k of y:

    f(x0 + y) = sum over k of a_k(x0) Y_k(y)

A party reads the entry at v, and its share of the value is a public combination of that entry's
words. The windows begin where the mask says, not at fixed places, so no borrow between the two
parts of z is left over, and a window need not overlap the one before it (`interval`).

Every entry is shared. The client's share of the table is the next bytes of its own stream, so the
dealer sends it nothing; the server receives the differences. A key of a point function is shorter,
but its corrections go to both parties. Source: one-time truth tables (Ishai et al., TCC 2013).

The words of an entry have as many bytes as each needs. A coefficient with 8 w bits counts in the
upper bits of a ring of 64, so the value comes out modulo 2**64 whatever the widths are.
"""

from __future__ import annotations

import decimal
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Protocol as Interface

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.spec import FRACTIONAL_BITS, RING_BITS, Cost
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.kernels.transfers import to_device, to_host

_TOGETHER = 1 << 10
"""Elements whose tables exist at once: long tables of many elements would fill the memory."""

_SHIFT_BITS = 8
"""Coefficients are known at 2**8 places of a window, and interpolated between them."""

_BASIS_FRAC = 30
"""Fractional bits with which public functions are computed, in integers: both parties must come to
the same words, and processors may differ in the last bit of a floating-point number."""

_LEAST_BYTES, _MOST_BYTES = 4, 8
"""Bytes of a word: its lower half is read at once, the others one by one."""

_FEWEST = 4
"""Windows: a table's bytes are a multiple of 16, and words of four bytes in it are aligned."""

_LOW_DIGIT = 9
_DIGIT_FRAC = 26


class Curve(Interface):
    """A function on windows: coefficients that the dealer shares, and public functions of y."""

    @property
    def terms(self) -> int:
        """Number of coefficients of an entry."""

    def largest(self, pieces: Pieces) -> np.ndarray:
        """The size of each coefficient, compared to its public function: [terms]."""

    def coefficients(self, pieces: Pieces, ahead: np.ndarray) -> np.ndarray:
        """Coefficients of each window, float64 [n, windows, terms]. Called by the dealer.

        Window j begins at start + (j - 1) * 2**step_bits + ahead, with `ahead` int64 [n] in
        1 to 2**step_bits.
        """

    def basis(self, pieces: Pieces, low: np.ndarray) -> np.ndarray:
        """Y_k(y) with `pieces.basis_bits[k]` fractional bits, int64 [n, terms], for int64 y [n]."""


@dataclass(frozen=True, eq=False)
class Pieces:
    """A function as a table of windows, each with the words of one entry.

    windows: number of windows, a power of two. step_bits: s; a window spans 2**s units of x, and a
    unit is 2**-16. start: left end of the first window in units. widths: bytes of each coefficient.
    integer_bits: values are below 2**(integer_bits - 2), so that the upper 32 bits of a share hold
    them with two bits to spare. Valid for x in [start, start + (windows - 1) * 2**s].
    """

    curve: Curve
    start: int
    windows: int
    step_bits: int
    widths: tuple[int, ...]
    integer_bits: int

    def __post_init__(self) -> None:
        """Raises ValueError if words or windows have a size that kernels do not take."""
        if not all(_LEAST_BYTES <= width <= _MOST_BYTES for width in self.widths):
            raise ValueError(f"words have {_LEAST_BYTES} to {_MOST_BYTES} bytes, not {self.widths}")
        if self.windows < _FEWEST or self.windows & (self.windows - 1):
            raise ValueError(f"{self.windows} windows are no power of two, or less than {_FEWEST}")
        if not 0 < self.step_bits < _BASIS_FRAC or self.curve.terms != len(self.widths):
            raise ValueError("windows are too wide, or there is not one width for each term")

    @property
    def out_frac(self) -> int:
        """Fractional bits of the value."""
        return RING_BITS - self.integer_bits

    @property
    def entry_bytes(self) -> int:
        """Bytes of an entry."""
        return sum(self.widths)

    @property
    def dealt_bytes(self) -> int:
        """Bytes that the dealer sends to the server for one element."""
        return self.windows * self.entry_bytes

    @cached_property
    def basis_bits(self) -> np.ndarray:
        """Fractional bits of the public functions, int64 [terms].

        A coefficient has those of its word that are left. They are divided so that the rounding of
        both costs the same. A constant is 1, which needs none.
        """
        whole = 8 * np.array(self.widths) - self.integer_bits
        largest = np.maximum(self.curve.largest(self), 2.0**-whole)
        halves = np.rint((whole + np.log2(largest)) / 2)
        return np.clip(halves, 0, _BASIS_FRAC - 1).astype(np.int64)

    @cached_property
    def scales(self) -> np.ndarray:
        """What a coefficient is multiplied by to become a word, float64 [terms]."""
        return 2.0 ** (8 * np.array(self.widths) - self.integer_bits - self.basis_bits)

    def evaluate(self, ctx: Context, opened: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Shares modulo 2**64 of f(x) with `out_frac` fractional bits, for x = opened - mask.

        In: opened, public int32 [n]; mask of the same type, used only at the dealer, where it is r
        itself. Rounds 0, online 0 bytes; offline `dealt_bytes` per element, to the server alone.
        The client sees nothing new. The server sees each entry minus words of the client's stream,
        which are fresh, uniform and unknown to it, so what it sees is uniform, whatever r is. Both
        read the entry that z names, for every x.
        """
        count = opened.numel()
        out = torch.empty(count, dtype=torch.int64, device="meta" if opened.is_meta else "cpu")
        for first in range(0, count, _TOGETHER):
            piece = slice(first, first + _TOGETHER)
            self._evaluate(ctx, opened[piece], mask[piece], out[piece])
        return out if opened.is_meta else to_device(out, opened.device, "host")

    def _evaluate(
        self, ctx: Context, opened: torch.Tensor, mask: torch.Tensor, out: torch.Tensor
    ) -> None:
        shape = (opened.numel(), self.dealt_bytes)
        table = ctx.deal_corrected(shape, lambda share: self._correct(mask, share))
        if table is None or opened.is_meta:
            return
        points = to_host(opened, "host").numpy().astype(np.int64) - self.start
        basis = self.curve.basis(self, points & ((1 << self.step_bits) - 1))
        windows = (points >> self.step_bits) & (self.windows - 1)
        _read_entries(table, windows, np.array(self.widths), basis, out.numpy())

    def cost(self, count: int) -> Cost:
        """Cost of `evaluate` for `count` elements."""
        return Cost(offline=self.dealt_bytes * count)

    def _correct(self, mask: torch.Tensor, share: np.ndarray) -> np.ndarray:
        """The server's share of the tables of these masks [n], from the client's."""
        words = to_host(mask, "host").numpy().astype(np.int64)
        size = 1 << self.step_bits
        found = self.curve.coefficients(self, size - (words & (size - 1)))
        turns = (words >> self.step_bits) & (self.windows - 1)
        _subtract_share(found, self.scales, turns, np.array(self.widths), share)
        return share


@dataclass(frozen=True, eq=False)
class Polynomial:
    """Chebyshev polynomials: their coefficients fall off fast, and high ones need few bits.

    function: takes and returns real numbers; defined from one window before the table on.
    """

    function: Callable[[np.ndarray], np.ndarray]
    degree: int

    @property
    def terms(self) -> int:
        return self.degree + 1

    def largest(self, pieces: Pieces) -> np.ndarray:
        # The constant term's factor is 1, which has no fractional bits.
        found = np.abs(self._planes(pieces)).max((0, 1))
        found[0] = 0.0
        return found

    def coefficients(self, pieces: Pieces, ahead: np.ndarray) -> np.ndarray:
        out = np.empty((len(ahead), pieces.windows, self.terms))
        between = max(0, pieces.step_bits - _SHIFT_BITS)
        _interpolate(self._planes(pieces), ahead, between, out)
        return out

    def basis(self, pieces: Pieces, low: np.ndarray) -> np.ndarray:
        out = np.empty((len(low), self.terms), np.int64)
        _chebyshev(low, pieces.step_bits, pieces.basis_bits, out)
        return out

    def _planes(self, pieces: Pieces) -> np.ndarray:
        """Coefficients of windows that begin at each of the places: [places, windows, terms]."""
        where = pieces.start, pieces.windows, pieces.step_bits
        return _fitted(self.function, self.terms, *where)


@cache
def _fitted(
    function: Callable[[np.ndarray], np.ndarray],
    terms: int,
    start: int,
    windows: int,
    step_bits: int,
) -> np.ndarray:
    """Interpolate at 64 Chebyshev nodes of each window, and keep the first terms."""
    places, size = 1 << min(step_bits, _SHIFT_BITS), 1 << step_bits
    angles = np.pi * (np.arange(64) + 0.5) / 64
    project = np.cos(np.outer(np.arange(terms), angles)) / 32
    project[0] /= 2
    # One place more than there are, for the interpolation after the last.
    first = start + np.arange(places + 2)[:, None] * (size / places)
    centre = first + (np.arange(windows) - 1) * size + (size - 1) / 2
    x = (centre[..., None] + np.cos(angles) * size / 2) * 2.0**-FRACTIONAL_BITS
    return np.ascontiguousarray(function(x) @ project.T)


@dataclass(frozen=True)
class Exponential:
    """exp, which needs one word for each window: exp(x0 + y) = exp(x0) exp(y), and y is public."""

    terms = 1

    def largest(self, pieces: Pieces) -> np.ndarray:
        # What counts is the error as a part of the largest value, which is at least 1. There
        # exp(x0) may be as small as this, while exp(y) >= 1.
        return np.array([np.exp(-(2.0 ** (pieces.step_bits - FRACTIONAL_BITS)))])

    def coefficients(self, pieces: Pieces, ahead: np.ndarray) -> np.ndarray:
        unit = 2.0**-FRACTIONAL_BITS
        first = pieces.start + (np.arange(pieces.windows) - 1.0) * 2.0**pieces.step_bits
        return (np.exp(ahead * unit)[:, None] * np.exp(first * unit))[..., None]

    def basis(self, pieces: Pieces, low: np.ndarray) -> np.ndarray:
        high, rest = _powers(pieces.step_bits)
        product = high[low >> _LOW_DIGIT] * rest[low & ((1 << _LOW_DIGIT) - 1)]
        drop = _BASIS_FRAC + _DIGIT_FRAC - int(pieces.basis_bits[0])
        return ((product + (1 << (drop - 1))) >> drop)[:, None]


@cache
def _powers(step_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """exp of the upper and lower digits of y, with 30 and 26 fractional bits.

    Decimal arithmetic rounds alike on all machines. Raises ValueError if a window is so wide that
    the product of two entries would overflow.
    """
    if step_bits > FRACTIONAL_BITS + 2:
        raise ValueError(f"exp on windows of 2**{step_bits} units does not fit into a word")
    with decimal.localcontext(prec=40):
        unit = decimal.Decimal(2) ** -FRACTIONAL_BITS

        def entries(count: int, step: int, frac: int) -> np.ndarray:
            values = ((unit * step * i).exp() * 2**frac for i in range(count))
            return np.array([int(value.to_integral_value()) for value in values])

        upper = entries(1 << max(0, step_bits - _LOW_DIGIT), 1 << _LOW_DIGIT, _BASIS_FRAC)
        return upper, entries(1 << _LOW_DIGIT, 1, _DIGIT_FRAC)


@compiled()
def _interpolate(planes, ahead, between, out):  # type: ignore[no-untyped-def]
    """Coefficients at each place `ahead`, on a line between the two places beside it."""
    scale = 1.0 / (1 << between)
    for i in range(ahead.shape[0]):
        place = ahead[i] >> between
        weight = (ahead[i] - (place << between)) * scale
        one, other, target = planes[place], planes[place + 1], out[i]
        for j in range(target.shape[0]):
            for k in range(target.shape[1]):
                target[j, k] = one[j, k] + weight * (other[j, k] - one[j, k])


@compiled()
def _chebyshev(low, step_bits, bits, out):  # type: ignore[no-untyped-def]
    """T_k at the middle of each unit y of a window, rounded to bits[k] fractional bits."""
    for i in range(low.shape[0]):
        x = (2 * low[i] + 1 - (np.int64(1) << step_bits)) << (_BASIS_FRAC - step_bits)
        before, now = x, np.int64(1) << _BASIS_FRAC
        for k in range(out.shape[1]):
            drop = _BASIS_FRAC - bits[k]
            out[i, k] = (now + (np.int64(1) << (drop - 1))) >> drop
            before, now = now, ((x * now) >> (_BASIS_FRAC - 1)) - before


@compiled()
def _read_entries(table, windows, widths, basis, out):  # type: ignore[no-untyped-def]
    """Sums of an entry's words, each in the upper bits of a word of 64, times public numbers."""
    terms, more = widths.shape[0], _more_bytes(widths)
    halves = table.view(np.uint32)
    size = table.shape[1] // (4 * terms + more)
    for i in range(table.shape[0]):
        total, place = np.int64(0), 4 * terms * size + windows[i] * more
        for k in range(terms):
            word = np.uint64(halves[i, windows[i] * terms + k])
            for byte in range(widths[k] - 4):
                word |= np.uint64(table[i, place]) << np.uint64(32 + 8 * byte)
                place += 1
            total += np.int64(word << np.uint64(64 - 8 * widths[k])) * basis[i, k]
        out[i] = total


@compiled()
def _subtract_share(found, scales, turns, widths, share):  # type: ignore[no-untyped-def]
    """Replace the client's share of the tables by the words minus it, entry by entry."""
    size, terms, more = found.shape[1], widths.shape[0], _more_bytes(widths)
    halves = share.view(np.uint32)
    for i in range(found.shape[0]):
        for j in range(size):
            entry = (j + turns[i]) & (size - 1)
            place = 4 * terms * size + entry * more
            low = halves[i, entry * terms : (entry + 1) * terms]
            for k in range(terms):
                word = np.uint64(np.int64(np.floor(found[i, j, k] * scales[k] + 0.5)))
                theirs = np.uint64(low[k])
                for byte in range(widths[k] - 4):
                    theirs |= np.uint64(share[i, place + byte]) << np.uint64(32 + 8 * byte)
                word -= theirs
                low[k] = word & np.uint64(0xFFFFFFFF)
                for byte in range(widths[k] - 4):
                    share[i, place] = (word >> np.uint64(32 + 8 * byte)) & np.uint64(255)
                    place += 1


@compiled(inline="always")
def _more_bytes(widths):  # type: ignore[no-untyped-def]
    """Bytes of an entry beyond the lower half of each word."""
    more = 0
    for k in range(widths.shape[0]):
        more += widths[k] - 4
    return more
