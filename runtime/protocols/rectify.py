"""max(x, 0), alone or times another secret."""

from __future__ import annotations

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, together
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.protocols.compare import DIGITS
from mergec.runtime.protocols.formula import Formula, negated, open_bits
from mergec.runtime.protocols.opening import Cut, open_masked, open_masked_cost
from mergec.runtime.protocols.selection import Line, Selection
from mergec.runtime.protocols.truncate import NARROW_OFFSET, truncate, truncate_cost

_POSITIVE = Selection(Formula(negated(DIGITS.less)), Line())


def rectify(ctx: Context, x: Cut, factor: Shared | None = None) -> Protocol:
    """Shares modulo 2**64 of max(x, 0), with the fractional bits of x, or of max(x, 0) * factor.

    In: an integer in [-2**30, 2**30), any shape. A factor adds the
    program's fractional bits. Rounds 2: first the window is opened, then the bits of [x < 0].
    [x >= 0] x is a public linear combination of dealt words, because x is the opened window minus
    its mask (`selection`). Online 10 bytes per element; with a factor, 16 more and those of its
    truncation. Each party sees the openings of a window, of bits and of the factor, each under a
    fresh, uniform mask.
    """
    shape, count = x.share.shape, x.share.numel()
    wide = x.mask(ctx)
    mask = x.narrow(wide)
    tables = ctx.deal_bits((count, DIGITS.table_bytes), lambda: DIGITS.tables(mask))
    first = [x.open(ctx, wide)]
    if factor is not None:
        first.append(truncate(ctx, factor.share.reshape(-1), factor.frac - ctx.fixed))
    opened, *truncated = yield from together(*first)
    bit_mask = ctx.mask_bits((count,))
    found = DIGITS.look_up(opened if opened.is_meta else opened.long(), tables)
    bits, *factors = yield from together(
        open_bits(ctx, found, bit_mask),
        *(open_masked(ctx, Shared(share, ctx.fixed)) for share in truncated),
    )

    up = factors[0] if factors else None
    words = _POSITIVE.deal(ctx, bit_mask, mask, up)
    if x.share.is_meta:
        return ghost(shape)
    total = torch.zeros(count, dtype=torch.int64, device=x.share.device)
    _POSITIVE.add(total, bits, words, opened + NARROW_OFFSET, up)
    return total.reshape(shape)


def rectify_cost(count: int, factor_shift: int | None = None) -> Cost:
    """Cost of `rectify` for `count` elements; factor_shift: bits that a factor is truncated by."""
    first = Cost(rounds=1, online=8 * count, offline=DIGITS.table_bytes * count)
    second = Cost(rounds=1, online=2 * count)
    words = _POSITIVE.words(0 if factor_shift is None else 1)
    if factor_shift is not None:
        first = first.beside(truncate_cost(count, factor_shift))
        second = second.beside(open_masked_cost(count))
    return first + second + Cost(offline=8 * words * count)
