"""The table of all ops is complete, and its costs are those of a run of the protocol."""

from __future__ import annotations

import inspect

import pytest

from mergec.compiler.report.op_table import COLUMNS, op_table, sample_cost
from mergec.runtime.core.cases import Case
from mergec.runtime.core.op import REGISTRY, Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.ops import load_all
from tests.ops.test_every_op import arguments

load_all()


def rows() -> list[list[str]]:
    lines = op_table().splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_there_is_a_row_for_every_op() -> None:
    head, rule, *rest = rows()
    assert tuple(head) == COLUMNS
    assert set(rule) == {"---"}
    assert [row[0] for row in rest] == [f"`mpc.{name}`" for name in sorted(REGISTRY)]
    assert all(len(row) == len(COLUMNS) for row in rest)


def test_a_row_says_what_the_op_says() -> None:
    found = {row[0]: row for row in rows()}
    assert found["`mpc.silu`"] == [
        "`mpc.silu`", "`(Tensor x, int reach=0)`", "x: window", "share", "x 3008", "2",
        str(18 * 3008), str(712 * 3008), "5e-05", "-2^14 to 2^14",
    ]  # fmt: skip
    assert found["`mpc.linear`"][2] == "x: sent, weight: weight, bias: held"
    assert found["`mpc.truncate`"][5:8] == ["1", str(16 * 12), str(16 * 12)]


@pytest.mark.parametrize("op", REGISTRY.values(), ids=REGISTRY)
def test_the_cost_is_that_of_a_run(op: type[Op]) -> None:
    """For every case, also on shares that carry a product, which `test_every_op` does not cover."""
    for case in op.cases():
        if case.error is not None:
            assert sample_cost(op, case) == _run(op, case)


def _run(op: type[Op], case: Case) -> Cost:
    simulation = Simulation()
    views = arguments(simulation, op, case, case.args)
    forms = {**dict.fromkeys(op.tensors, "fixed"), **op.forms(*case.args), **case.forms}
    for view, name in zip(views, inspect.signature(op.reference).parameters, strict=False):
        for value in view:
            if isinstance(value, Shared) and forms[name] != "fixed":
                value.frac = 32
                value.share = value.share if value.share.is_meta else value.share << 16
    simulation.cost = Cost()
    simulation.run(lambda ctx, p: op.protocol(ctx, *(view[p] for view in views)))
    return simulation.cost
