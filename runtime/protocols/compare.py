"""Comparison with public thresholds on an opened 32-bit window, and maxima of rows.

A window is 32 consecutive bits of a share. It is opened once under a 32-bit mask r, as z = x + r,
and then serves any number of thresholds: [x < t] is the top bit of (z - t) - r. `digits` looks that
bit up in dealt tables, and `formula` turns it into an arithmetic share. Two rounds in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.spec import RING_BITS, Cost
from mergec.runtime.kernels.transfers import integers, to_device
from mergec.runtime.protocols.digits import Digits
from mergec.runtime.protocols.formula import Formula, open_bits
from mergec.runtime.protocols.opening import open_under

WINDOW_BITS = 32

DIGITS = Digits(8, 8, 8, 8)
LESS_THAN = Formula(DIGITS.less)
WORDS = LESS_THAN.words
"""Words dealt per comparison."""


@dataclass
class Window:
    """A 32-bit window of a share, opened once as z = x + r mod 2**32, with tables for r's bytes.

    opened: int32 [n]. mask: int32 [n], this party's share of r; the dealer has r itself.
    tables: uint8 [n, bytes], XOR shares of the packed digit tables.
    """

    opened: torch.Tensor
    mask: torch.Tensor
    tables: torch.Tensor


def take_window(share: torch.Tensor, drop: int) -> torch.Tensor:
    """Shares modulo 2**32 of the bits [drop, drop + 32) of x, at most one unit too low.

    Local. The only error is the lost carry from the dropped low bits. Nothing is lost at the top:
    the shares determine x modulo 2**64. Raises ValueError if `drop` is not in 0 to 32: beyond that,
    less than 32 bits are left, and the window would be right modulo 2**(64 - drop) only.
    """
    check_drop(drop)
    # None of the sign bits that torch shifts in reaches the window.
    return (share >> drop).to(torch.int32)


def check_drop(drop: int) -> None:
    """Raise ValueError unless a share has a whole window above its lowest `drop` bits."""
    if not 0 <= drop <= RING_BITS - WINDOW_BITS:
        raise ValueError(f"a window of {WINDOW_BITS} bits cannot leave out the lowest {drop}")


def open_window(ctx: Context, share: torch.Tensor) -> Protocol:
    """Open a 32-bit window, flattened to [n], for comparisons.

    In: int32 share. Rounds 1, online 8 bytes, offline 256 bytes per element.
    Each party sees z = x + r, where r is fresh and uniform modulo 2**32, and XOR shares of the
    tables, which are uniform on their own.
    """
    flat = share.reshape(-1)
    mask = ctx.mask(flat.shape, torch.int32)
    tables = ctx.deal_bits((len(flat), DIGITS.table_bytes), lambda: DIGITS.tables(mask))
    opened = yield from open_under(ctx, flat, mask)
    return Window(opened, mask, tables)


def open_window_cost(count: int) -> Cost:
    """Cost of `open_window` for `count` elements."""
    return Cost(rounds=1, online=8 * count, offline=DIGITS.table_bytes * count)


def less_than(
    ctx: Context, window: Window, thresholds: list[int], dtype: torch.dtype = torch.int64
) -> Protocol:
    """Shares of [x < t] for T public thresholds t, modulo 2**64 or 2**32: [T, n].

    Valid where x - t, as an integer, is in [-2**31, 2**31). Rounds 1, online 2 bytes, offline
    34 words per element and threshold. Each party sees the looked-up bits under fresh, uniform mask
    bits.
    """
    mask = ctx.mask_bits((len(thresholds), *window.opened.shape))
    words = LESS_THAN.deal(ctx, mask, dtype=dtype)
    bits = yield from _open_relations(ctx, window, thresholds, mask)
    return LESS_THAN.evaluate(bits, words)[..., 0]


def less_than_cost(count: int, thresholds: int, word_bytes: int = 8) -> Cost:
    """Cost of `less_than` for `count` elements and `thresholds` thresholds each."""
    pairs = count * thresholds
    return Cost(rounds=1, online=2 * pairs, offline=WORDS * word_bytes * pairs)


def relu_below(ctx: Context, window: Window) -> Protocol:
    """Shares modulo 2**32 of min(x, 0), flattened to [n], for x in [-2**31, 2**31).

    With b = [x < 0] and x = z - r, b x = z b - b r. The dealer shares the words that combine to b,
    and the same words times r, which combine to b r in the same way. Rounds 1, online 2 bytes,
    offline 2 * 34 * 4 bytes per element. Each party sees what it sees in `less_than`.
    """
    mask = ctx.mask_bits(window.opened.shape)
    words = LESS_THAN.deal(
        ctx,
        mask,
        lambda: torch.stack([torch.ones_like(window.mask), window.mask], -1),
        payloads=2,
        dtype=torch.int32,
    )
    bits = yield from _open_relations(ctx, window, [0], mask[None])
    flag, masked = LESS_THAN.evaluate(bits[0], words).unbind(-1)
    return flag if bits.is_meta else window.opened * flag - masked


def relu_below_cost(count: int) -> Cost:
    """Cost of `relu_below` for `count` elements."""
    return Cost(rounds=1, online=2 * count, offline=2 * WORDS * 4 * count)


def _open_relations(
    ctx: Context, window: Window, thresholds: list[int], mask: torch.Tensor
) -> Protocol:
    """Look up the digits of z - t in the shared tables; open the resulting bits under `mask`."""
    if window.opened.is_meta:
        points = torch.empty(mask.shape, dtype=torch.int64, device="meta")
    else:
        shifts = integers(tuple(thresholds), window.opened.device)
        points = window.opened.long()[None, :] - shifts[:, None]
    bits = yield from open_bits(ctx, DIGITS.look_up(points, window.tables), mask)
    return bits


def maximum(ctx: Context, share: torch.Tensor, valid: torch.Tensor) -> Protocol:
    """Shares modulo 2**32 of the maximum of each row of x [R, L], by a tournament: [R].

    In: int32 share whose differences are in [-2**31, 2**31); `valid`, public bool [R, L] with at
    least one True per row. Other entries are ignored. Rounds 2 ceil(log2 L); per comparison, online
    10 bytes and offline 528 bytes. Each party sees what it sees in `open_window` and `relu_below`.
    """
    for left, right, contested in _tournament(valid):
        count = int(contested.sum())
        width = left.shape[1]
        if share.is_meta:
            difference = torch.empty(count, dtype=torch.int32, device="meta")
        else:
            a, b = share[:, : 2 * width : 2], share[:, 1 : 2 * width : 2]
            rows, columns = (
                to_device(each, share.device, "public") for each in contested.nonzero(as_tuple=True)
            )
            difference = (a - b)[rows, columns]
        if count:
            window = yield from open_window(ctx, difference)
            lower = yield from relu_below(ctx, window)
        if share.is_meta:
            continue
        only = to_device(right & ~left, share.device, "public")
        winner = torch.where(only, b, a)
        if count:
            # max(a, b) = a - min(a - b, 0).
            winner[rows, columns] -= lower
        share = torch.cat([winner, share[:, 2 * width :]], 1)
    return share[:, 0]


def maximum_cost(valid: torch.Tensor) -> Cost:
    """Cost of `maximum` for rows with these valid entries."""
    total = Cost()
    for _, _, contested in _tournament(valid):
        count = int(contested.sum())
        if count:
            total += open_window_cost(count) + relu_below_cost(count)
    return total


def _tournament(valid: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each level, masks of the left and right neighbours that are valid, and of valid pairs."""
    while valid.shape[1] > 1:
        width = valid.shape[1] // 2
        left, right = valid[:, : 2 * width : 2], valid[:, 1 : 2 * width : 2]
        yield left, right, left & right
        valid = torch.cat([left | right, valid[:, 2 * width :]], 1)
