"""Exponentials of score rows, shifted by about the row's maximum: the first half of a softmax."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.spec import FRACTIONAL_BITS, RANGE_MARGIN_BITS, Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.protocols.broad import Broad, broad_exponentials, broad_exponentials_cost
from mergec.runtime.protocols.compare import take_window
from mergec.runtime.protocols.histogram import STEP, crest, crest_cost
from mergec.runtime.protocols.interval import fit_finely
from mergec.runtime.protocols.opening import Cut
from mergec.runtime.protocols.peak import entries_of, peak, peak_cost
from mergec.runtime.protocols.pieces import Exponential, Pieces
from mergec.runtime.protocols.power import Power
from mergec.runtime.protocols.probabilities import LONGEST, WAYS, ByLogarithm
from mergec.runtime.protocols.saturate import Function, Tail, apply, apply_cost, saturating
from mergec.runtime.protocols.slots import slot_bytes, top_slot, top_slot_cost

EXP_FRAC = 17
"""Fractional bits of an exponential. The largest one of a row is at least 1."""

MAX_ROW = 4096
"""Longest supported row of scores."""

MAX_SPREAD = 32_000.0
"""Largest difference between scores of a row; their absolute position does not matter."""

_START, _STEP_BITS, _END_BITS = -13.75, 14, 16

HIDDEN_GAP = 40.0
"""A score that only the client hides is at least this far below its row's maximum (`hiding`)."""

_EXP = saturating(np.exp, _START, 64, _STEP_BITS, 58, _END_BITS, left=Tail(0, 0.0), right=None)


def _further() -> Function:
    """The exponential up to 4, where a table of 58 bits would overflow.

    With three bits less, the rounding of coefficients would show but for `fit_finely`. Windows that
    no score reaches hold a constant.
    """
    start = round(_START * 2**FRACTIONAL_BITS)
    table = fit_finely(
        lambda x: np.exp(np.minimum(x, 4.5)), FRACTIONAL_BITS, start, 128, _STEP_BITS, 55
    )
    return Function(table, _END_BITS, Tail(0, 0.0), None)


def _from_server(top: int, top_bits: int) -> Function:
    """The exponential up to `top` of which the client is dealt nothing, on windows of 4.

    It reaches so far down that what the tail cuts to zero is less than 2**-4 units.
    """
    windows = 8
    start = (top - 4 * (windows - 1)) << FRACTIONAL_BITS
    table = Pieces(Exponential(), start, windows, FRACTIONAL_BITS + 2, (6,), top_bits + 2)
    return Function(table, FRACTIONAL_BITS + 3, Tail(0, 0.0), None)


@dataclass(frozen=True)
class Shift:
    """A way to find the number that a row is shifted by.

    find, cost: the protocol and its cost. reach: the shift is above the row's maximum less this.
    exp: the exponential from there on: of a function two rounds, of a `Broad` one. top_bits:
    exponentials are below 2**top_bits. many: the name of what a step of many rows takes instead,
    see `shift_of_many`. bits: those of `top_slot`, 0 for others. finer: the name of what rows take
    for which exponentials of this size are too large.
    """

    find: Callable[[Context, torch.Tensor, torch.Tensor], Protocol]
    cost: Callable[[torch.Tensor], Cost]
    reach: int
    exp: Function | Broad
    top_bits: int
    many: str
    bits: int = 0
    finer: str = ""

    @property
    def top(self) -> float:
        """The binary logarithm that exponentials stay below, of those of a `Broad` nearly e**reach:
        their errors are below 2**-17 and 2**-22 of them."""
        return self.reach / math.log(2) + 2.0**-16 if isinstance(self.exp, Broad) else self.top_bits

    @property
    def lowest(self) -> float:
        """Exponentials of entries that are further below the shift than this are zero."""
        table = self.exp if isinstance(self.exp, Broad) else self.exp.table
        return -table.start * 2.0**-FRACTIONAL_BITS

    def evaluate(self, ctx: Context, x: Cut) -> Protocol:
        """Shares of the exponentials of a window, with `EXP_FRAC` fractional bits."""
        if isinstance(self.exp, Broad):
            return broad_exponentials(ctx, x, self.exp)
        return apply(ctx, self.exp, x, EXP_FRAC)

    def evaluate_cost(self, count: int) -> Cost:
        """Cost of `evaluate` for that many elements."""
        if isinstance(self.exp, Broad):
            return broad_exponentials_cost(count, self.exp)
        return apply_cost(self.exp, count)


PAIRS, HISTOGRAM = "pairs", "histogram"
_TO_SERVER = {PAIRS: "pairs-to-server", HISTOGRAM: "histogram-to-server"}
SHIFTS = {
    PAIRS: Shift(peak, peak_cost, 2, _EXP, 3, PAIRS),
    HISTOGRAM: Shift(crest, crest_cost, STEP + 1, _further(), 6, PAIRS),
    _TO_SERVER[PAIRS]: Shift(peak, peak_cost, 2, _from_server(2, 3), 3, _TO_SERVER[PAIRS]),
    _TO_SERVER[HISTOGRAM]: Shift(
        crest, crest_cost, STEP + 1, _from_server(5, 6), 6, _TO_SERVER[PAIRS]
    ),
}
"""By their names in programs. `pairs` costs fewer dealt bytes, `histogram` fewer rounds for rows of
more than 16 entries. With `to-server` nothing is dealt to the client for exponentials."""


_REACHES = range(6, 10)

_LARGEST_TABLE = 256
"""Bytes of an entry's table of slots for which a step of many rows leaves pairs."""

COARSE_REACH = 8
"""A shift by coarse slots is above the row's maximum less this."""

_COARSE_PAYS = 1 << 13
"""Bytes of the tables of a row's coarse slots from which they are worth more octaves of its sum."""


def _slots(
    bits: int, exp: Function | Broad, digits: bool = False, keys: bool = False, coarse: bool = False
) -> Shift:
    find = partial(top_slot, bits=bits, digits=digits, keys=keys, coarse=coarse)
    cost = partial(top_slot_cost, bits=bits, digits=digits, keys=keys, coarse=coarse)
    return Shift(find, cost, STEP + 1, exp, 6, _TO_SERVER[PAIRS], bits)


def _coarse(bits: int, digits: bool, keys: bool, finer: str) -> Shift:
    """Slots of four integers: the shift may be 8 below the maximum, and exponentials up to e**8."""
    shift = _slots(bits, Broad(bits, COARSE_REACH, EXP_FRAC), digits, keys, coarse=True)
    return replace(shift, reach=COARSE_REACH, top_bits=12, finer=finer)


SLOTS = {f"slots-{bits}": _slots(bits, _from_server(5, 6)) for bits in _REACHES}
"""Further ones, for rows whose valid entries differ by at most 2**bits - 4: fewer rounds than a
histogram, and nothing is dealt to the client."""

_BY_DIGITS, _BY_KEYS, _COARSE = "-digits", "-keys", "-coarse"
_COUNTS = {"": (False, False), _BY_DIGITS: (True, False), _BY_KEYS: (True, True)}
BROAD = {
    f"broad-{bits}{way}": _slots(bits, Broad(bits, STEP + 1, EXP_FRAC), *chosen)
    for bits in _REACHES
    for way, chosen in _COUNTS.items()
} | {
    f"broad-{bits}{way}{_COARSE}": _coarse(bits, *chosen, f"broad-{bits}{way}")
    for bits in _REACHES
    for way, chosen in _COUNTS.items()
    if way
}
"""The same with exponentials that take one round instead of two, and fewer bytes. With `-digits`
counts are found to be zero digit by digit, in one round more and for far fewer dealt bytes. With
`-keys` the tables of slots are dealt as keys as well, to both parties. With `-coarse` there are
half as many slots, for rows that spread by 2**bits - 8 at most and are not too long: see
`coarse_rows`.

A row's entries x are in the range of such a table. Windows of them (`take_window`) differ by at
most 2**bits - d and a unit, 2**-16, with d = 4, or 8 for coarse slots. The shift c is in
(max - d, max]. So x - c is below d, and at least -(2**bits - d) less a unit: from one end of the
table to the other."""


_ALL = SHIFTS | SLOTS | BROAD

LOG = {name: f"broad-{way.bits}" for name, way in WAYS.items()}
"""Names of ways to weigh rows by the logarithm of their sum (`probabilities`), without a shift, and
the shifts of `BROAD` that other rows take: those of more than 4096 entries, that the client hides
keys of, or of which a step has many."""


def shift_called(name: str) -> Shift:
    """The shift of a name in `SHIFTS`, `SLOTS` or `BROAD`. Raises KeyError for any other."""
    return _ALL[name]


def logarithm_called(name: str, length: int, hides: bool) -> tuple[str, ByLogarithm | None]:
    """How rows of up to `length` entries are weighed: the name of a shift, or a way without one.

    hides: whether the client may hide some (`hiding`).
    """
    if name in LOG and (hides or length > LONGEST):
        name = LOG[name]
    return name, WAYS.get(name)


def coarse_rows(largest: float) -> int:
    """The binary logarithm of the longest row that coarse slots serve, from the largest value.

    A sum of values by 17-bit exponentials below 2**12 must stay below 2**62 with 33 fractional
    bits. 0 if that leaves no row.
    """
    if not 0 < largest < math.inf:
        return 0
    room = math.floor(17 - RANGE_MARGIN_BITS - math.log2(largest))
    return min(max(0, room), MAX_ROW.bit_length() - 1)


def shift_of_length(name: str, length: int, coarse: int) -> str:
    """A shift by the same slots, or by finer ones if rows are longer than coarse ones serve."""
    chosen = _ALL.get(name)
    if chosen is None or not chosen.finer or length <= 1 << coarse:
        return name
    return chosen.finer


def shift_of_many(name: str, length: int, coarse: int = 0) -> str:
    """What a step of many rows takes instead of a shift. length: entries of its longest row.

    coarse: the binary logarithm of how many there may be if slots are coarse. Short rows take finer
    ones, as a sum of up to e**8 each has more octaves, whose words count for each element of the
    result. By digits, where a table of slots has at most 256 bytes for an entry: that takes fewer
    rounds than pairs and, in prompts of 64 tokens and more, fewer bytes, or 5% more of the
    dealer's. Else by pairs.
    """
    chosen = shift_called(LOG.get(name, name))
    if not chosen.bits:
        return chosen.many
    fine, wide = (slot_bytes(chosen.bits, length, few) for few in (False, True))
    allowed = chosen.finer and length <= 1 << coarse and wide <= _LARGEST_TABLE
    if allowed and (fine > _LARGEST_TABLE or wide * length >= _COARSE_PAYS):
        return f"broad-{chosen.bits}{_BY_DIGITS}{_COARSE}"
    return f"broad-{chosen.bits}{_BY_DIGITS}" if fine <= _LARGEST_TABLE else chosen.many


def reach_of_rows(spread: float, hides: bool = False) -> int:
    """The fewest bits of `SLOTS` for rows that calibration saw spread that far; 0 if too far.

    hides: whether the client may hide scores besides (`hiding`).
    """
    needed = spread * 2.0**RANGE_MARGIN_BITS
    rooms = {bits: hiding(bits)[1] if hides else 2.0**bits - 4 for bits in _REACHES}
    return next((bits for bits, room in rooms.items() if needed <= room), 0)


def hiding(reach: int) -> tuple[float, float]:
    """What the client subtracts from a score to hide it, and how far a row may spread before that.

    reach: bits of the row's `SLOTS` or `BROAD`; 0 where the row may spread by `MAX_SPREAD`.

    With d for the first number, s for the second and w for how far `exponentials` lets valid scores
    be apart, d + s = w and d - s = `HIDDEN_GAP`. Where scores of a row are at most s apart before
    some of them are hidden, they are at most w apart afterwards. And let m be the largest score of
    those that are not hidden. A hidden one is at most m + s - d = m - 40. The shift c is above
    m - 4, so it is at most c - 36. There every table but those of `BROAD` returns zero (see
    `exponentials`). Those return one unit with a probability of at most e**-36 * 2**17, which is
    below 2**-34, and else zero. If all scores of a row are hidden, the softmax is as without.
    """
    within = 2.0**reach - 4 if reach else MAX_SPREAD
    return (within + HIDDEN_GAP) / 2, (within - HIDDEN_GAP) / 2


def shift_variants(reach: int = 0, coarse: bool = False) -> Iterator[dict[str, str]]:
    """For `Op.variants` of an op with an argument `shift`.

    reach: that of its rows. coarse: whether slots may be coarse.
    """
    names: Iterable[str] = _TO_SERVER
    if reach:
        names = (*names, *(f"broad-{reach}{way}" for way in _COUNTS))
    if reach and coarse:
        names = (*names, *(f"broad-{reach}{way}{_COARSE}" for way in _COUNTS if way))
    return ({"shift": name} for name in names)


def shift_supplies(shift: str) -> Iterator[dict[str, str]]:
    """For `Op.supplies` of an op with an argument `shift`."""
    return ({"shift": name} for pair in _TO_SERVER.items() if shift in pair for name in pair)


@cache
def inverse(length: int, shift: str) -> Power:
    """1 / (sum of a row's exponentials), where the sum is at least 1 and below 2**top each."""
    high = EXP_FRAC - 1 + math.ceil(math.log2(length) + shift_called(shift).top)
    return Power(-1.0, EXP_FRAC, EXP_FRAC - 1, high)


def exponentials(ctx: Context, scores: Shared, valid: torch.Tensor, shift: str) -> Protocol:
    """Shares of exp(x - c) with 17 fractional bits, c in (max - d, max] of the row's valid entries.

    In: Shared [R, L], L <= 4096, whose valid entries differ by at most 3.2e4 within a row; `valid`,
    public bool [R, L] with at least one True per row. Out: [R, L], zero where `valid` is False.
    Scores have at most 48 fractional bits. Error 4e-5 of the row's largest entry. An entry may be
    zero for x <= c - 12.75, and is zero for x <= c - 13.75 (`to-server`, slots: 15 and 26; broad:
    11.7, and at random further down, with the right expectation). shift: how c is found, one of
    `SHIFTS`, `SLOTS` or `BROAD`, of which the latter two need rows that spread less; d is 2 for
    pairs, 8 for coarse slots and 4 for others. Rounds 2 more than that, for `BROAD` 1. Scores are
    taken modulo 2**32 with 16 fractional bits (`take_window`), where differences below 2**15 fit.
    Each party sees what it sees in `peak`, `crest` or `top_slot`, and in `saturate.apply` or
    `broad_exponentials`. How c is rounded depends on the parties' own shares; a quotient of two
    exponentials depends on it only where one is cut to zero.
    With exact rounding that is at x <= c - 27 and beyond, and c is always found by pairs, as there
    is no finer table for a wider range.

    Raises KeyError for another `shift`.
    """
    chosen = shift_called(shift)
    if ctx.exact:
        chosen = SHIFTS[PAIRS]
    share, drop = scores.share, scores.frac - FRACTIONAL_BITS
    narrow = take_window(share, drop)
    top = yield from chosen.find(ctx, narrow, valid)
    entries = entries_of(valid)
    whole = ctx.exact and drop > 0
    if share.is_meta:
        dtype = torch.int64 if whole else torch.int32
        shifted = ghost((len(entries.places),), dtype=dtype)
    else:
        entries = entries.on(share.device)
        places, rows = entries.places, entries.rows
        if whole:
            shifted = share.reshape(-1)[places] - (top.long()[rows] << drop)
        else:
            shifted = narrow.reshape(-1)[places] - top[rows]
    window = Cut(shifted, drop, drop) if whole else Cut(shifted)
    powers = yield from chosen.evaluate(ctx, window)
    if share.is_meta:
        return ghost(scores.shape)
    result = torch.zeros(scores.shape, dtype=torch.int64, device=share.device)
    result.view(-1)[places] = powers
    return result


def exponentials_cost(valid: torch.Tensor, shift: str) -> Cost:
    """Cost of `exponentials` for rows with these valid entries."""
    chosen = shift_called(shift)
    return chosen.cost(valid) + chosen.evaluate_cost(int(valid.sum()))
