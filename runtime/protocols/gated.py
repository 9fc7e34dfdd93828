"""f(g) * u by one opening: a sum of cosines, of which each word is also dealt times a mask.

With z = g + r and t = u + s open, u is base - low + wrap * top: two public numbers, and of s its
upper bits and its top bit (`truncate.Truncation`). f(g) is g/2 and an even function, a sum of
cosines whose every term is a dealt word W times a public number P (`waves`). So

    f(g) * u = sum over P of (base * W - (low * W) + wrap * (top * W))

takes three words where f(g) alone takes one, and no opening of f(g), which the usual way multiplies
by u then. Nothing tells apart what is beyond the table, so the table covers all that g reaches.

Nothing is rounded off between the product of three numbers and its result, so the words need more
than 64 bits: 96, with 64 of them behind the point. Each party drops the lower 32 of its share, and
what is left are shares modulo 2**64 (`truncate`, into a smaller ring). Of a word for a small cosine
the lowest bytes are zero, and are left out. `top` stands for 2**W' units of u, so of a word times
it only 96 - W' bits count.

Words are dealt in planes: of all words of an element the same byte, or the same four. A party
multiplies a plane by the public numbers and adds, and shifts the sums alone.
Source: one-time truth tables (Ishai et al., TCC 2013), as in `pieces`; the cosines are those of
`waves`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, together
from mergec.runtime.core.spec import FRACTIONAL_BITS, RING_BITS, Cost
from mergec.runtime.core.values import Shared, logical_shift
from mergec.runtime.kernels.backends import Kernel
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.kernels.long import HALF_BITS, ONES
from mergec.runtime.kernels.transfers import integers, to_device
from mergec.runtime.kernels.turns import FRAC, TURNED
from mergec.runtime.kernels.wide import plus, times
from mergec.runtime.protocols.compare import WINDOW_BITS
from mergec.runtime.protocols.opening import Cut, open_under
from mergec.runtime.protocols.truncate import (
    NARROW_OFFSET,
    OFFSET,
    Truncation,
    truncation_parts,
    unbiased_window,
)
from mergec.runtime.protocols.waves import Waves

SPANS = 48, 64, 80
"""For which n there is a table for |g| <= n."""

OUT_FRAC = 2 * FRACTIONAL_BITS

_BITS = 36
"""Fractional bits of a word and of the public number that it is multiplied by, together, if the
cosine's coefficient is 1; they are fewer by its binary logarithm."""

_BYTES = 12
"""Bytes of a whole word. With 16 fractional bits of u, 48 are left for the two above."""

_LOWEST = 4
"""Lowest bytes of a word: what they hold is below a unit of the result, but for carries."""

_LINEAR = 9
"""Dealt words of g/2 times u."""

_TOGETHER = 1 << 8, 1 << 12
"""Elements whose tables exist at once (`Kernel.pieces`); what is dealt does not depend on it."""


@dataclass(frozen=True)
class Plane:
    """The same bytes of all words: `size` of them, 4 or 1, from byte `position` of a word on.

    count: for how many words; those of the smallest cosines lack the lowest bytes. offset: where
    it begins among the bytes of an element.
    """

    position: int
    size: int
    count: int
    offset: int


@dataclass(frozen=True)
class Gated:
    """f(g) * u with 32 fractional bits, for |g| <= `curve.half` and u with `frac` of them.

    u is truncated to 16 fractional bits of its half. Raises ValueError if words would have sizes
    that kernels do not take.
    """

    curve: Waves
    frac: int

    def __post_init__(self) -> None:
        sizes = self.curve.sizes
        if list(sizes) != sorted(sizes, reverse=True) or sizes[0] > 2 * _LOWEST:
            raise ValueError(f"the cosines' sizes, 2**{list(sizes)}, must decrease from 2**8 on")
        if not 0 <= self.frac <= RING_BITS - 2:
            raise ValueError(f"no factor has {self.frac} fractional bits")

    @property
    def terms(self) -> int:
        return self.curve.terms

    @property
    def lift(self) -> int:
        """By how many bits a share of u is shifted up before it is opened."""
        return max(0, FRACTIONAL_BITS - self.frac)

    @property
    def narrow(self) -> bool:
        """Whether u is opened in a window of 32 bits."""
        return self._drop >= WINDOW_BITS

    @property
    def shift(self) -> int:
        """How many bits of the opened word are truncated."""
        return self._drop - WINDOW_BITS if self.narrow else self._drop

    @property
    def factor_bits(self) -> int:
        """Bits of the truncated word."""
        return (WINDOW_BITS if self.narrow else RING_BITS) - self.shift

    @property
    def _drop(self) -> int:
        return self.frac + self.lift - FRACTIONAL_BITS + 1

    @cached_property
    def lowest(self) -> tuple[int, ...]:
        """How many of the lowest bytes each word has, [terms]."""
        needed = (_BITS + 1 + size - FRACTIONAL_BITS for size in self.curve.sizes)
        return tuple(min(_LOWEST, max(0, -(-bits // 8))) for bits in needed for _ in range(2))

    @cached_property
    def basis_bits(self) -> np.ndarray:
        """Fractional bits of the public numbers, int64 [terms]; a word has those that are left.

        They are divided so that the rounding of both costs the same.
        """
        whole = FRACTIONAL_BITS + 8 * np.array(self.lowest)
        sizes = np.repeat(self.curve.sizes, 2) + 1
        return np.clip(np.rint((whole + sizes) / 2), 0, FRAC - 1).astype(np.int64)

    @cached_property
    def scales(self) -> np.ndarray:
        """What a cosine, as an integer, is multiplied by to become a word, float64 [terms].

        Words are those of 2 f(g), as they are multiplied by u/2.
        """
        bits = FRACTIONAL_BITS + 8 * np.array(self.lowest) - self.basis_bits
        return 2 * np.repeat(self.curve.fitted[1:], 2) * 2.0 ** (bits - FRAC)

    @cached_property
    def planes(self) -> tuple[tuple[Plane, ...], ...]:
        """Where the bytes of words are: of W, of low * W and of top * W, each from the lowest."""
        sizes = _BYTES, _BYTES, -(-(8 * _BYTES - self.factor_bits) // 8)
        every = ((word, *part) for word, size in enumerate(sizes) for part in _positions(size))
        found: tuple[list[Plane], ...] = ([], [], [])
        place = 0
        # Those of four bytes come first, so that all of them are aligned.
        for word, position, size in sorted(every, key=lambda part: -part[2]):
            found[word].append(Plane(position, size, self._count(position), place))
            place += size * self._count(position)
        return tuple(tuple(sorted(planes, key=lambda plane: plane.position)) for planes in found)

    def _count(self, position: int) -> int:
        """How many words have this byte."""
        return sum(position >= _LOWEST - lowest for lowest in self.lowest)

    @property
    def row_bytes(self) -> int:
        """Bytes of an element's planes: a multiple of four, as some are read in fours."""
        planes = (plane for word in self.planes for plane in word)
        return -(-sum(plane.size * plane.count for plane in planes) // 4) * 4

    @property
    def dealt_bytes(self) -> int:
        """Bytes that the dealer sends to the server for one element."""
        return self.row_bytes + 8 * _LINEAR

    def words(self, turned: torch.Tensor) -> torch.Tensor:
        """The words of cosines and sines with 30 fractional bits, int64 [n, terms]."""
        scales = to_device(torch.from_numpy(self.scales), turned.device, "public")
        return (turned * scales).add_(0.5).floor_().long()

    def layout(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """What kernels read of a table: its planes as int64 [planes, 4], which of them are those of
        which word [4], and bits that words are shifted up by [terms].
        """
        return _layout(self, device)

    @cached_property
    def mean(self) -> int:
        """Twice the mean of the cosines, with 16 fractional bits: for the dealer."""
        return round(2 * float(self.curve.fitted[0]) * 2**FRACTIONAL_BITS)


def gated(ctx: Context, table: Gated, gate: Cut, up: Shared) -> Protocol:
    """Shares modulo 2**64 of f(g) * u with 32 fractional bits, by one opening.

    In: g to 16 fractional bits and u with `table.frac`, of the same shape; |g| is at most
    `table.curve.half` (nothing tells g beyond it apart, and the result is that of another number
    then), and |u| below 2**(62 - `table.frac`). Rounds 1; online 8 bytes per element for g, and 16
    for u, or 8 from 47 fractional bits on; offline `table.dealt_bytes`, to the server alone.

    Each party sees g + 2**30 + r modulo 2**32 and u, in its ring, plus a constant and s: uniform,
    as r and s are fresh and uniform there. The client is dealt nothing. The server is sent words of
    the tables minus words of the client's stream, which are fresh, uniform and unknown to it, so
    what it sees is uniform, whatever r and s are. All words of all elements are read. Not for exact
    rounding, as the client sees which way u and the product are rounded.
    """
    wide = gate.mask(ctx)
    mask = gate.narrow(wide)
    share = up.share.reshape(-1)
    if table.lift and not share.is_meta:
        share = share << table.lift
    offset = OFFSET
    if table.narrow:
        share, offset = unbiased_window(ctx, share, WINDOW_BITS), NARROW_OFFSET
    factor_mask = ctx.mask(share.shape, share.dtype)
    opened, factor = yield from together(
        gate.open(ctx, wide, NARROW_OFFSET), open_under(ctx, share, factor_mask, offset)
    )
    out = _linear(ctx, table, (opened, mask), (factor, factor_mask))
    for piece in _VALUES.pieces(mask):
        _add_waves(
            ctx,
            table,
            (opened[piece], mask[piece]),
            (factor[piece], factor_mask[piece]),
            out[piece],
        )
    return out.reshape(up.shape)


def gated_cost(table: Gated, count: int) -> Cost:
    """Cost of `gated` for `count` elements."""
    return Cost(1, (16 if table.narrow else 24) * count, table.dealt_bytes * count)


_Opened = tuple[torch.Tensor, torch.Tensor]
"""An opened value, [n], and the mask that it was opened under: at a party, a share of it."""


def _linear(ctx: Context, table: Gated, gate: _Opened, up: _Opened) -> torch.Tensor:
    """Shares of g/2 and the cosines' mean, times u: products of two opened values' parts."""

    def products() -> torch.Tensor:
        parts = truncation_parts(gate[1], 0)
        # The mean is that of a fit, which may differ in its last bits between machines.
        parts[:, 1] -= table.mean
        return _pairs(parts, truncation_parts(up[1], table.shift))

    dealt = ctx.deal((len(gate[1]), _LINEAR), products)
    if gate[0].is_meta:
        return ghost(gate[0].shape)
    weights = _pairs(Truncation(gate[0], 0).weights, Truncation(up[0], table.shift).weights)
    return (weights * dealt).sum(-1)


def _pairs(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one[:, :, None] * other[:, None, :]).reshape(len(one), _LINEAR)


def _add_waves(ctx: Context, table: Gated, gate: _Opened, up: _Opened, out: torch.Tensor) -> None:
    """Add a party's shares of the cosines times u to out [n]."""

    def correct(share: torch.Tensor) -> torch.Tensor:
        turned = TURNED(gate[1].long(), table.curve.cycles, np.full(table.terms, FRAC))
        _CORRECTED(share, table.words(turned), truncation_parts(up[1], table.shift), table)
        return share

    dealt = ctx.deal_corrected((len(gate[1]), table.row_bytes), correct)
    if dealt is None or gate[0].is_meta:
        return
    place = (gate[0] - NARROW_OFFSET).long()
    basis = TURNED(place, table.curve.cycles, table.basis_bits)
    factor = Truncation(up[0], table.shift)
    _VALUES(dealt, basis, factor.base, factor.wrap, table, out)


def _positions(size: int) -> Sequence[tuple[int, int]]:
    """The planes of a word of so many bytes: positions and sizes, from the lowest."""
    found = [(position, 1) for position in range(_LOWEST)]
    place = _LOWEST
    while place < size:
        found.append((place, 4 if size - place >= 4 else 1))
        place += found[-1][1]
    return found


@cache
def _layout(table: Gated, device: torch.device) -> tuple[torch.Tensor, ...]:
    planes = [p for word in table.planes for p in word]
    rows = [n for p in planes for n in (p.position, p.size, p.count, p.offset)]
    firsts = np.cumsum([0, *map(len, table.planes)]).tolist()
    return (
        integers(tuple(rows), device).view(-1, 4),
        integers(tuple(firsts), device),
        integers(tuple(8 * (_LOWEST - lowest) for lowest in table.lowest), device),
    )


def _corrected_host(
    share: torch.Tensor, words: torch.Tensor, parts: torch.Tensor, table: Gated
) -> None:
    """Turn the client's share of planes, uint8 [n, row], into the server's.

    words: `Gated.words` of the masks of g, int64 [n, terms]. parts: `truncation_parts` of the masks
    of u, int64 [n, 3].
    """
    layout = (each.numpy() for each in table.layout(share.device))
    _deal_cpu(words.numpy(), parts.numpy(), *layout, share.numpy())


def _corrected_tensors(
    share: torch.Tensor, words: torch.Tensor, parts: torch.Tensor, table: Gated
) -> None:
    _, _, up = table.layout(share.device)
    for i, planes in enumerate(table.planes):
        factor = parts[:, i, None]
        # A product of words is below 2**62: the first has 30 bits, the second is cut into halves.
        low, high = words * (factor & ONES), words * (factor >> HALF_BITS)
        high = high + (low >> HALF_BITS)
        limbs = [low & ONES, high & ONES, (high >> HALF_BITS) & ONES]
        shifted = [limbs[0] << up & ONES] + [
            (limbs[k] << up & ONES) | (limbs[k - 1] >> (HALF_BITS - up)) for k in (1, 2)
        ]
        borrow = torch.zeros_like(words)
        for plane in planes:
            theirs = _plane(share, plane)
            own = shifted[plane.position // 4][:, : plane.count] >> (8 * (plane.position % 4))
            ones = (1 << (8 * plane.size)) - 1
            left = (own & ones) - theirs - borrow[:, : plane.count]
            _write(share, plane, left & ones)
            borrow[:, : plane.count] = (left < 0).long()


def _plane(rows: torch.Tensor, plane: Plane) -> torch.Tensor:
    """The words of a plane, int64 [n, count]."""
    bytes_ = rows[:, plane.offset : plane.offset + plane.size * plane.count].long()
    return sum(bytes_[:, k :: plane.size] << (8 * k) for k in range(plane.size))  # type: ignore[return-value]


def _write(rows: torch.Tensor, plane: Plane, words: torch.Tensor) -> None:
    for k in range(plane.size):
        places = slice(plane.offset + k, plane.offset + plane.size * plane.count, plane.size)
        rows[:, places] = (words >> (8 * k) & 255).to(torch.uint8)


def _values_host(
    dealt: torch.Tensor,
    basis: torch.Tensor,
    base: torch.Tensor,
    wrap: torch.Tensor,
    table: Gated,
    out: torch.Tensor,
) -> None:
    """Add a party's shares, rounded down, to out [n], from its planes, uint8 [n, row].

    basis: public numbers, int64 [n, terms]. base, wrap: those of `Truncation`, [n].
    """
    planes, firsts, *_ = (each.numpy() for each in table.layout(dealt.device))
    _read_cpu(
        dealt.numpy(), basis.numpy(), base.numpy(), wrap.numpy(), planes, firsts, table.factor_bits,
        out.numpy(),
    )  # fmt: skip


def _values_tensors(
    dealt: torch.Tensor,
    basis: torch.Tensor,
    base: torch.Tensor,
    wrap: torch.Tensor,
    table: Gated,
    out: torch.Tensor,
) -> None:
    whole, masked, topped = (_summed(dealt, basis, planes) for planes in table.planes)
    # 2**factor_bits is no word for a factor of 64 bits, so `wrap` is 1 or 0 here.
    carried = (wrap != 0).long()
    up = table.factor_bits
    top = [(limb << (up % HALF_BITS) & ONES) * carried for limb in topped]
    over = [(limb >> (HALF_BITS - up % HALF_BITS)) * carried for limb in topped]
    move = up // HALF_BITS
    sums = _times(whole, base)
    for k in range(3):
        sums[k] = sums[k] - masked[k]
        if k >= move:
            sums[k] = sums[k] + top[k - move]
        if k > move:
            sums[k] = sums[k] + over[k - move - 1]
    middle = sums[1] + (sums[0] >> HALF_BITS)
    out += (middle & ONES) + ((sums[2] + (middle >> HALF_BITS)) << HALF_BITS)


def _summed(
    dealt: torch.Tensor, basis: torch.Tensor, planes: Sequence[Plane]
) -> list[torch.Tensor]:
    """The sum of words times public numbers modulo 2**96, as three numbers below 2**32, [n]."""
    limbs = [torch.zeros_like(basis[:, 0]) for _ in range(4)]
    for plane in planes:
        total = (basis[:, : plane.count] * _plane(dealt, plane)).sum(1)
        at, up = plane.position // 4, 8 * (plane.position % 4)
        low = (total & ONES) << up
        limbs[at] = limbs[at] + (low & ONES)
        limbs[at + 1] = limbs[at + 1] + (low >> HALF_BITS) + ((total >> HALF_BITS) << up)
    for k in range(2):
        limbs[k + 1] = limbs[k + 1] + (limbs[k] >> HALF_BITS)
    return [limb & ONES for limb in limbs[:3]]


def _times(limbs: Sequence[torch.Tensor], factor: torch.Tensor) -> list[torch.Tensor]:
    """A word modulo 2**96 times a signed one of 64 bits, as three sums of numbers below 2**32."""
    parts = factor & ONES, (factor >> HALF_BITS) & ONES, (factor >> 63) & ONES
    sums = [torch.zeros_like(factor) for _ in range(3)]
    for i, limb in enumerate(limbs):
        for j, part in enumerate(parts[: 3 - i]):
            product = limb * part
            sums[i + j] = sums[i + j] + (product & ONES)
            if i + j < 2:
                sums[i + j + 1] = sums[i + j + 1] + logical_shift(product, HALF_BITS)
    return sums


_CORRECTED = Kernel("gated.corrected", _corrected_host, _corrected_tensors)
_VALUES = Kernel("gated.values", _values_host, _values_tensors, together=_TOGETHER)


@compiled()
def _deal_cpu(words, parts, planes, firsts, ups, share):  # type: ignore[no-untyped-def]
    terms = words.shape[1]
    borrow, limbs = np.empty(terms, np.int64), np.empty((2, terms), np.uint64)
    for i in range(words.shape[0]):
        for word in range(3):
            factor = np.uint64(parts[i, word])
            for k in range(terms):
                low, high = times(factor, np.uint64(0), words[i, k])
                up = np.uint64(ups[k])
                limbs[0, k] = low << up
                # In two steps, because nothing can be shifted by 64.
                limbs[1, k] = (high << up) | ((low >> np.uint64(1)) >> (np.uint64(63) - up))
                borrow[k] = 0
            for p in range(firsts[word], firsts[word + 1]):
                position, size, count, offset = planes[p]
                source, down = limbs[position // 8], np.uint64(8 * (position % 8))
                row = share[i, offset : offset + size * count]
                if size == 4:
                    fours = row.view(np.uint32)
                    for k in range(count):
                        left = np.int64((source[k] >> down) & np.uint64(ONES))
                        left -= np.int64(fours[k]) + borrow[k]
                        fours[k] = np.uint32(left & ONES)
                        borrow[k] = np.int64(left < 0)
                else:
                    for k in range(count):
                        left = np.int64((source[k] >> down) & np.uint64(255))
                        left -= np.int64(row[k]) + borrow[k]
                        row[k] = np.uint8(left & 255)
                        borrow[k] = np.int64(left < 0)


@compiled()
def _read_cpu(dealt, basis, base, wrap, planes, firsts, factor_bits, out):  # type: ignore[no-untyped-def]
    for i in range(dealt.shape[0]):
        low = high = np.uint64(0)
        for word in range(3):
            own_low = own_high = np.uint64(0)
            for p in range(firsts[word], firsts[word + 1]):
                position, size, count, offset = planes[p]
                row, total = dealt[i, offset : offset + size * count], np.int64(0)
                if size == 4:
                    fours = row.view(np.uint32)
                    for k in range(count):
                        total += basis[i, k] * np.int64(fours[k])
                else:
                    for k in range(count):
                        total += basis[i, k] * np.int64(row[k])
                up = np.uint64(8 * (position % 8))
                part = np.uint64(total) << up
                over = np.uint64((total >> 1) >> (np.int64(63) - np.int64(up)))
                if position >= 8:
                    own_high += part
                else:
                    own_low, own_high = plus(own_low, own_high, part, over)
            if word == 0:
                own_low, own_high = times(own_low, own_high, base[i])
            elif word == 1:
                own_low, own_high = times(own_low, own_high, np.int64(-1))
            elif wrap[i] == 0:
                own_low = own_high = np.uint64(0)
            else:
                up = np.uint64(factor_bits)
                own_high = (own_high << up) | (own_low >> (np.uint64(64) - up))
                own_low <<= up
            low, high = plus(low, high, own_low, own_high)
        out[i] += np.int64((low >> np.uint64(32)) | (high << np.uint64(32)))
