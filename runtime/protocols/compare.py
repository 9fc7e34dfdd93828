"""32-bit windows of shares, and the tables by which one is compared.

A window is 32 consecutive bits of a share, opened under a 32-bit mask r as z = x + r. Then [x < 0]
is the top bit of z - r. `digits` looks that bit up in dealt tables, and `formula` turns it into an
arithmetic share. Two rounds in all.
"""

from __future__ import annotations

import torch

from mergec.runtime.core.spec import RING_BITS
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.protocols.digits import Digits
from mergec.runtime.protocols.formula import Formula

WINDOW_BITS = 32

DIGITS = Digits(8, 8, 8, 8)
LESS_THAN = Formula(DIGITS.less)


def take_window(share: torch.Tensor, drop: int) -> torch.Tensor:
    """Shares modulo 2**32 of the bits [drop, drop + 32) of x, at most one unit too low.

    Local. The only error is the lost carry from the dropped low bits. Nothing is lost at the top:
    the shares determine x modulo 2**64. Raises ValueError if `drop` is not in 0 to 32: beyond that,
    less than 32 bits are left, and the window would be right modulo 2**(64 - drop) only.
    """
    check_drop(drop)
    if share.is_meta:
        return ghost(share.shape, dtype=torch.int32)
    # None of the sign bits that torch shifts in reaches the window.
    return (share >> drop).to(torch.int32)


def check_drop(drop: int) -> None:
    """Raise ValueError unless a share has a whole window above its lowest `drop` bits."""
    if not 0 <= drop <= RING_BITS - WINDOW_BITS:
        raise ValueError(f"a window of {WINDOW_BITS} bits cannot leave out the lowest {drop}")
