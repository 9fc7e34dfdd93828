"""The predicted cost of a step is the measured one, instruction by instruction."""

from __future__ import annotations

import itertools
from dataclasses import replace

import networkx as nx
import pytest
import torch

from mergec.compiler.backend.cost import CostReport, cost_report
from mergec.runtime.core.spec import CLIENT, DEALER, ROLES, SERVER, Cost
from mergec.runtime.program.program import Ref, RoleProgram
from tests.families import LAYERS, slow, tokens
from tests.session import compiled, play

PLAYED = ("gpt2", "llama", "gemma2", *slow("bloom", "falcon", "gpt_neo"))
PROMPT = 5

LOGIT_ERROR = {"gemma2": 5e-3}
"""gemma2 caps its scores and logits by a tanh, whose protocol has the largest error."""


@pytest.mark.parametrize("family", PLAYED)
def test_predicted_is_measured(family: str) -> None:
    model, program = compiled(family)
    ids = tokens()[0].tolist()
    pieces = [ids[:PROMPT], ids[PROMPT : PROMPT + 1], ids[PROMPT + 1 : PROMPT + 3]]
    past = 0
    for piece, step in zip(pieces, play(program.roles, pieces), strict=True):
        report = cost_report(program.roles["client"], len(piece), past)
        predicted = {row.name: row.cost for row in report.rows if row.cost != Cost()}
        assert predicted == step.by_instruction
        server, dealer = step.records[SERVER].total, step.records[DEALER].total
        assert report.total == replace(server, offline=dealer.offline)
        client = step.records[CLIENT].total
        assert (client.rounds, client.online) == (report.total.rounds, report.total.online)
        assert client.offline + server.offline == dealer.offline
        past += len(piece)
        with torch.no_grad():
            plain = model(input_ids=torch.tensor([ids[:past]]), use_cache=False).logits[:, -1:]
        assert float((step.logits - plain).abs().max()) < LOGIT_ERROR.get(family, 1e-3)


@pytest.fixture(scope="module")
def program() -> RoleProgram:
    return compiled("llama")[1].roles["client"]


@pytest.fixture(scope="module")
def report(program: RoleProgram) -> CostReport:
    return cost_report(program, 1, 7)


def refs(args: object) -> set[str]:
    if isinstance(args, Ref):
        return {args.name}
    if isinstance(args, (list, tuple)):
        return set().union(*map(refs, args))
    return set()


def test_every_role_predicts_the_same(report: CostReport) -> None:
    for role in ROLES:
        assert cost_report(compiled("llama")[1].roles[role], 1, 7) == report


def test_totals_add_up(report: CostReport) -> None:
    assert report.total.online == sum(row.cost.online for row in report.rows)
    assert report.total.offline == sum(row.cost.offline for row in report.rows)
    assert report.serial.rounds == sum(row.cost.rounds for row in report.rows)
    assert report.total.rounds < report.serial.rounds, "rounds are shared"


def test_openings_are_shared() -> None:
    """One norm feeds queries, keys and values; the other feeds gate and up."""
    apart = compiled("llama", disable=("merge_siblings",))[1]
    report = cost_report(apart.roles["client"], 1, 7)
    rows = {row.name: row for row in report.rows}
    taken = {name.split(".", 3)[3]: n for name, n in report.takers.items() if ".layers.0." in name}
    assert sorted(taken.values()) == [2, 3]
    assert all(rows[name].target in ("mpc.open", "mpc.send") for name in report.takers)
    again = [rows[name].cost for name, n in report.takers.items() for _ in range(n - 1)]
    assert len(again) == 3 * LAYERS
    assert report.unshared.online == report.serial.online + sum(cost.online for cost in again)
    assert report.unshared.rounds == report.serial.rounds + len(again)


def test_the_critical_path_is_one(program: RoleProgram, report: CostReport) -> None:
    needs = {i.name: refs(i.args) for i in program.instructions}
    path = report.critical_path
    assert all(before in needs[after] for before, after in itertools.pairwise(path))
    rounds = {row.name: row.cost.rounds for row in report.rows}
    assert sum(rounds.get(name, 0) for name in path) == report.total.rounds
    assert sum(name.endswith(".attention") for name in path) == LAYERS
    graph = nx.DiGraph()
    for name, sources in needs.items():
        graph.add_edges_from((source, name, {"r": rounds.get(name, 0)}) for source in sources)
    assert nx.dag_longest_path_length(graph, "r") == report.total.rounds


def test_lengths_matter_as_they_should(program: RoleProgram, report: CostReport) -> None:
    longer = cost_report(program, 1, 30)
    assert longer.total.online > report.total.online
    assert cost_report(program, 8, 0).total.online > report.total.online
    short = {row.name: row for row in report.rows}
    for row in longer.rows:
        if row.target == "mpc.linear":
            assert row.cost == short[row.name].cost, "weights do not care about the past"
