"""The tables beside MERGE's: sums over steps, ratios, no figure that nothing was measured for."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mergec import CompileConfig, Program, compile_decoder
from tests.encoder_decoders import VOCAB, random_model
from tests.roles import ROOT

LENGTH = 8


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import merge_tables

    return merge_tables


@pytest.fixture
def merge(tables: Any) -> Any:
    import merge

    return merge


@pytest.fixture
def kind(tables: Any) -> Any:
    """A text of 8 tokens: a prompt of 2, then steps after 2 to 6."""
    return tables.Kind("Small", "It is small.", False, 2, (LENGTH,), (2, 4, 6), (2, 6))


def point(tables: Any, new: int, past: int, seconds: float, online: float = 0) -> Any:
    """A step whose work was half linear and half softmax; all bytes are softmax's."""
    shares = {"linear": tables.Share(1.0, 0, 0), "softmax": tables.Share(1.0, online, 8)}
    return tables.Point(new, past, seconds, 2 * seconds, 10, shares)


@pytest.fixture
def row(tables: Any) -> Any:
    points = [
        point(tables, 2, 0, 1.0, 100),
        point(tables, 1, 2, 2.0, 10),
        point(tables, 1, 4, 4.0, 30),
        point(tables, 1, 6, 12.0, 50),
    ]
    return tables.Row("gpt2-124m", tables.BASELINE.label, points)


def model() -> tuple[Any, list[int]]:
    import bench

    return bench._random("gpt2", vocab_size=300, n_embd=64, n_layer=1, n_head=4, n_positions=256)


@pytest.fixture(scope="module")
def program() -> Program:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return compile_decoder(model()[0], config=CompileConfig(speculate_up_to=1))


def test_steps_between_measured_ones_lie_on_a_line(tables: Any, row: Any, kind: Any) -> None:
    assert list(kind.decoded(LENGTH)) == [2, 3, 4, 5, 6]
    text = row.text(kind, LENGTH)
    # The prompt, and 2 + 3 + 4 + 8 + 12 seconds; 10 + 20 + 30 + 40 + 50 bytes.
    assert text.total.seconds == pytest.approx(1 + 29)
    assert text.total.online == pytest.approx(100 + 150)
    assert text.total.offline == pytest.approx(6 * 8)
    assert text.rounds == pytest.approx(60)
    assert text.shares["linear"].seconds == pytest.approx(15)
    assert text.shares["linear"].online == 0


def test_nothing_is_told_beyond_the_measured_steps(tables: Any, row: Any, kind: Any) -> None:
    longer = replace(kind, lengths=(9,))
    with pytest.raises(tables.MissingError, match="both sides of 7 cached"):
        row.text(longer, 9)
    with pytest.raises(tables.MissingError, match="the prompt was not measured"):
        replace(row, points=row.points[1:]).text(kind, LENGTH)
    with pytest.raises(tables.MissingError, match="no memory"):
        replace(row, failed="no memory").text(kind, LENGTH)


def test_the_cost_model_s_bytes_take_the_place_of_interpolated_ones(
    tables: Any, row: Any, kind: Any
) -> None:
    shares = {"softmax": tables.Share(0.0, 151, 7)}
    exact = replace(row, counted={tables.key(1, LENGTH): tables.Spent(33, shares)})
    text = exact.text(kind, LENGTH)
    assert (text.total.online, text.total.offline, text.rounds) == (251, 15, 43)
    assert text.total.seconds == row.text(kind, LENGTH).total.seconds


def test_the_last_step_lies_on_the_line_of_two(tables: Any, row: Any, kind: Any) -> None:
    one, four = point(tables, 0, 1, 5.0, 7), point(tables, 0, 4, 8.0, 13)
    text = replace(row, points=[*row.points, one, four]).text(kind, LENGTH)
    # Six hidden states: 5 + 5 seconds, 7 + 10 bytes.
    assert text.total.seconds == pytest.approx(30 + 10)
    assert text.total.online == pytest.approx(250 + 17)
    with pytest.raises(tables.MissingError, match="one last step"):
        replace(row, points=[*row.points, one]).text(kind, LENGTH)


def test_an_encoder_decoder_s_answer_comes_after_its_source(merge: Any) -> None:
    decoder, encoder_decoder = merge.KINDS.values()
    for kind in (decoder, encoder_decoder):
        for length in kind.lengths:
            steps = kind.decoded(length)
            for pasts in (kind.pasts, kind.few):
                assert min(pasts) <= steps[0] <= steps[-1] <= max(pasts)
    assert (len(decoder.decoded(128)), decoder.decoded(128)[-1]) == (123, 126)
    assert (len(encoder_decoder.decoded(128)), encoder_decoder.decoded(128)[0]) == (126, 4)


def test_drafts_divide_the_steps_and_make_them_larger(tables: Any, row: Any, kind: Any) -> None:
    full = [
        point(tables, 4, p.past, 2 * p.seconds, p.shares["softmax"].online) for p in row.points[1:]
    ]
    both = replace(row, points=[*row.points, *full])
    text = both.drafted(kind, LENGTH, tables.Drafts("quote", 2.0, 1.5), 3)
    # Half of the time of steps is plain, half full: 1.5 times 29 seconds for 2 tokens each.
    assert text.total.seconds == pytest.approx(1 + 29 * 1.5 / 2)
    assert text.total.online == pytest.approx(100 + 150 / 2)
    with pytest.raises(tables.MissingError, match=r"3\.50 drafts a step, of 3"):
        both.drafted(kind, LENGTH, tables.Drafts("quote", 2.0, 3.5), 3)


def test_what_drafts_achieved_is_read_from_their_page(tables: Any) -> None:
    page = (ROOT / "docs" / "speculation.md").read_text()
    found = tables.achieved(page, 3)
    assert len(found) == 3
    assert all(1 < of.a_step < 4 and 0 < of.drafted <= 3 for of in found)
    one = tables.achieved("| edit | lookup, up to 3 | 1.50 | 5 of 20 | 9 |\n", 3)
    assert one == [tables.Drafts("edit", 1.5, 2.0)]
    with pytest.raises(tables.MissingError, match="up to 5"):
        tables.achieved(page, 5)


def test_rows_are_compared_with_the_baseline_of_their_own_table(
    tables: Any, row: Any, kind: Any
) -> None:
    merge = next(s for s in tables.SYSTEMS if (s.name, s.mode) == ("MERGE", "mergec"))
    fast = replace(
        row,
        system=merge.label,
        points=[replace(p, seconds=p.seconds / 10) for p in row.points],
        load=1.0,
    )
    slow = replace(row, load=0.5)
    text = tables.page(
        {"gpt2-124m": kind}, [slow, fast], [], {"cores": 2, "processor": "x"}, LENGTH
    )
    lines = [line for line in text.splitlines() if line.startswith("| MERGE | mergec's |")]
    seconds, online = lines
    # 30 s and 3 s here; 1328 s and 171 s, 322.5 GiB and 121.8 GiB in the paper.
    assert "| 3.00 | 10.0 | 5.2 | 157.5 | 0.0 | 171 | 7.77 |" in seconds
    assert online.endswith("| 1.2 | 119.9 | 0.0 | 121.8 | 2.65 |")
    assert "Other work ran" not in text
    # On a shared machine, processor seconds: here 60 of both.
    shared = tables.page(
        {"gpt2-124m": kind},
        [replace(slow, load=3.5), fast],
        [],
        {"cores": 2, "processor": "x"},
        LENGTH,
    )
    assert "| 60.0 | 1.00 | 5.2 |" in shared
    assert "Other work ran on the machine" in shared


def test_a_row_without_steps_says_why_and_has_no_figures(tables: Any, row: Any, kind: Any) -> None:
    failed = tables.Row("gpt2-124m", "THE-X, by CrypTen", failed="no memory left")
    text = tables.page(
        {"gpt2-124m": kind}, [row, failed], [], {"cores": 2, "processor": "x"}, LENGTH
    )
    blank = "|  |  |  |  |  | not run |  |"
    assert f"| THE-X | CrypTen's {blank} 329.3 | 258.0 | 87.7 | 966 | 1.37 |" in text
    assert f"| MERGE | mergec's {blank}" in text
    assert "* Not run by CrypTen's protocols (no memory left): THE-X." in text
    count = Counter("not run" in line for line in text.splitlines() if line.startswith("| "))
    assert count[True] == 2 * (len(tables.SYSTEMS) - 1)


def test_rows_are_stored_and_read_back(tables: Any, row: Any) -> None:
    shares = {"softmax": tables.Share(0.0, 151, 7)}
    row = replace(row, counted={tables.key(1, LENGTH): tables.Spent(33, shares)}, load=1.5)
    assert tables.Row.read(json.loads(json.dumps(row.json()))) == row


def test_every_instruction_is_booked(merge: Any, tables: Any, kind: Any, program: Program) -> None:
    booked = merge.categories(program.any_role)
    assert set(booked) == {item.name for item in program.any_role.instructions}
    assert set(booked.values()) == set(tables.CATEGORIES)
    spent = merge._predicted(program, kind, 1, 4, booked)
    found = program.inspect(1, 4)
    whole = found.total
    assert (spent.rounds, spent.total.online) == (whole.rounds, whole.online)
    assert spent.total.offline == whole.offline
    online = {row.key: row.online for row in found.by_op}
    # The softmax's own messages, the openings of its operands and a truncation behind it.
    assert spent.shares["softmax"].online > online["mpc.attention"] > 0
    assert spent.shares["head"].online > online["mpc.reveal"] > 0
    assert spent.shares["embedding"].online > 0


def test_all_steps_of_a_text_are_counted(
    merge: Any, tables: Any, kind: Any, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "LENGTH", LENGTH)
    found = merge.counted(program, kind, 1)
    for new in (1, 2):
        steps = [program.inspect(new, past).total for past in kind.decoded(LENGTH)]
        text = found[tables.key(new, LENGTH)]
        assert text.rounds == sum(step.rounds for step in steps)
        assert text.total.online == sum(step.online for step in steps)
        assert text.total.offline == sum(step.offline for step in steps)


def test_a_step_that_took_other_bytes_than_predicted_is_refused(
    merge: Any, tables: Any, kind: Any, program: Program
) -> None:
    booked = merge.categories(program.any_role)
    told = merge._predicted(program, kind, 1, 4, booked)
    right = tables.Point(1, 4, 1.0, 1.0, told.rounds, told.shares)
    merge.check(program, kind, [right])
    with pytest.raises(ValueError, match="a step of 1 tokens after 4 took"):
        merge.check(program, kind, [replace(right, rounds=told.rounds + 1)])
    shares = {**told.shares, "head": told.shares["head"] + tables.Share(0.0, 1, 0)}
    with pytest.raises(ValueError, match="the cost model says"):
        merge.check(program, kind, [replace(right, shares=shares)])


@pytest.mark.slow
def test_rows_are_measured_kept_and_tried_again_if_they_failed(
    merge: Any, tables: Any, kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(merge.LOADERS, "gpt2-124m", model)
    named = {(s.name, s.mode): s for s in tables.SYSTEMS}
    systems = [
        tables.BASELINE,
        tables.System("no such", "no-such-preset", "mergec"),
        named["MERGE", "crypten"],
        named["MERGE", "mergec"],
        tables.DRAFTING,
    ]
    first = merge.Measurement({"gpt2-124m": kind}, tmp_path, resume=False)
    first.run(["gpt2-124m"], systems)
    failed = [row.failed for row in first.rows]
    assert [reason != "" for reason in failed] == [False, True, False, False, False]
    assert "no-such-preset" in failed[1]
    # What takes long by CrypTen's protocols is measured last.
    stock, _, ours, drafting, by_stock = first.rows
    for row in (stock, by_stock, ours):
        text = row.text(kind, LENGTH)
        assert text.total.seconds > 0
        assert text.shares["head"].online > 0
    assert stock.text(kind, LENGTH).total.online > 20 * ours.text(kind, LENGTH).total.online
    assert {point.new for point in ours.points} == {2, 1, 0}
    assert drafting.drafted(kind, LENGTH, tables.Drafts("x", 1.5, 1.0), 3).total.seconds > 0

    monkeypatch.setattr(merge, "run", lambda *_, **__: pytest.fail("these rows are there already"))
    second = merge.Measurement({"gpt2-124m": kind}, tmp_path, resume=True)
    second.run(["gpt2-124m"], [system for system in systems if system.preset != "no-such-preset"])
    assert [row.json() for row in second.rows] == [row.json() for row in first.rows]


@pytest.mark.slow
def test_an_encoder_decoder_s_rows(
    merge: Any, tables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = [(7 * i + 3) % VOCAB for i in range(200)]
    monkeypatch.setitem(merge.LOADERS, "t5-138m", lambda: (random_model("t5"), tokens))
    kind = tables.Kind("Small", "It is small.", True, 3, (LENGTH,), (3, 6, 8), (3, 8))
    assert list(kind.decoded(LENGTH)) == [3, 4, 5, 6, 7, 8]
    exact = next(s for s in tables.SYSTEMS if (s.name, s.mode) == ("exact", "mergec"))
    found = merge.Measurement({"t5-138m": kind}, tmp_path, resume=False, repeats=2)
    found.run(["t5-138m"], [tables.BASELINE, exact, tables.DRAFTING])
    stock, ours, drafting = found.rows
    assert drafting.drafted(kind, LENGTH, tables.Drafts("x", 1.5, 1.0), 3).total.seconds > 0
    totals = [row.text(kind, LENGTH) for row in (stock, ours)]
    assert totals[0].total.online > 10 * totals[1].total.online > 0
    assert all(set(text.shares) == set(tables.CATEGORIES) for text in totals)
