"""How a notebook shows a program, its inspection and its graph; and records for pandas."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from mergec.compiler.errors import CompileError
from mergec.compiler.program import Program
from mergec.compiler.report.inspect import Inspection
from mergec.compiler.report.rows import PassRow
from mergec.runtime.core.spec import ROLES, Cost
from tests.fixtures import decoder
from tests.test_program import TYPES

EVIL = "<script>alert('1')</script> & [bold]x"
STEP = {"new": 1, "past": 8, "rounds": 58, "online": 23640, "offline": 371983}


class Page(HTMLParser):
    """The tags that are open at the end, all that were met, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.met: set[str] = set()
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.met.add(tag)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def program() -> Program:
    passes = [
        {
            "pass": "fuse_glu", "summary": EVIL, "exact": True, "sites": 2, "nodes_before": 9,
            "nodes_after": 7, "skips": [
                {"node": "act", "module": EVIL, "source": "m.py:3", "reason": "|x| > 4"}
            ],
        }
    ]  # fmt: skip
    told = {"model": EVIL, "passes": passes, "cost": {"decode": STEP}, "left_out": {"quad": EVIL}}
    return Program({role: decoder(role, **told) for role in ROLES}, TYPES)


@pytest.fixture
def inspection(program: Program) -> Inspection:
    return program.inspect(1, 4)


def shown(value: object) -> str:
    page = Page(value._repr_html_())  # type: ignore[attr-defined]
    assert not page.open
    assert page.met <= {"pre", "span"}
    return page.text


def test_a_program_shows_a_summary(program: Program) -> None:
    text = shown(program)
    assert EVIL in text
    assert program.manifest.program_hash[:12] in text
    assert "decode: 1 new after 8" in text
    assert "58 rounds, 23.6 kB online" in text
    assert "not saved" in text


def test_a_lossy_program_says_so() -> None:
    deviation = {"places": 16, "agreed": 3, "worst": 37.25, "mean": 6.5, "spread": 4.0}
    told = {"lossy": True, "deviation": deviation}
    text = shown(Program({role: decoder(role, **told) for role in ROLES}, TYPES))
    assert "next token is the model's at 3 of 16 places" in " ".join(text.split())
    assert "yes" not in text


def test_an_inspection_shows_its_tables(inspection: Inspection) -> None:
    text = shown(inspection)
    for heading in ("By op", "By layer", "Rounds", "Steps", "Passes"):
        assert heading in text
    for row in inspection.by_op:
        assert row.key in text


def test_a_reason_is_shown_as_it_is(inspection: Inspection) -> None:
    text = shown(inspection.why_not("fuse_glu"))
    assert "|x| > 4" in text
    assert "changed 2 sites and skipped 1" in text


def test_a_graph_shows_its_text(program: Program) -> None:
    instruction = program.any_role.instructions[1]
    assert shown(program.graph) == str(program.graph)
    assert instruction.name in str(program.graph)


def test_records_are_flat_and_alike(inspection: Inspection) -> None:
    for table in ("op", "layer", "schedule", "step", "pass"):
        records = inspection.to_records(table)
        assert records
        for record in records:
            assert list(record) == list(records[0])
            assert all(isinstance(v, (str, int, float, type(None))) for v in record.values())
            assert record["model"] == EVIL
    assert inspection.to_records() == inspection.to_records("op")


def test_records_hold_the_numbers_of_the_tables(inspection: Inspection) -> None:
    for table, rows in (("op", inspection.by_op), ("layer", inspection.by_layer)):
        records = inspection.to_records(table)
        assert [record["key"] for record in records] == [row.key for row in rows]
        assert sum(record["online"] for record in records) == inspection.total.online
        assert {(record["new"], record["past"]) for record in records} == {(1, 4)}
    (step,) = inspection.to_records("step")
    assert step == {"model": EVIL, **STEP, "step": "decode"}


def test_savings_are_spread_over_columns() -> None:
    row = PassRow(
        "a", "b", True, 2, 9, 7, [{"node": "x"}], "", Cost(9, 80, 7), Cost(8, 40, 7), (20, 18)
    )
    record = row.to_record()
    assert (record["without_rounds"], record["with_rounds"]) == (9, 8)
    assert (record["without_online"], record["with_online"]) == (80, 40)
    assert (record["without_instructions"], record["with_instructions"]) == (20, 18)
    assert record["skips"] == 1
    plain = PassRow("a", "b", True, 2, 9, 7, []).to_record()
    assert list(plain) == list(record)
    assert plain["with_offline"] is None


def test_an_unknown_table_is_refused(inspection: Inspection) -> None:
    with pytest.raises(CompileError, match="unknown table 'ops'; there are: op, layer"):
        inspection.to_records("ops")
