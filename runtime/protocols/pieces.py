"""Functions of a secret from tables that are dealt entry by entry, all of it to the server.

With z = x + r open, split z - start at bit s: its upper part v modulo the number of windows is
public, and so is its lower part y. What x is for each y, with v given, the dealer knows but for
whole tables: x = x0 + y, where x0 depends on v and r. So it deals, for each v, the coefficients of
the function on [x0, x0 + 2**s) with respect to public functions Y_k of y:

    f(x0 + y) = sum over k of a_k(x0) Y_k(y)

A party reads the entry at v, and its share of the value is a public combination of that entry's
words. The windows begin where the mask says, not at fixed places, so no borrow between the two
parts of z is left over, and a window need not overlap the one before it (`interval`). A function
that repeats itself needs one window alone (`waves`).

Every entry is shared. The client's share of the table is the next bytes of its own stream, so the
dealer sends it nothing; the server receives the differences. A key of a point function is shorter,
but its corrections go to both parties. Source: one-time truth tables (Ishai et al., TCC 2013).

The words of an entry have as many bytes as each needs. A coefficient with 8 w bits counts in the
upper bits of a ring of 64, so the value comes out modulo 2**64 whatever the widths are.
"""

from __future__ import annotations

import decimal
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.spec import FRACTIONAL_BITS, RING_BITS, Cost
from mergec.runtime.kernels.backends import Kernel
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.kernels.transfers import integers, to_device

_TOGETHER = 1 << 11, 1 << 15
"""Elements whose tables exist at once (`Kernel.pieces`), as long tables of many elements would fill
the memory. What is dealt does not depend on it."""

_BASIS_FRAC = 30
"""Fractional bits with which public functions are computed, in integers: both parties must come to
the same words, and processors may differ in the last bit of a floating-point number."""

_LEAST_BYTES, _MOST_BYTES = 4, 8
"""Bytes of a word: its lower half is read at once, the others one by one."""

_WORD_BITS = 32
"""Bits of an opened number."""

_ALIGNED = 4
"""A table's bytes are a multiple of this, as the lower halves of words are read together."""

_UNIT = 2.0**-FRACTIONAL_BITS
_LOW_DIGIT = 9
_DIGIT_FRAC = 26


class Curve(ABC):
    """A function on windows: coefficients that the dealer shares, and public functions of y."""

    @property
    @abstractmethod
    def terms(self) -> int:
        """Number of coefficients of an entry."""

    @abstractmethod
    def magnitudes(self, pieces: Pieces) -> np.ndarray:
        """Binary logarithm of the size of each coefficient, compared to its public function:
        [terms]. Parties must come to the same numbers, on all machines.
        """

    @abstractmethod
    def coefficients(self, pieces: Pieces, behind: torch.Tensor) -> torch.Tensor:
        """Coefficients of each window, float64 [n, windows, terms]. Called by the dealer.

        Window j begins at start + j * 2**step_bits - behind, with `behind` int64 [n] in 0 to
        2**step_bits - 1.
        """

    @abstractmethod
    def basis(self, pieces: Pieces, low: torch.Tensor) -> torch.Tensor:
        """Y_k(y) with `pieces.basis_bits[k]` fractional bits, int64 [n, terms], for int64 y [n]."""

    def span(self, pieces: Pieces) -> int:
        """Length of the range in which the function is right, in units."""
        return (pieces.windows - 1) << pieces.step_bits

    def undealt(
        self, ctx: Context, pieces: Pieces, opened: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor | None:
        """A party's share of what it adds without a dealt word, int64 [n]; None if that is zero.

        opened: z, int32 [n]. mask: the party's own share of r.
        """
        return None


@dataclass(frozen=True, eq=False)
class Pieces:
    """A function as a table of windows, each with the words of one entry.

    windows: number of windows, a power of two. step_bits: s; a window spans 2**s units of x, and a
    unit is 2**-16. start: left end of the first window in units. widths: bytes of each coefficient.
    integer_bits: values are below 2**(integer_bits - 2), so that the upper 32 bits of a share hold
    them with two bits to spare. Valid for x in [start, start + span].
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
        if self.windows < 1 or self.windows & (self.windows - 1):
            raise ValueError(f"{self.windows} windows are no power of two")
        if not 0 < self.step_bits <= _WORD_BITS or self.curve.terms != len(self.widths):
            raise ValueError("windows are too wide, or there is not one width for each term")
        if self.dealt_bytes % _ALIGNED:
            raise ValueError(f"a table of {self.dealt_bytes} bytes is no multiple of {_ALIGNED}")

    @property
    def span(self) -> int:
        """Length of the range in which values are right, in units."""
        return self.curve.span(self)

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
        both costs the same.
        """
        whole = 8 * np.array(self.widths) - self.integer_bits
        halves = np.rint((whole + np.maximum(self.curve.magnitudes(self), -whole)) / 2)
        return np.clip(halves, 0, _BASIS_FRAC - 1).astype(np.int64)

    @cached_property
    def scales(self) -> np.ndarray:
        """What a coefficient is multiplied by to become a word, float64 [terms]."""
        return 2.0 ** (8 * np.array(self.widths) - self.integer_bits - self.basis_bits)

    def layout(self, device: torch.device) -> Layout:
        """Where the bytes of words are in a table, on a device."""
        return _layout(self, device)

    def evaluate(self, ctx: Context, opened: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Shares modulo 2**64 of f(x) with `out_frac` fractional bits, for x = opened - mask.

        In: opened, public int32 [n]; mask of the same type, a party's own share of r, and at the
        dealer r itself. Rounds 0, online 0 bytes; offline `dealt_bytes` per element, to the server
        alone.
        The client sees nothing new. The server sees each entry minus words of the client's stream,
        which are fresh, uniform and unknown to it, so what it sees is uniform, whatever r is. Both
        read the entry that z names, for every x.
        """
        count = opened.numel()
        out = torch.empty(count, dtype=torch.int64, device=opened.device)
        for piece in _VALUES.pieces(mask):
            self._evaluate(ctx, opened[piece], mask[piece], out[piece])
        return out

    def _evaluate(
        self, ctx: Context, opened: torch.Tensor, mask: torch.Tensor, out: torch.Tensor
    ) -> None:
        shape = (opened.numel(), self.dealt_bytes)
        table = ctx.deal_corrected(shape, lambda share: self._correct(mask, share))
        if table is None or opened.is_meta:
            return
        windows, low = _PARTS(opened, self.start, self)
        _VALUES(table, windows, self.curve.basis(self, low), self, out)
        own = self.curve.undealt(ctx, self, opened, mask)
        if own is not None:
            out += own

    def cost(self, count: int) -> Cost:
        """Cost of `evaluate` for `count` elements."""
        return Cost(offline=self.dealt_bytes * count)

    def _correct(self, mask: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """The server's share of the tables of these masks [n], from the client's."""
        turns, low = _PARTS(mask, 0, self)
        _CORRECTED(share, self.curve.coefficients(self, low), turns, self)
        return share


@dataclass(frozen=True)
class Exponential(Curve):
    """exp, which needs one word for each window: exp(x0 + y) = exp(x0) exp(y), and y is public."""

    @property
    def terms(self) -> int:
        return 1

    def magnitudes(self, pieces: Pieces) -> np.ndarray:
        # What counts is the error as a part of the largest value, which is at least 1. There
        # exp(x0) may be as small as exp(-S) for windows of length S, while exp(y) >= 1.
        return np.array([-(2.0 ** (pieces.step_bits - FRACTIONAL_BITS)) / math.log(2)])

    def coefficients(self, pieces: Pieces, behind: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _EXPONENTIALS(behind, pieces)
        return found

    def basis(self, pieces: Pieces, low: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _POWERS(low, pieces)
        return found


@cache
def _powers(step_bits: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """exp of the upper and lower digits of y, with 30 and 26 fractional bits.

    Decimal arithmetic rounds alike on all machines. Raises ValueError if a window is so wide that
    the product of two entries would overflow.
    """
    if step_bits > FRACTIONAL_BITS + 2:
        raise ValueError(f"exp on windows of 2**{step_bits} units does not fit into a word")
    with decimal.localcontext(prec=40):
        unit = decimal.Decimal(2) ** -FRACTIONAL_BITS

        def entries(count: int, step: int, frac: int) -> torch.Tensor:
            values = ((unit * step * i).exp() * 2**frac for i in range(count))
            found = torch.tensor([int(value.to_integral_value()) for value in values])
            return to_device(found, device, "public")

        upper = entries(1 << max(0, step_bits - _LOW_DIGIT), 1 << _LOW_DIGIT, _BASIS_FRAC)
        return upper, entries(1 << _LOW_DIGIT, 1, _DIGIT_FRAC)


@dataclass(frozen=True)
class Layout:
    """Where the bytes of words are in a table, on a device.

    A table has the lower halves of all words first, entry by entry, then the bytes beyond them.
    scales: those of `Pieces`. term, place: of each byte of an entry beyond the lower halves, the
    term, and by how many bits it is shifted in its word. above: bits of 64 above each word. spans:
    of each word, how many bytes it has beyond its lower half, and the number of the first one among
    those of its entry: int64 [terms, 2].
    """

    scales: torch.Tensor
    term: torch.Tensor
    place: torch.Tensor
    above: torch.Tensor
    spans: torch.Tensor


@cache
def _layout(pieces: Pieces, device: torch.device) -> Layout:
    upper = [(k, 8 * byte) for k, width in enumerate(pieces.widths) for byte in range(4, width)]
    more = [width - 4 for width in pieces.widths]
    spans = [(size, sum(more[:k])) for k, size in enumerate(more)]
    return Layout(
        to_device(torch.from_numpy(pieces.scales), device, "public"),
        integers(tuple(term for term, _ in upper), device),
        integers(tuple(place for _, place in upper), device),
        integers(tuple(RING_BITS - 8 * width for width in pieces.widths), device),
        integers(tuple(number for span in spans for number in span), device).view(-1, 2),
    )


def _joined(lower: torch.Tensor, upper: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Words, int64 [..., terms], from their lower halves and the bytes beyond these."""
    return (lower.long() & 0xFFFFFFFF).index_add(-1, layout.term, upper.long() << layout.place)


def _parts_host(words: torch.Tensor, start: int, pieces: Pieces) -> torch.Tensor:
    """Windows and positions in them of words [n] less `start`: int64 [2, n]."""
    out = torch.empty((2, len(words)), dtype=torch.int64)
    _split(words.numpy(), start, pieces.step_bits, pieces.windows, out.numpy())
    return out


def _parts_tensors(words: torch.Tensor, start: int, pieces: Pieces) -> torch.Tensor:
    points = words.long() - start
    window = (points >> pieces.step_bits) & (pieces.windows - 1)
    return torch.stack([window, points & ((1 << pieces.step_bits) - 1)])


_PARTS = Kernel("pieces.parts", _parts_host, _parts_tensors, triton=False)


@cache
def _first_exponentials(pieces: Pieces, device: torch.device) -> torch.Tensor:
    """exp of where the windows begin, less a window: float64 [windows]."""
    first = pieces.start + (np.arange(pieces.windows) - 1.0) * 2.0**pieces.step_bits
    return to_device(torch.from_numpy(np.exp(first * _UNIT)), device, "public")


@cache
def _all_exponentials(step_bits: int, device: torch.device) -> torch.Tensor:
    """exp of 2**step_bits units and down to one: a device's own exp may round otherwise."""
    places = np.exp(np.arange(1 << step_bits, 0, -1) * _UNIT)
    return to_device(torch.from_numpy(places), device, "public")


def _exponentials_host(behind: torch.Tensor, pieces: Pieces) -> torch.Tensor:
    """`Curve.coefficients` of exp, float64 [n, windows, 1]."""
    first = _first_exponentials(pieces, behind.device).numpy()
    ahead = (1 << pieces.step_bits) - behind.numpy()
    return torch.from_numpy((np.exp(ahead * _UNIT)[:, None] * first)[..., None])


def _exponentials_tensors(behind: torch.Tensor, pieces: Pieces) -> torch.Tensor:
    places = _all_exponentials(pieces.step_bits, behind.device)
    return (places[behind][:, None] * _first_exponentials(pieces, behind.device))[..., None]


_EXPONENTIALS = Kernel(
    "pieces.exponentials", _exponentials_host, _exponentials_tensors, triton=False
)


def _powers_host(low: torch.Tensor, pieces: Pieces) -> torch.Tensor:
    """`Curve.basis` of exp, int64 [n, 1]."""
    out = torch.empty((len(low), 1), dtype=torch.int64)
    upper, rest = (digits.numpy() for digits in _powers(pieces.step_bits, low.device))
    _multiply_powers(low.numpy(), upper, rest, _dropped(pieces), out.numpy())
    return out


def _powers_tensors(low: torch.Tensor, pieces: Pieces) -> torch.Tensor:
    upper, rest = _powers(pieces.step_bits, low.device)
    product = upper[low >> _LOW_DIGIT] * rest[low & ((1 << _LOW_DIGIT) - 1)]
    drop = _dropped(pieces)
    return ((product + (1 << (drop - 1))) >> drop)[:, None]


_POWERS = Kernel("pieces.powers", _powers_host, _powers_tensors, triton=False)


def _dropped(pieces: Pieces) -> int:
    """Bits that are rounded off the product of two digits' powers."""
    return _BASIS_FRAC + _DIGIT_FRAC - int(pieces.basis_bits[0])


def _values_host(
    table: torch.Tensor,
    windows: torch.Tensor,
    basis: torch.Tensor,
    pieces: Pieces,
    out: torch.Tensor,
) -> None:
    """Write a party's shares of the values to out [n], from its tables, uint8 [n, bytes].

    windows: the entry that is read, int64 [n]; basis: `Curve.basis` [n, terms].
    """
    layout = pieces.layout(table.device)
    places = layout.place + layout.above[layout.term]
    _read_entries(
        table.numpy(), windows.numpy(), layout.above.numpy(), layout.term.numpy(), places.numpy(),
        basis.numpy(), out.numpy(),
    )  # fmt: skip


def _values_tensors(
    table: torch.Tensor,
    windows: torch.Tensor,
    basis: torch.Tensor,
    pieces: Pieces,
    out: torch.Tensor,
) -> None:
    terms, layout = len(pieces.widths), pieces.layout(table.device)
    start, more = 4 * terms * pieces.windows, len(layout.term)
    each, byte = (torch.arange(number, device=table.device) for number in (terms, more))
    lower = table.view(torch.int32).gather(1, windows[:, None] * terms + each)
    upper = table.gather(1, start + windows[:, None] * more + byte)
    words = _joined(lower, upper, layout) << layout.above
    out.copy_((words * basis).sum(1))


_VALUES = Kernel("pieces.values", _values_host, _values_tensors, together=_TOGETHER)


def _corrected_host(
    share: torch.Tensor, found: torch.Tensor, turns: torch.Tensor, pieces: Pieces
) -> None:
    """Turn the client's share of tables, uint8 [n, bytes], into the server's.

    found: `Curve.coefficients`. turns: by how many entries the windows are moved, int64 [n].
    """
    spans = pieces.layout(share.device).spans.numpy()
    _subtract_share(found.numpy(), pieces.scales, turns.numpy(), spans, share.numpy())


def _corrected_tensors(
    share: torch.Tensor, found: torch.Tensor, turns: torch.Tensor, pieces: Pieces
) -> None:
    (size, terms), layout = found.shape[1:], pieces.layout(share.device)
    lower = share.view(torch.int32)[:, : size * terms].unflatten(1, (size, terms))
    upper = share[:, 4 * size * terms :].unflatten(1, (size, len(layout.term)))
    window = (torch.arange(size, device=share.device) - turns[:, None]) & (size - 1)
    words = (found * layout.scales + 0.5).floor().long()
    words = words.gather(1, window[..., None].expand(words.shape))
    words = words - _joined(lower, upper, layout)
    lower.copy_(words.to(torch.int32))
    upper.copy_(((words[..., layout.term] >> layout.place) & 255).to(torch.uint8))


_CORRECTED = Kernel("pieces.corrected", _corrected_host, _corrected_tensors)


@compiled()
def _split(words, start, step_bits, windows, out):  # type: ignore[no-untyped-def]
    ones = (np.int64(1) << step_bits) - 1
    for i in range(words.shape[0]):
        point = np.int64(words[i]) - start
        out[0, i] = (point >> step_bits) & (windows - 1)
        out[1, i] = point & ones


@compiled()
def _multiply_powers(low, upper, rest, drop, out):  # type: ignore[no-untyped-def]
    """exp(y) from its two digits, rounded."""
    half, ones = np.int64(1) << (drop - 1), (1 << _LOW_DIGIT) - 1
    for i in range(low.shape[0]):
        product = upper[low[i] >> _LOW_DIGIT] * rest[low[i] & ones]
        out[i, 0] = (product + half) >> drop


@compiled()
def _read_entries(table, windows, above, term, places, basis, out):  # type: ignore[no-untyped-def]
    """Sums of an entry's words, each in the upper bits of a word of 64, times public numbers.

    above: bits of 64 above each word. term, places: of each byte beyond the lower halves, its word,
    and how far it is shifted.
    """
    terms, more = above.shape[0], term.shape[0]
    halves = table.view(np.uint32)
    size = table.shape[1] // (4 * terms + more)
    for i in range(table.shape[0]):
        lower = halves[i, windows[i] * terms : (windows[i] + 1) * terms]
        upper = table[i, 4 * terms * size + windows[i] * more :]
        factors, total = basis[i], np.int64(0)
        for k in range(terms):
            total += np.int64(np.uint64(lower[k]) << np.uint64(above[k])) * factors[k]
        for k in range(more):
            total += np.int64(np.uint64(upper[k]) << np.uint64(places[k])) * factors[term[k]]
        out[i] = total


@compiled()
def _subtract_share(found, scales, turns, spans, share):  # type: ignore[no-untyped-def]
    """Replace the client's share of the tables by the words minus it, entry by entry."""
    size, terms = found.shape[1], found.shape[2]
    more = share.shape[1] // size - 4 * terms
    halves = share.view(np.uint32)
    for i in range(found.shape[0]):
        for j in range(size):
            entry = (j + turns[i]) & (size - 1)
            place = 4 * terms * size + entry * more
            low = halves[i, entry * terms : (entry + 1) * terms]
            for k in range(terms):
                word = np.uint64(np.int64(np.floor(found[i, j, k] * scales[k] + 0.5)))
                theirs = np.uint64(low[k])
                for byte in range(spans[k, 0]):
                    theirs |= np.uint64(share[i, place + byte]) << np.uint64(32 + 8 * byte)
                word -= theirs
                low[k] = word & np.uint64(0xFFFFFFFF)
                for byte in range(spans[k, 0]):
                    share[i, place] = (word >> np.uint64(32 + 8 * byte)) & np.uint64(255)
                    place += 1
