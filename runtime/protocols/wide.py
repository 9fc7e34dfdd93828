"""Scaled rows in a ring of 128 bits, where dropping bits is free.

A scaled row has twice the fractional bits that it is needed with, or more: those of the row and of
its factor (`normalize.scale_rows`). In a ring of 64 bits dropping them takes an opening, as shares
without their low bits are shares in a smaller ring. Here the dealt words are shares modulo 2**128.
The value is the same combination of them, with the same public numbers: all the formulas of
`truncate` hold as integers. So a party drops bits of its own share and keeps 64 of the others, and
what is left are shares modulo 2**64: no message.

Rows and factors are opened as in `normalize`. What is different is what is dealt. Source: see
`normalize`; the larger ring is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.spec import CLIENT, HEADROOM_BITS, RING_BITS, Cost
from mergec.runtime.core.values import Held, Shared, Wide, encode, logical_shift, scale_rows
from mergec.runtime.kernels import doubles
from mergec.runtime.kernels.backends import Kernel
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.kernels.transfers import integers, to_device
from mergec.runtime.kernels.wide import plus, times, upper_product
from mergec.runtime.protocols.truncate import top_bit

WIDE_BITS = 2 * RING_BITS

_WORD_BYTES = WIDE_BITS // 8


@dataclass(frozen=True)
class Factors:
    """Factors of rows [R, C], as they were opened: base - low + wrap * top, exact as integers.

    base, wrap: public. words: called by the dealer, returns low, which is not negative, and top,
    which is 0 or 1.
    """

    base: torch.Tensor
    wrap: torch.Tensor
    words: Callable[[], tuple[torch.Tensor, torch.Tensor]]


def scaled_wide(
    ctx: Context, opened: torch.Tensor, mask: torch.Tensor, factors: Factors, shifts: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares modulo 2**128 of the sum over c of (x >> s_c) times factor c: lower and upper halves.

    In: rows [R, d] opened as z = x + 2**62 + r under a mask that is uniform on the ring, |x| <
    2**62; mask: r at the dealer; shifts: s_c for each of C columns, from 1 to 62. Each x >> s_c is
    rounded as in `truncate`. Out: [R, d] each. Rounds 0, online 0 bytes. Offline, to the server
    alone, 16 bytes per word: 2 C words per row, and per element 3, one for each different shift
    among neighbours, and 2 C.

    Nothing is opened. The server is sent words minus words of the client's stream, modulo 2**128:
    these are fresh, uniform and unknown to it, so what it sees is uniform, whatever the masks are.
    The client sees nothing new. Raises ValueError for other shifts.
    """
    if not fits_wide(shifts):
        raise ValueError(f"no rows are shifted down by {list(shifts)} in a ring of 128 bits")
    places = np.array(shifts)
    rows, size = opened.shape
    columns, words = len(places), _words_of(places)

    def of_rows() -> torch.Tensor:
        found = torch.stack(factors.words(), 1)
        return torch.stack([found, torch.zeros_like(found)], -1)

    def of_elements() -> torch.Tensor:
        found: torch.Tensor = _WORDS(mask.contiguous(), *factors.words(), places)
        return found

    own = _deal(ctx, (rows, 2, columns), of_rows)
    dealt = _deal(ctx, (rows, size, words), of_elements)
    if own is None or dealt is None or opened.is_meta:
        return ghost((rows, size)), ghost((rows, size))
    found = _SCALED(opened, factors.base, factors.wrap, own, dealt, places, ctx.party == CLIENT)
    return found[..., 0], found[..., 1]


def scaled_wide_cost(shifts: Sequence[int], rows: int, size: int) -> Cost:
    """Cost of `scaled_wide` for `rows` rows of `size` elements."""
    places = np.array(shifts)
    return Cost(offline=_WORD_BYTES * rows * (2 * len(places) + size * _words_of(places)))


def fits_wide(shifts: Sequence[int]) -> bool:
    """Whether `scaled_wide` takes these shifts."""
    return all(1 <= shift <= HEADROOM_BITS for shift in shifts)


def narrow(ctx: Context, x: Wide, drop: int) -> torch.Tensor:
    """Shares modulo 2**64 of x >> drop, with 0 < drop <= 64, or of one more, at random.

    No message. Each party rounds its own share down. Their sum is x rounded down or one less, by
    the carry out of the bits that both dropped. So one unit is added, and the expectation is right
    but for 2**-drop of a unit. The roundings are fixed by bits of which each party knows its own.
    Raises ValueError for any other drop.
    """
    if not 0 < drop <= RING_BITS:
        raise ValueError(f"no {drop} bits are dropped at once")
    if x.low.is_meta:
        return x.low
    share = x.high if drop == RING_BITS else _shift_down(x.low, x.high, drop)
    return share + ctx.public(torch.ones_like(share))


def narrow_of_zeros(ctx: Context, x: Wide, drop: int) -> torch.Tensor:
    """`narrow` to less than one unit off, and exactly 0 where x is 0; for 0 < drop < 64.

    No message: the client rounds its share down, the server up. The shares of zero are opposite,
    and so is what is left of them. The rest is right on average.
    """
    if x.low.is_meta:
        return x.low
    if ctx.party == CLIENT:
        return _shift_down(x.low, x.high, drop)
    nothing = torch.zeros_like(x.low)
    return -_shift_down(*doubles.minus((nothing, nothing), (x.low, x.high)), drop)


def shifted_wide(x: Wide, bits: torch.Tensor) -> Wide:
    """Words shifted up by public numbers of bits from 0 to 63, which broadcast to them."""
    if x.low.is_meta:
        return x
    return Wide(*_shift_up(x.low, x.high, to_device(bits, x.low.device, "public")), x.frac)


def each_half(x: Wide, move: Callable[[torch.Tensor], torch.Tensor]) -> Wide:
    """x with its words moved to other places."""
    return Wide(move(x.low), move(x.high), x.frac)


def added_wide(x: Wide, held: Held | Shared, parts: Sequence[int] = ()) -> Wide:
    """x plus a constant that a party holds, which adds it; see `weights.add_held`.

    Raises TypeError for one that is shared, as its shares are none modulo 2**128, and ValueError
    for one that 64 bits do not hold: its upper half is taken from its sign.
    """
    if isinstance(held, Shared):
        raise TypeError("a constant that is shared modulo 2**64 is added to a wide share")
    if x.low.is_meta or held.value.is_meta:
        return x
    added = scale_rows(held.value, parts)
    room = RING_BITS - 1 - x.frac
    # Legalization leaves that room: it gives such a product its bits by the size of its values.
    if added.numel() and not float(added.abs().max()) < 2.0**room:
        raise ValueError(
            f"a constant of 2**{room} or more has no room in 64 bits at {x.frac} fractional ones; "
            "compile the model again"
        )
    words = to_device(encode(added, x.frac), x.low.device, "input")
    return Wide(
        *doubles.plus((x.low, x.high), (words.expand(x.shape), (words >> 63).expand(x.shape))),
        x.frac,
    )


def times_public(x: Wide, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both halves of x times public int64 numbers, which broadcast to x."""
    return doubles.times((x.low, x.high), factor.expand(x.shape))


def sum_wide(
    one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor], frac: int
) -> Wide:
    """The sum of two shares modulo 2**128."""
    return Wide(*doubles.plus(one, other), frac)


def _deal(
    ctx: Context, shape: Sequence[int], secret: Callable[[], torch.Tensor]
) -> torch.Tensor | None:
    """Shares modulo 2**128 of what `secret` returns, int64 [*shape, 2]; None at the dealer."""
    count = int(np.prod(shape))

    def correct(share: torch.Tensor) -> torch.Tensor:
        words, values = share.view(torch.int64).view(-1, 2), secret().view(-1, 2)
        halves = doubles.minus((values[:, 0], values[:, 1]), (words[:, 0], words[:, 1]))
        return torch.stack(halves, -1).view(torch.uint8).view(share.shape)

    table = ctx.deal_corrected((count, _WORD_BYTES), correct)
    return None if table is None else table.view(torch.int64).view(*shape, 2)


def _groups(shifts: np.ndarray) -> np.ndarray:
    """For each column the number of its shift among different neighbours."""
    return np.concatenate([[0], np.cumsum(np.diff(shifts) != 0)]).astype(np.int64)


def _words_of(shifts: np.ndarray) -> int:
    """Words of an element.

    With r its mask, l and t the words of the factors, and p_c = r >> s_c: msb(r); each different
    p; each p_c t_c; the sum of p_c l_c; msb(r) times the sum of 2**(64 - s_c) l_c; each msb(r) t_c.
    """
    return 3 + int(_groups(shifts)[-1]) + 1 + 2 * len(shifts)


def _words_host(
    mask: torch.Tensor, low: torch.Tensor, top: torch.Tensor, shifts: np.ndarray
) -> torch.Tensor:
    out = np.empty((*mask.shape, _words_of(shifts), 2), np.int64)
    given = (each.numpy() for each in (mask, low, top))
    _deal_cpu(*given, shifts, _groups(shifts), out)
    return torch.from_numpy(out)


def _words_tensors(
    mask: torch.Tensor, low: torch.Tensor, top: torch.Tensor, shifts: np.ndarray
) -> torch.Tensor:
    tops, nothing = top_bit(mask), torch.zeros_like(mask)
    down: list[tuple[torch.Tensor, torch.Tensor]] = []
    topped, both = [], []
    total = wrapped = (nothing, nothing)
    for k, (s, group) in enumerate(zip(shifts.tolist(), _groups(shifts).tolist(), strict=True)):
        part = logical_shift(mask, s)
        if group == len(down):
            down.append((part, nothing))
        factor, bit = low[:, k, None].expand_as(mask), top[:, k, None]
        topped.append((part * bit, nothing))
        both.append((tops * bit, nothing))
        total = doubles.plus(total, doubles.times((part, nothing), factor))
        up = _shift_up(factor, nothing, integers((RING_BITS - s,), mask.device))
        wrapped = doubles.plus(wrapped, (up[0] * tops, up[1] * tops))
    found = [(tops, nothing), *down, *topped, total, wrapped, *both]
    return torch.stack([torch.stack(halves, -1) for halves in found], -2)


def _scaled_host(
    opened: torch.Tensor,
    base: torch.Tensor,
    wrap: torch.Tensor,
    own: torch.Tensor,
    dealt: torch.Tensor,
    shifts: np.ndarray,
    at_client: bool,
) -> torch.Tensor:
    out = torch.empty((*opened.shape, 2), dtype=torch.int64)
    given = (each.contiguous().numpy() for each in (opened, base, wrap, own, dealt))
    _scale_cpu(*given, shifts, _groups(shifts), at_client, out.numpy())
    return out


def _scaled_tensors(
    opened: torch.Tensor,
    base: torch.Tensor,
    wrap: torch.Tensor,
    own: torch.Tensor,
    dealt: torch.Tensor,
    shifts: np.ndarray,
    at_client: bool,
) -> torch.Tensor:
    columns, groups = len(shifts), _groups(shifts).tolist()
    words = [(word[..., 0], word[..., 1]) for word in dealt.unbind(2)]
    tops, down, rest = words[0], words[1 : groups[-1] + 2], words[groups[-1] + 2 :]
    topped, total, wrapped, both = rest[:columns], rest[columns], rest[columns + 1], rest[-columns:]
    zero = torch.zeros_like(opened)
    wraps = (zero, zero)
    for k, s in enumerate(shifts.tolist()):
        public, turn = (each[:, k, None].expand_as(opened) for each in (base, wrap))
        low, top = (
            (each[..., 0].expand_as(opened), each[..., 1].expand_as(opened))
            for each in own[:, :, k, None].unbind(1)
        )
        share = doubles.minus(doubles.times(top, turn), low)
        if at_client:
            share = doubles.plus(share, (public, public >> 63))
        x = logical_shift(opened, s) - (1 << (HEADROOM_BITS - s))
        total = doubles.plus(total, doubles.times(share, x))
        total = doubles.minus(total, doubles.times(down[groups[k]], public))
        total = doubles.minus(total, doubles.times(topped[k], turn))
        crossed = doubles.plus(doubles.times(tops, public), doubles.times(both[k], turn))
        wraps = doubles.plus(wraps, _shift_up(*crossed, integers((RING_BITS - s,), opened.device)))
    wraps = doubles.minus(wraps, wrapped)
    positive = (opened >= 0).long()
    total = doubles.plus(total, (wraps[0] * positive, wraps[1] * positive))
    return torch.stack(total, -1)


_WORDS = Kernel("wide.words", _words_host, _words_tensors)
_SCALED = Kernel("wide.scaled", _scaled_host, _scaled_tensors)


def _shift_up(
    low: torch.Tensor, high: torch.Tensor, bits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """By 0 to 63 bits."""
    carried = logical_shift(low, 1) >> (63 - bits)
    return low << bits, (high << bits) | carried


def _shift_down(low: torch.Tensor, high: torch.Tensor, bits: int) -> torch.Tensor:
    """By 1 to 63 bits: the lower half of what is left."""
    return logical_shift(low, bits) | (high << (RING_BITS - bits))


@compiled()
def _deal_cpu(mask, factor_low, factor_top, shifts, groups, out):  # type: ignore[no-untyped-def]
    columns = shifts.shape[0]
    first = groups[columns - 1] + 2
    for i in range(mask.shape[0]):
        for e in range(mask.shape[1]):
            r, word = np.uint64(mask[i, e]), out[i, e]
            top = np.int64(r >> np.uint64(63))
            word[:, 1] = 0
            word[0, 0] = top
            total_low = total_high = wrapped_low = wrapped_high = np.uint64(0)
            for k in range(columns):
                s, factor = np.uint64(shifts[k]), np.uint64(factor_low[i, k])
                part = r >> s
                word[1 + groups[k], 0] = np.int64(part)
                word[first + k, 0] = np.int64(part) * factor_top[i, k]
                total_low, total_high = plus(
                    total_low, total_high, part * factor, upper_product(part, factor)
                )
                wrapped_low, wrapped_high = plus(
                    wrapped_low, wrapped_high, factor << (np.uint64(64) - s), factor >> s
                )
                word[first + columns + 2 + k, 0] = top * factor_top[i, k]
            word[first + columns, 0] = np.int64(total_low)
            word[first + columns, 1] = np.int64(total_high)
            word[first + columns + 1, 0] = np.int64(wrapped_low) * top
            word[first + columns + 1, 1] = np.int64(wrapped_high) * top


@compiled()
def _scale_cpu(opened, base, wrap, own, dealt, shifts, groups, at_client, out):  # type: ignore[no-untyped-def]
    columns = shifts.shape[0]
    first = groups[columns - 1] + 2
    share = np.empty((columns, 2), np.uint64)
    for i in range(opened.shape[0]):
        for k in range(columns):
            low, high = times(np.uint64(own[i, 1, k, 0]), np.uint64(own[i, 1, k, 1]), wrap[i, k])
            minus_low, minus_high = times(
                np.uint64(own[i, 0, k, 0]), np.uint64(own[i, 0, k, 1]), np.int64(-1)
            )
            low, high = plus(low, high, minus_low, minus_high)
            if at_client:
                low, high = plus(
                    low, high, np.uint64(base[i, k]), np.uint64(base[i, k] >> np.int64(63))
                )
            share[k, 0], share[k, 1] = low, high
        for e in range(opened.shape[1]):
            z, words = opened[i, e], dealt[i, e]
            low = np.uint64(words[first + columns, 0])
            high = np.uint64(words[first + columns, 1])
            wraps_low, wraps_high = times(
                np.uint64(words[first + columns + 1, 0]),
                np.uint64(words[first + columns + 1, 1]),
                np.int64(-1),
            )
            for k in range(columns):
                s = np.uint64(shifts[k])
                x = np.int64(np.uint64(z) >> s) - np.int64(np.uint64(1) << (np.uint64(62) - s))
                more_low, more_high = times(share[k, 0], share[k, 1], x)
                low, high = plus(low, high, more_low, more_high)
                place = 1 + groups[k]
                more_low, more_high = times(
                    np.uint64(words[place, 0]), np.uint64(words[place, 1]), -base[i, k]
                )
                low, high = plus(low, high, more_low, more_high)
                place = first + k
                more_low, more_high = times(
                    np.uint64(words[place, 0]), np.uint64(words[place, 1]), -wrap[i, k]
                )
                low, high = plus(low, high, more_low, more_high)
                if z >= 0:
                    more_low, more_high = times(
                        np.uint64(words[0, 0]), np.uint64(words[0, 1]), base[i, k]
                    )
                    place = first + columns + 2 + k
                    both_low, both_high = times(
                        np.uint64(words[place, 0]), np.uint64(words[place, 1]), wrap[i, k]
                    )
                    more_low, more_high = plus(more_low, more_high, both_low, both_high)
                    up = np.uint64(64) - s
                    more_high = (more_high << up) | (more_low >> s)
                    wraps_low, wraps_high = plus(wraps_low, wraps_high, more_low << up, more_high)
            if z >= 0:
                low, high = plus(low, high, wraps_low, wraps_high)
            out[i, e, 0], out[i, e, 1] = np.int64(low), np.int64(high)
