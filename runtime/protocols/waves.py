"""Functions of a secret as sums of cosines, dealt to the server alone: one entry instead of many.

Activations are half their input plus an even function: silu(x) = x/2 + (x/2) tanh(x/2), and
gelu(x) = x/2 + (x/2) erf(x/sqrt 2). The even part is |x|/2 with a smooth bend. If the bend repeats
upside down half a period from zero, beyond a, the cosines of even multiples of the base frequency
drop out, and few others come close to it on [-a, a]. With z = x + r open, and k odd,

    a_k cos(w k x) = a_k cos(w k r) cos(w k z) + a_k sin(w k r) sin(w k z)

which is two dealt words times public numbers. They serve every x, whatever window it is in, so an
element takes a single entry (`pieces`). x/2 needs no dealt word: z and a party's own share of r
give its share of x.

How many cosines it takes follows from how far the function's poles are from the real line: SiLU
takes 40 words on 32 units of x for an error of 4e-6. Windows of two units, with a polynomial in
each, would take 128: of all but one of them a party's words go unused. A fit on [-a, a] alone, by
all multiples of a shorter period, would take 46. Source of such fits: Huybrechs, "On the Fourier
extension of nonperiodic functions" (SIAM J. Numer. Anal. 47, 2010); the bends are ours.

z is an integer modulo 2**32 of units of 2**-16. The period is 2**32 units divided by an integer, so
that nothing changes where z wraps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.spec import FRACTIONAL_BITS, RING_BITS, Cost
from mergec.runtime.kernels.transfers import to_device
from mergec.runtime.kernels.turns import FRAC, PHASE_BITS, TURNED
from mergec.runtime.protocols.opening import Cut
from mergec.runtime.protocols.pieces import Curve, Pieces
from mergec.runtime.protocols.truncate import NARROW_OFFSET, Truncation, truncation_words

_NODES = 1024


@dataclass(frozen=True)
class Waves(Curve):
    """x/2 + even(x) for |x| <= half, by cosines.

    even: an even function that takes and returns real numbers. cycles: periods in 2**16. sizes: for
    each cosine, of an odd multiple, the binary logarithm that its coefficient stays below; parties
    divide bits by these alone, as a fit may differ in its last bits between machines.
    """

    even: Callable[[np.ndarray], np.ndarray]
    half: int
    cycles: int
    sizes: tuple[int, ...]

    @property
    def terms(self) -> int:
        return 2 * len(self.sizes)

    def magnitudes(self, pieces: Pieces) -> np.ndarray:
        return np.repeat(self.sizes, 2)

    def span(self, pieces: Pieces) -> int:
        return 2 * self.half << FRACTIONAL_BITS

    def coefficients(self, pieces: Pieces, behind: torch.Tensor) -> torch.Tensor:
        bits = np.full(self.terms, FRAC)
        turned = TURNED(behind - pieces.start, self.cycles, bits)
        # torch multiplies integers by real numbers at half the speed of real ones.
        return turned.double().mul_(_amplitudes(self, behind.device))[:, None]

    def basis(self, pieces: Pieces, low: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = TURNED(low, self.cycles, pieces.basis_bits)
        return found

    def undealt(
        self, ctx: Context, pieces: Pieces, opened: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """The mean of the cosines; and x/2, where the upper bits of a word are the result's.

        Shares of x are modulo 2**32, so x/2 must be needed modulo 2**(31 - 16) at most.
        """
        own = ctx.public(opened.long()) - mask.long()
        mean = round(float(self.fitted[0]) * 2.0**pieces.out_frac)
        mine = ctx.public(torch.full_like(own, mean))
        up = pieces.out_frac - FRACTIONAL_BITS - 1
        return mine + (own << up) if up + PHASE_BITS >= RING_BITS else mine

    @property
    def fitted(self) -> np.ndarray:
        """The mean and the coefficient of each cosine, float64 [1 + cosines]."""
        return _fitted(self)


@dataclass(frozen=True)
class Bend:
    """An even function that is |x|/2 but for a bend at zero, as the sum of cosines that it takes.

    width: how far from zero it is another number. transform: the Fourier transform of its second
    derivative, or of one at least half as large, by the frequency. smallest: binary logarithm of
    what may be left off of a coefficient; that of the last cosine is not above it.
    """

    even: Callable[[np.ndarray], np.ndarray]
    width: int
    transform: Callable[[float], float]
    smallest: float

    def curve(self, half: int) -> Waves:
        """x/2 and the function, for |x| <= half."""
        cycles = round(2.0**FRACTIONAL_BITS / (2 * (half + self.width)))
        return Waves(self.even, half, cycles, tuple(map(math.ceil, self.log_sizes(cycles))))

    def log_sizes(self, cycles: int) -> list[float]:
        """Binary logarithms that the coefficients stay below, as far as they matter."""
        period = 2.0**FRACTIONAL_BITS / cycles
        found: list[float] = []
        while not found or found[-1] > self.smallest:
            w = 2 * math.pi * (2 * len(found) + 1) / period
            found.append(math.log2(4 / period * self.transform(w) / w**2) + 1)
        return found


def wave_table(curve: Waves, widths: tuple[int, ...], integer_bits: int) -> Pieces:
    """The table of a function; widths: bytes of a word, for each cosine."""
    words = tuple(width for width in widths for _ in range(2))
    return Pieces(curve, -curve.half << FRACTIONAL_BITS, 1, PHASE_BITS, words, integer_bits)


def evaluate_alone(ctx: Context, table: Pieces, x: Cut) -> Protocol:
    """Shares modulo 2**64 of f(x), with `table.out_frac` fractional bits, by one opening.

    In: x to 16 fractional bits, any shape, within the table: nothing tells x beyond it apart, and
    the result is f of another number then. Out: at most 48 fractional bits; x/2 follows from the
    opening, lifted to the ring of 64 bits (`truncate.Truncation`). Rounds 1, online 8 bytes per
    element, offline `table.dealt_bytes` and 16, to the server alone. Each party sees x + 2**30 + r
    under a mask r that is fresh and uniform modulo 2**32, and of the table what `Pieces.evaluate`
    says; the two words are shared as any dealt ones. Not for exact rounding, as the client sees
    which way x was rounded.
    """
    wide = x.mask(ctx)
    mask = x.narrow(wide)
    low, top = ctx.deal((2, *mask.shape), lambda: truncation_words(mask, 0))
    opened = yield from x.open(ctx, wide, NARROW_OFFSET)
    even = table.evaluate(ctx, opened - NARROW_OFFSET, mask)
    if opened.is_meta:
        return even.reshape(x.share.shape)
    lifted = Truncation(opened, 0)
    own = ctx.public(lifted.base) - low + lifted.wrap * top
    return (even + (own << (table.out_frac - FRACTIONAL_BITS - 1))).reshape(x.share.shape)


def evaluate_alone_cost(table: Pieces, count: int) -> Cost:
    """Cost of `evaluate_alone` for `count` elements."""
    return Cost(rounds=1, online=8 * count, offline=16 * count) + table.cost(count)


@cache
def _fitted(curve: Waves) -> np.ndarray:
    """Least squares at the Chebyshev nodes of [0, half], which keep the largest error small."""
    x = curve.half * np.cos(np.pi * (np.arange(_NODES) + 0.5) / (2 * _NODES))
    angles = 2 * np.pi * curve.cycles * 2.0**-FRACTIONAL_BITS * x
    multiples = [0, *range(1, 2 * len(curve.sizes), 2)]
    cosines = np.cos(np.outer(angles, multiples))
    return np.linalg.lstsq(cosines, curve.even(x), rcond=None)[0]


@cache
def _amplitudes(curve: Waves, device: torch.device) -> torch.Tensor:
    """What sines and cosines, as integers, are multiplied by: float64 [terms]."""
    values = np.repeat(_fitted(curve)[1:], 2) * 2.0**-FRAC
    return to_device(torch.from_numpy(values), device, "public")
