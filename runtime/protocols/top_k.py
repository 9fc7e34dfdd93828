"""Which entries of a row are its k largest, by comparing all pairs of the row at once.

The keys x_i of a row are opened under masks, z_i = x_i + r_i modulo 2**32, and for each pair i, j
[x_i < x_j] follows from z_i - z_j by dealt tables. The number of comparisons that an entry loses is
its rank (`ranks`). Ranks are opened under masks rho modulo 256, t = rank + rho, and looked up in
dealt rows that hold [t - rho < k] for each t. So an entry's share of "one of the k largest" is one
dealt word, and neither party learns which entries these are.

Source: as `argmax`, the digit-wise comparison of Garay, Schoenmakers and Villegas (PKC 2007) with
the one-time truth tables of Ishai et al. (TCC 2013).
"""

from __future__ import annotations

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.spec import Cost
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.protocols.opening import Cut
from mergec.runtime.protocols.ranks import Pairs, pairs_within, ranked, ranked_cost

LONGEST = 256
"""Most entries of a row: a rank is opened in one byte."""


def top_k(ctx: Context, keys: Cut, k: int, frac: int) -> Protocol:
    """Shares modulo 2**64 of 2**frac for the k largest keys of each row, and of 0 for the others.

    In: keys [R, n] in (-2**30, 2**30), with n from 2 to 256. Of equal keys the first ones are
    larger. Out: [R, n]. Rounds 3, with exact rounding 4. With P = n (n - 1) / 2 and E the power of
    two from n on, for each row online 10 n + 2 P bytes, and offline 290 P + 8 E n. Each party sees
    keys, bits of comparisons and ranks, each under fresh masks that are uniform on all of their
    ring, so the view is the same whatever the keys are; with exact rounding, the client sees of the
    keys what `open_high` says.
    """
    count, size = keys.share.shape
    pairs = pairs_within(count, size)
    mask = keys.mask(ctx)
    rank_mask = ctx.mask((count * size,), torch.int8)
    rows = ctx.deal((count * size, pairs.entries), lambda: _rows(pairs, rank_mask, k) << frac)
    opening = keys.open(ctx, mask)
    _, rank = yield from ranked(ctx, pairs, [opening], lambda: keys.narrow(mask), rank_mask)
    if rank.is_meta:
        return ghost((count, size))
    place = rank.long()[:, None] & (pairs.entries - 1)
    return rows.gather(1, place).reshape(count, size)


def top_k_cost(count: int, size: int) -> Cost:
    """Cost of `top_k` for `count` rows of `size` entries."""
    pairs, members = count * size * (size - 1) // 2, count * size
    entries = 1 << (size - 1).bit_length()
    opened = Cost(rounds=1, online=8 * members, offline=8 * entries * members)
    return opened + ranked_cost(pairs, members)


def _rows(pairs: Pairs, mask: torch.Tensor, k: int) -> torch.Tensor:
    """For each rank mask [n] and each opened rank whether the rank is below k: int64 [n, entries].

    Called by the dealer.
    """
    opened = torch.arange(pairs.entries, device=mask.device)
    return ((opened - mask.long()[:, None]) & (pairs.entries - 1) < k).long()
