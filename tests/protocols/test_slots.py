"""The maximum of rows that spread little, in two rounds: all places, orders, lengths and masks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from mergec.runtime.core.context import Context, ShapeContext
from mergec.runtime.core.messages import Protocol
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.ops.attention import Attention
from mergec.runtime.protocols import slots
from mergec.runtime.protocols.rows import (
    BROAD,
    coarse_rows,
    exponentials_cost,
    reach_of_rows,
    shift_of_length,
    shift_of_many,
)
from mergec.runtime.protocols.slots import LONGEST, _digits, top_slot, top_slot_cost
from tests.protocols.harness import run, uniform_bytes, words

UNIT = 2**16
WRAP = 2**32
every_reach = pytest.mark.parametrize("bits", [6, 7, 9])


Way = tuple[bool, bool, bool]
"""Whether counts go by digits, tables are dealt as keys, and slots are coarse."""

WAYS: dict[str, Way] = {
    "words": (False, False, False),
    "digits": (True, False, False),
    "keys": (True, True, False),
    "coarse": (True, False, True),
    "coarse by keys": (True, True, True),
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def _check(values: torch.Tensor, bits: int, way: Way, valid: torch.Tensor | None = None) -> None:
    """Below the maximum by less than a slot and its carry, modulo 2**32; the client gets nothing
    but keys."""
    valid = torch.ones(values.shape, dtype=torch.bool) if valid is None else valid
    simulation = Simulation()
    shares = [s.share.to(torch.int32) for s in simulation.share(values, 0)]
    result, cost = run(simulation, lambda ctx, p: top_slot(ctx, shares[p], valid, bits, *way))
    assert cost == top_slot_cost(valid, bits, *way)
    digits, keys, coarse = way
    assert cost.rounds == (2 if not digits and int(valid.sum(1).max()) <= LONGEST else 3)
    levels = bits - coarse - (4 if int(valid.sum(1).max()) <= LONGEST else 3)
    assert simulation.to_client.total == (16 * (levels + 1) * int(valid.sum()) if keys else 0)
    exact = torch.where(valid, values, -(2**62)).max(1).values
    assert bool((result.long() % UNIT == 0).all())
    assert bool(((exact - result.long()) % WRAP < _below(way) * UNIT).all())


def _below(way: Way) -> int:
    """How far below the maximum a result may be, and a row below 2**bits."""
    return 8 if way[2] else 4


@every_way
@every_reach
def test_two_values_at_each_distance_and_every_fraction(bits: int, way: Way) -> None:
    """Each after the other, at quarters of a unit and beside them, all around the circle."""
    most = (2**bits - _below(way)) * UNIT
    ends = torch.tensor([most + 1, most - 1, 1]).repeat(100)
    gaps = torch.cat([torch.arange(0, most + 1, UNIT // 4), ends])
    for place in (0, 3 * UNIT // 4, -1, 2**31 - UNIT, words(len(gaps), -(2**31), 2**31)):
        low = torch.zeros_like(gaps) + place
        _check(torch.stack([low, low + gaps], 1), bits, way)
        _check(torch.stack([low + gaps, low], 1), bits, way)


@every_way
def test_every_order_of_four_values_with_ties(way: Way) -> None:
    rows = torch.tensor(list(itertools.product((-3, 0, 0.5, 50), repeat=4)))
    for place in (0, 1, 2, 2**15 - 1, -1):
        _check(((rows + place) * UNIT).long(), 6, way)


@every_way
@every_reach
@pytest.mark.parametrize("length", [1, 2, 16, 127, 128, 255, 256, 512, 2047, 2048, 4096])
def test_rows_of_any_length(length: int, bits: int, way: Way) -> None:
    most = (2**bits - _below(way)) * UNIT
    values = words(12 * length, 0, most + 1, seed=length).reshape(12, length)
    values[0] = values[0, 0]
    values[1], values[2] = 5 * UNIT, -7
    values[1, length // 2] = 5 * UNIT + most
    values[2, -1] = -7 - most
    values[3], values[3, 0] = most, 0
    # 256 in the top slot are not none, nor is a multiple of it.
    values[4], values[4, : length // 2] = 0, 40 * UNIT
    _check(values, bits, way)


@every_way
def test_masked_entries_are_left_out_and_may_be_anywhere(way: Way) -> None:
    values = words(40 * 37, -(2**31), 2**31).reshape(40, 37)
    valid = torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    valid[:, 5] = True
    valid[3] = False
    valid[3, 36] = True
    values[valid] = words(int(valid.sum()), 0, 248 * UNIT)
    _check(values, 8, way, valid)
    causal = torch.ones(60, 60, dtype=torch.bool).tril()
    _check(words(60 * 60, 0, 56 * UNIT).reshape(60, 60), 6, way, causal)


@pytest.mark.parametrize("width", range(1, 14))
def test_every_count_is_zero_or_not_under_every_mask(width: int) -> None:
    """Digits of the counts below 2**width, opened in a ring of 2**8 or 2**16."""
    digits, ring = _digits(width), 8 if width <= 8 else 16
    assert width <= digits.width <= ring
    masks = torch.arange(256) if ring == 8 else words(300, 0, 2**ring, seed=width)
    counts = torch.arange(2**width)[:, None]
    opened = (counts + masks + 2 ** (ring - 1)) % 2**ring - 2 ** (ring - 1)
    found = digits.look_up(opened, digits.tables(masks))
    assert torch.equal(found == 3, (counts == 0).expand_as(found))


SEEN = [
    (length, way) for length in (3, 255, 300) for way in WAYS if (length, way) != (255, "words")
]


@pytest.mark.parametrize(("length", "way"), SEEN)
@pytest.mark.parametrize("fill", ["equal", "two", "beyond the reach"])
def test_what_is_seen_is_uniform_and_of_one_shape(fill: str, length: int, way: str) -> None:
    digits, keys, coarse = WAYS[way]
    places = 15 if coarse else 31
    count = 6144 // length
    values = torch.zeros(count, length, dtype=torch.int64)
    values[:, 1] = {"equal": 0, "two": 50 * UNIT, "beyond the reach": 9000 * UNIT}[fill]
    simulation = Simulation(record=True)
    shares = [s.share.to(torch.int32) for s in simulation.share(values, 0)]
    valid = torch.ones(values.shape, dtype=torch.bool)
    sent = simulation.to_server
    kept, write = [], sent.write
    sent.write = lambda data: (kept.append(data.clone()), write(data))[1]  # type: ignore[method-assign]
    simulation.run(lambda ctx, p: top_slot(ctx, shares[p], valid, 6, *WAYS[way]))
    seen = simulation.transcript
    kind, digits = (torch.int8, digits) if length <= LONGEST else (torch.int16, True)
    bits = [(torch.uint8, (count * places,))] if digits else []
    assert [(t.dtype, tuple(t.shape)) for t in seen[::2]] == [
        (torch.int16, (count * length,)),
        (kind, (count, places)),
        *bits,
    ]
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        together = first ^ second if first.dtype is torch.uint8 else first + second
        for opened in (first, second, together):
            assert abs(uniform_bytes([opened])) < 6.5
    tables = {3: 1 + 1, 255: 2 + 2, 300: 4 + 2}
    sizes = [tables[length], 2 * 4] if digits else [2 * 4]
    assert [len(data) for data in kept] == [
        *(count * places * size for size in sizes),
        count
        * length
        * (16 * (2 - coarse + kind.itemsize) if keys else (places + 1) * 2 * kind.itemsize),
    ]
    for data in kept:
        assert abs(uniform_bytes([data])) < 6.5


@every_way
@pytest.mark.parametrize("length", [7, LONGEST, LONGEST + 1, 4096])
def test_shapes_alone_take_the_same_bytes(length: int, way: Way) -> None:
    context, valid = ShapeContext(), torch.ones(2, length, dtype=torch.bool)
    share = torch.empty((2, length), dtype=torch.int32, device="meta")
    rounds = list(top_slot(context, share, valid, 8, *way))
    cost = top_slot_cost(valid, 8, *way)
    assert len(rounds) == cost.rounds
    assert sum(context.dealt.values()) == cost.offline
    assert bool(context.dealt["client"]) == way[1]


@every_way
@pytest.mark.parametrize("sizes", [(7, 33, 64), (64, 1, 7), (39, 39, 38)])
def test_roles_may_take_tables_in_parts_of_any_size(
    sizes: tuple[int, ...], way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = words(5 * 9, 0, 56 * UNIT).reshape(5, 9)
    valid = torch.ones(values.shape, dtype=torch.bool)
    valid[1, 3:] = False
    simulation = Simulation()
    shares = [s.share.to(torch.int32) for s in simulation.share(values, 0)]

    def protocol(ctx: Context, p: int) -> Protocol:
        steps, answer = top_slot(ctx, shares[p], valid, 6, *way), None
        while True:
            monkeypatch.setattr(slots, "_TOGETHER", sizes[p])
            try:
                answer = yield steps.send(answer)
            except StopIteration as done:
                return done.value

    result, _ = run(simulation, protocol)
    exact = torch.where(valid, values, -(2**62)).max(1).values
    assert bool(((exact - result.long()) % WRAP < _below(way) * UNIT).all())


def test_many_rows_take_slots_whose_tables_are_small() -> None:
    for name in ("broad-{}", "broad-{}-digits", "broad-{}-keys", "slots-{}"):
        taken = [shift_of_many(name.format(n), 255) for n in (6, 7, 8, 9)]
        assert taken == [*(f"broad-{n}-digits" for n in (6, 7, 8)), "pairs-to-server"]
        taken = [shift_of_many(name.format(n), 256) for n in (6, 7, 8, 9)]
        assert taken == [*(f"broad-{n}-digits" for n in (6, 7)), *["pairs-to-server"] * 2]
    assert shift_of_many("histogram", 64) == "pairs"
    for way in ("digits", "keys"):
        by_length = {
            31: ["-digits", "-digits", "-digits", "-digits-coarse"],
            64: ["-digits", "-digits", "-digits-coarse", "-digits-coarse"],
            128: ["-digits", *["-digits-coarse"] * 3],
            255: ["-digits", *["-digits-coarse"] * 3],
            256: [*["-digits-coarse"] * 3, None],
            257: ["-digits", "-digits", None, None],
        }
        for length, wanted in by_length.items():
            for n, end in zip((6, 7, 8, 9), wanted, strict=True):
                taken = shift_of_many(f"broad-{n}-{way}-coarse", length, 8)
                assert taken == ("pairs-to-server" if end is None else f"broad-{n}{end}")


def test_rows_too_long_for_coarse_slots_take_finer_ones() -> None:
    for way in ("digits", "keys"):
        name = f"broad-7-{way}-coarse"
        assert shift_of_length(name, 1024, 10) == name
        assert shift_of_length(name, 1025, 10) == f"broad-7-{way}"
    for name in ("pairs", "slots-6", "broad-6", "log-8"):
        assert shift_of_length(name, 4096, 0) == name


@pytest.mark.parametrize(
    ("spread", "largest", "pads", "wanted"),
    [
        (31.0, 15.0, None, 10),
        (31.1, 15.0, None, 0),
        (31.0, 15.0, torch.tensor([2]), 0),
        (15.0, 0.6, None, 12),
        (15.5, 0.6, None, 0),
        (63.0, 1e4, None, 0),
        (64.0, 1.0, None, 0),
    ],
)
def test_which_calls_have_coarse_slots(
    spread: float, largest: float, pads: torch.Tensor | None, wanted: int
) -> None:
    """Eight times the spread that was seen leaves 8 units, and no key is hidden."""
    measured = {"score_spread": spread, "largest_value": largest}
    found = Attention.calibrate(measured, {"pads": pads})
    assert found["coarse"] == wanted
    offered = {each["shift"] for each in Attention.variants({"pads": pads} | found)}
    coarse = {f"broad-{found['reach']}-{way}-coarse" for way in ("digits", "keys")}
    assert offered & coarse == (coarse if wanted else set())


def test_how_long_rows_of_coarse_slots_may_be() -> None:
    """2**12 times 2**17, 16 fractional bits and eight times what was seen leave 14 bits of 62."""
    assert [coarse_rows(x) for x in (16.0, 16.1, 2.0**13, 2.0**14, 2.0**20)] == [10, 9, 1, 0, 0]
    assert [coarse_rows(x) for x in (0.001, 4.0, 0.0, math.inf)] == [12, 12, 0, 0]
    assert 17 + 12 + 10 + 16 + 3 + math.log2(16.0) == 62


@pytest.mark.parametrize("length", [9, 64, 128, 255, 256, 512, 1024])
def test_many_rows_take_less_by_small_tables_than_by_pairs(length: int) -> None:
    """The exponentials of a causal prompt: rounds, and bytes unless there are hardly any."""
    valid = torch.ones(length, length, dtype=torch.bool).tril()
    pairs = exponentials_cost(valid, "pairs-to-server")
    for shift in {shift_of_many(name, length) for name in BROAD} & BROAD.keys():
        found = exponentials_cost(valid, shift)
        assert found.rounds < pairs.rounds
        if length >= 64:
            assert found.online < pairs.online
            assert found.offline < 1.05 * pairs.offline


def test_a_reach_has_room_for_eight_times_what_was_seen() -> None:
    assert [reach_of_rows(x / 8) for x in (0, 60, 60.1, 124, 252, 508, 508.1)] == [
        6, 6, 7, 7, 8, 9, 0,
    ]  # fmt: skip
