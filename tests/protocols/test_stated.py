"""Rounds, bytes and limits that docs/protocols.md states in numbers are those of the protocols.

Elsewhere a run is compared with the cost function beside its protocol. If both change together,
only a number that was written down by hand shows it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mergec.runtime.core.context import ShapeContext
from mergec.runtime.core.spec import RANGE_MARGIN_BITS, Cost
from mergec.runtime.core.values import Masked, Shared
from mergec.runtime.correlations.counters import Counters
from mergec.runtime.engine.rehearsal import drive
from mergec.runtime.ops.gelu import GELU, alone_table
from mergec.runtime.ops.silu import SILU
from mergec.runtime.protocols import broad, finer, histogram, logarithm, octave, rows
from mergec.runtime.protocols.argmax import again_cost, best_cost
from mergec.runtime.protocols.broad import Broad, broad_exponentials_cost
from mergec.runtime.protocols.finer import finer_products_cost
from mergec.runtime.protocols.histogram import crest_cost
from mergec.runtime.protocols.interval import evaluate_cost, fit
from mergec.runtime.protocols.logarithm import long_log_cost
from mergec.runtime.protocols.multiply import multiply_cost
from mergec.runtime.protocols.normalize import (
    open_factor_cost,
    open_row_cost,
    row_factor_cost,
    row_factor_wide_cost,
    scale_rows_cost,
    scale_rows_wide_cost,
)
from mergec.runtime.protocols.octave import Octaves, columns_cost
from mergec.runtime.protocols.opening import Cut, open_masked_cost
from mergec.runtime.protocols.peak import peak_cost
from mergec.runtime.protocols.power import COLUMN_BITS, TABLE_FRAC, Power, octaves_cost
from mergec.runtime.protocols.probabilities import LONGEST, WAYS
from mergec.runtime.protocols.rectify import rectify_cost
from mergec.runtime.protocols.rows import (
    BROAD,
    SHIFTS,
    exponentials_cost,
    inverse,
    shift_called,
)
from mergec.runtime.protocols.saturate import REACHES, Function, apply, apply_cost
from mergec.runtime.protocols.slots import LONGEST as LONGEST_BYTES
from mergec.runtime.protocols.slots import top_slot_cost
from mergec.runtime.protocols.squares import truncated_square_cost
from mergec.runtime.protocols.top_k import LONGEST as MOST_EXPERTS
from mergec.runtime.protocols.top_k import top_k_cost
from mergec.runtime.protocols.truncate import truncate_cost
from mergec.runtime.protocols.waves import evaluate_alone_cost
from mergec.runtime.protocols.weights import send_cost, table_rows_cost
from mergec.runtime.protocols.wide import scaled_wide_cost
from tests.roles import ROOT

PAGE = " ".join((ROOT / "docs" / "protocols.md").read_text(encoding="utf-8").split())


def every(rows_: int, length: int) -> torch.Tensor:
    return torch.ones(rows_, length, dtype=torch.bool)


def ghost(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


OPENED = Masked(ghost(3, 5), ghost(3, 5), 16)
TABLE = Masked(ghost(100, 3), ghost(100, 3), 16)
# Twelve columns, all of which shift rows down.
ROOT_OF_ROWS = Power(-0.5, 40.0, 6, 53)
CAUSAL = every(64, 64).tril()

COSTS: dict[str, tuple[Callable[[], Cost], Cost]] = {
    "opening": (lambda: open_masked_cost(10), Cost(1, 160)),
    "opening to the server": (lambda: send_cost(10), Cost(1, 80)),
    "product": (lambda: multiply_cost((3, 5, 15), (2, 2, 2)), Cost(1, 16 * 12, 8 * 17)),
    "embedding": (lambda: table_rows_cost(7, TABLE), Cost(1, 8 * 100 * 7, 8 * 3 * 7)),
    "no truncation": (lambda: truncate_cost(10, 0), Cost()),
    "truncation by 1": (lambda: truncate_cost(10, 1), Cost(1, 160, 160)),
    "truncation by 31": (lambda: truncate_cost(10, 31), Cost(1, 160, 160)),
    "truncation by 32": (lambda: truncate_cost(10, 32), Cost(1, 80, 160)),
    "square": (lambda: truncated_square_cost(10), Cost(1, 160, 320)),
    # 256 bytes of tables. 34 products of mask bits times 1, the mask, and its top bit, less the
    # number 1 itself.
    "max(x, 0)": (lambda: rectify_cost(10), Cost(2, 100, 10 * (256 + 8 * (3 * 34 - 1)))),
    "near maximum": (
        lambda: peak_cost(every(1, 16)), Cost(3, 6 * 16 + 2 * 120, 44 * 120 + 4 * 16 * 16),
    ),
    "near maximum of 256": (
        lambda: peak_cost(every(1, 256)),
        Cost(6, 17 * (6 * 16 + 2 * 120), 17 * (44 * 120 + 4 * 16 * 16)),
    ),
    "place of the largest": (
        lambda: best_cost(1, 16, 1, (16,)),
        Cost(3, 10 * 16 + 2 * 120, 290 * 120 + 8 * 16 * 16),
    ),
    "label of the largest": (
        lambda: again_cost(1, 16, 1, (16,)),
        Cost(3, 18 * 16 + 2 * 120, 290 * 120 + 12 * 16 * 16),
    ),
    **{
        f"{n} experts": (lambda n=n: top_k_cost(1, n), Cost(3, online, dealt))
        for n, online, dealt in (
            (8, 136, 8_632), (64, 4_672, 617_408), (128, 17_536, 2_488_192),
            (256, 67_840, 9_989_888),
        )
    },
    "histograms, 41 entries": (
        lambda: crest_cost(every(1, 41)), Cost(4, 4 * 41 + 510, 608 * 41 + 4064 * 7),
    ),
    "histograms, 129 entries": (
        lambda: crest_cost(every(2, 129)), Cost(4, 2 * 1026, 2 * (608 * 129 + 4064 * 11)),
    ),
    "histograms, 257 entries": (
        lambda: crest_cost(every(1, 257)),
        Cost(4, 4 * 257 + 2 + 2 * 508, 672 * 257 + 4064 * 13),
    ),
    # 2^n bytes per entry, and for each of the 127 counts of n = 8 2^(w + 1) bytes.
    "one histogram": (
        lambda: top_slot_cost(every(1, 129), 8), Cost(2, 4 * 129 + 254, 256 * 129 + 512 * 127),
    ),
    "by digits": (
        lambda: top_slot_cost(every(1, 129), 8, True),
        Cost(3, 4 * 129 + 2 * 254, 256 * 129 + 12 * 127),
    ),
    "by digits of two bytes": (
        lambda: top_slot_cost(every(1, 257), 8),
        Cost(3, 4 * 257 + 2 * 127 * 3, 512 * 257 + (8 + 4 + 2) * 127),
    ),
    "by digits, slots by keys": (
        lambda: top_slot_cost(every(1, 129), 8, True, True),
        Cost(3, 4 * 129 + 2 * 254, 2 * 80 * 129 + 12 * 127),
    ),
    "table of 128 windows": (
        lambda: evaluate_cost(10, fit(np.sin, 8, 0, 128, 6, 40)), Cost(0, 0, 2880),
    ),
    "columns of five octaves": (
        lambda: columns_cost(Octaves(9, 13, 2, np.sqrt, 50), 10), Cost(1, 160, 6400),
    ),
    "the same with few bits": (
        lambda: columns_cost(Octaves(9, 13, 2, np.sqrt, 50), 10, True), Cost(1, 160, 9600),
    ),
    "sum of exponentials": (lambda: octaves_cost(inverse(256, "pairs"), 1), Cost(1, 16, 1312)),
    "row": (lambda: open_row_cost(10), Cost(1, 160, 80)),
    "factors": (lambda: open_factor_cost(ROOT_OF_ROWS, 2), Cost(1, 8 * 24, 16 * 24)),
    "rounded factors": (
        lambda: row_factor_cost(ROOT_OF_ROWS, 2),
        Cost(2, 2 * (16 + 16 * 12), 2 * (128 * 48 + 32 * 53)),
    ),
    "factors as whole numbers": (
        lambda: row_factor_wide_cost(ROOT_OF_ROWS, 2),
        Cost(2, 2 * (16 + 8 * 12), 2 * (64 * 48 + 32 * 53 + 16 * 12)),
    ),
    "rows scaled as whole numbers": (
        lambda: scale_rows_wide_cost(40, ROOT_OF_ROWS, 2, 5),
        Cost(0, 0, 16 * (2 * 2 * 12 + 10 * (3 + 3 * 12))),
    ),
    "scaled rows": (lambda: scale_rows_cost(40, ROOT_OF_ROWS, 2, 5), Cost(0, 0, 112 * 10)),
    "scaled rows modulo 2^128": (
        lambda: scaled_wide_cost([3, 3, 9], 2, 5),
        Cost(0, 0, 16 * (2 * 2 * 3 + 10 * (3 + 2 + 2 * 3))),
    ),
    **{
        f"exponentials in one round, n = {n}": (
            lambda n=n: broad_exponentials_cost(10, BROAD[f"broad-{n}"].exp),
            Cost(1, 80, 10 * dealt),
        )
        for n, dealt in ((6, 48), (7, 72), (8, 120), (9, 216))
    },
    "exponentials in two rounds": (
        lambda: SHIFTS["histogram-to-server"].evaluate_cost(10), Cost(2, 180, 2480),
    ),
    "products modulo 2^72": (
        lambda: finer_products_cost(2, OPENED), Cost(1, 24 * 2 * 3, 10 * 15 + 2 * 15 + 9 * 2 * 5),
    ),
    "GELU": (lambda: apply_cost(GELU, 10), Cost(2, 180, 10 * (288 + 392))),
    "GELU to the server": (lambda: apply_cost(GELU.from_server(9), 10), Cost(2, 180, 2560)),
    **{
        f"GELU by one opening, n = {n}": (
            lambda n=n: evaluate_alone_cost(alone_table(False, n), 10),
            Cost(1, 80, 10 * dealt),
        )
        for n, dealt in ((6, 616), (7, 1276))
    },
    "gated unit": (lambda: apply_cost(SILU, 10, 16), Cost(2, 500, 10 * (304 + 512 + 16))),
    # 13 halves of a sum of n = 8. Tables of n + 1 and of n: words of 832 and 480 bits.
    "logarithm of a sum": (
        lambda: long_log_cost(WAYS["log-8"].logarithm, 10, 13),
        Cost(1, 10 * 104, 20 * (16 * (4 * 92 + 5) + 32 * 92)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COSTS)
def test_rounds_and_bytes(name: str) -> None:
    found, stated = COSTS[name]
    assert found() == stated


def test_the_bytes_of_a_prompt() -> None:
    """For each score of 64 causal rows: what the dealer sends, exponentials included."""
    scores = int(CAUSAL.sum())
    for name, rounds, dealt in (
        ("broad-6-digits", 4, 122), ("broad-7-digits", 4, 221), ("broad-8-digits", 4, 419),
        ("pairs-to-server", 8, 402),
    ):  # fmt: skip
        cost = exponentials_cost(CAUSAL, name)
        assert (cost.rounds, round(cost.offline / scores)) == (rounds, dealt)


def test_who_is_dealt_how_many_bytes() -> None:
    """To the client and to the server, for each element."""
    keys, served = SHIFTS["pairs"].exp, SHIFTS["pairs-to-server"].exp
    assert isinstance(keys, Function) and isinstance(served, Function)
    for function, factor, dealt in (
        (GELU, False, (288, 392)), (GELU.from_server(9), False, (0, 256)),
        (SILU, True, (304, 512)), (SILU.from_server(9), True, (0, 468)),
        (keys, False, (128, 416)), (served, False, (0, 248)),
    ):  # fmt: skip
        context = ShapeContext()
        up = Shared(ghost(10), 16) if factor else None
        share = torch.empty(10, dtype=torch.int32, device="meta")
        rounds, _ = drive(context, apply(context, function, Cut(share), 16, up))
        assert len(rounds) == 2
        assert tuple(context.dealt[role] for role in ("client", "server")) == tuple(
            10 * each for each in dealt
        )


STATED = [
    f"1/√V and log V of a positive integer share V < 2^{octave.MAX_EXPONENT + 1}",
    f"the scores of a row may be up to {rows.MAX_SPREAD:,.0f} apart",
    f"With d + s = w and d − s = {rows.HIDDEN_GAP:.0f} the row",
    f"Rows of up to {histogram.FEW} entries are compared pair by pair",
    f"less than {histogram.STEP + 1} below it. Rows of up to",
    f"The sum is exp(x) with {rows.EXP_FRAC} fractional bits",
    f"have up to {LONGEST:,} entries: then log D",
    f"Counts of rows of more than {LONGEST_BYTES} entries have 16 bits",
    f"n is at most {MOST_EXPERTS}, as a rank is opened in one byte",
    f"with {TABLE_FRAC} fractional bits, and all others are exactly zero",
    f"the result becomes smaller by up to 2^{COLUMN_BITS}, and the tables",
    f"n, from {REACHES[0]} to {REACHES[-1]}, is the `reach` in the op's arguments",
    f"has room for values 2^{RANGE_MARGIN_BITS} times as large as in calibration",
    f"of which each party drops {finer.FINER_BITS} bits",
    f"The weights are opened modulo 2^{32 * finer.HALVES}",
    f"is exp(x_0) with {broad._GUARD_BITS} + 2^n/ln 2 fractional bits",
    f"exp(y) is a mantissa of {broad._MANTISSA_FRAC} bits times a power of two",
    f"of {logarithm._END - logarithm._FIRST} windows, which are as wide as the lowest",
]


@pytest.mark.parametrize("sentence", STATED)
def test_limits(sentence: str) -> None:
    assert sentence in PAGE


@pytest.mark.parametrize(
    ("n", "halves", "kilobytes"), [(6, 0, 2.3), (7, 0, 4.5), (8, 13, 8.9), (9, 0, 17.8)]
)
def test_the_logarithm_of_a_sum(n: int, halves: int, kilobytes: float) -> None:
    """What rows may spread by, the bits of the result and of a sum, and a party's key."""
    way = WAYS[f"log-{n}"]
    assert way.spread == 2**n - 10
    assert way.logarithm.frac == 63 - n
    assert way.sums.kept == 32 * way.logarithm.halves
    assert not halves or way.logarithm.halves == halves
    assert round(8 * way.logarithm.words / 1000, 1) == kilobytes


@pytest.mark.parametrize(("n", "bits"), [(6, 192), (7, 288), (8, 480), (9, 864)])
def test_the_range_of_broad_exponentials(n: int, bits: int) -> None:
    """From 4 - 2^n - 2^-16 to just below 4, in words of so many bits."""
    table = BROAD[f"broad-{n}"].exp
    assert isinstance(table, Broad)
    assert 32 * table.halves == bits
    assert table.start * 2.0**-16 == 4 - 2**n - 2.0**-16
    assert table.start + (1 << table.step_bits) == (4 << 16) - 1


def test_what_is_left_of_small_exponentials() -> None:
    """How far below the shift they are zero: all, and of those beyond the docstring's numbers."""
    for name, lowest in (
        ("pairs", 13.75), ("histogram", 13.75), ("pairs-to-server", 26.0),
        ("histogram-to-server", 23.0), ("slots-6", 23.0), ("broad-7", 124 + 2.0**-16),
    ):  # fmt: skip
        assert shift_called(name).lowest == lowest


def test_counters_of_slots_by_keys() -> None:
    """16 (n - 3) bytes to each party for rows of up to 255 entries, and for longer ones 16 more."""
    for n in range(6, 10):
        assert [Counters(bits, n).dealt_bytes for bits in (8, 16)] == [
            2 * 16 * (n - 3), 2 * 16 * (n - 2),
        ]  # fmt: skip
