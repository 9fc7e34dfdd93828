"""Decoders in which products are scaled instead of the rows that they read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mergec.compiler.backend.cost import cost_report
from mergec.compiler.backend.legalize import legalize
from mergec.compiler.config import CompileConfig
from mergec.compiler.driver import compile_decoder
from mergec.compiler.graph.ir import bind, op_of
from mergec.compiler.program import Program
from mergec.runtime.core.network import NETWORKS, Link, Network
from mergec.runtime.core.spec import HEADROOM_BITS, RANGE_MARGIN_BITS
from mergec.runtime.ops.normed_linear import NormedLinear
from mergec.runtime.roles.inprocess import InProcessSession
from tests.families import float_decoder, random_decoder, slow
from tests.passes.harness import Graph, normal
from tests.session import compiled

ERROR = 1e-3
"""Of a logit of these decoders, whose logits are about 1."""

IDS = [3, 14, 15, 92, 65, 35, 89, 79]
STEPS = (5, 1, 2)
"""New tokens of each step: a prompt, one token, and two at once."""

SETTINGS: tuple[dict[str, str], ...] = (
    {},
    {"weights": "shared"},
    {"rounding": "exact"},
    {"reveal": "token"},
)


def limits(program: Program) -> list[int]:
    """Up to how many rows each product of normalized rows is scaled."""
    calls = [item for item in program.roles["client"].instructions if "norm_linear" in item.target]
    return [int(item.args[9]) for item in calls]


def check(model: Any, program: Program, steps: Sequence[int] = STEPS) -> None:
    """The logits are the model's, and each step costs what was predicted."""
    token = program.manifest.reveal == "token"
    with InProcessSession(program.roles) as session, torch.no_grad():
        past = 0
        for new in steps:
            found = session.step(IDS[past : past + new], past)
            wanted = model(torch.tensor([IDS[: past + new]])).logits[0, -1]
            if token:
                assert int(found) == int(wanted.argmax())
            else:
                assert (found.reshape(-1) - wanted).abs().max() < ERROR
            report = cost_report(program.roles["client"], new, past)
            costs = {row.name: row.cost for row in report.rows if row.cost.rounds}
            assert costs.items() <= session.record.by_instruction.items()
            assert session.record.total == report.total
            past += new


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("family", ["llama", *slow("gpt2")])
def test_a_decoder_s_logits(family: str, setting: dict[str, str]) -> None:
    model, program = compiled(family, network="wan", **setting)
    assert len(limits(program)) >= 4
    assert min(limits(program)) > 0
    check(model, program)


@pytest.mark.parametrize("family", ["llama", *slow("gpt2")])
def test_a_token_takes_fewer_rounds(family: str) -> None:
    _, program = compiled(family, network="wan")
    _, plain = compiled(family, network="wan", disable=("defer_norm",))
    rounds = [cost_report(p.roles["client"], 1, 20).total.rounds for p in (program, plain)]
    assert rounds[1] - rounds[0] >= len(limits(program))


@pytest.mark.parametrize("family", ["llama", *slow("gpt2")])
def test_a_prompt_of_more_rows_normalizes_them_first(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where bytes are so dear that the limit lies between a token and a prompt."""
    near = Link(latency=0.0, bandwidth=math.inf)
    slow = Network(Link(latency=2e-2, bandwidth=8e4), near, near)
    monkeypatch.setitem(NETWORKS, "wan", slow)
    model, captured = float_decoder(family)
    config = CompileConfig(max_length=64, logit_noise=0.0, network="wan")
    program = compile_decoder(model, config=config, captured=captured)
    assert limits(program)
    assert all(1 <= limit < STEPS[0] for limit in limits(program))
    check(model, program)
    seen = set()
    for new, past in ((STEPS[0], 0), (16, 16), (1, 20)):
        report = cost_report(program.roles["client"], new, past)
        rows = [row for row in report.rows if "norm_linear" in row.target]
        for row, limit in zip(rows, limits(program), strict=True):
            scaled = math.prod(row.shape[:-1]) <= limit
            # The last layer reads the last position alone.
            assert row.cost.rounds == 3 if scaled else row.cost.rounds > 3
            seen.add((new, scaled))
    assert seen == {(5, False), (5, True), (16, False), (16, True), (1, True)}


def test_massive_activations() -> None:
    """One feature of one token is 20,000 times as large as the others."""
    model = random_decoder("llama").float()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)
        model.model.embed_tokens.weight[IDS[2], 5] = 8_000.0
    config = CompileConfig(
        max_length=64, logit_noise=0.0, network="wan", calibration=(tuple(IDS), (5, 6, 7))
    )
    program = compile_decoder(model, config=config)
    assert min(limits(program)) > 0
    check(model, program)


def _legal(unscaled: float, *, fine: bool = False, **measured: float) -> dict[str, Any]:
    """The arguments of a legalized product of normalized rows; `fine` ones have 32 bits."""

    def body(self: Any, x: torch.Tensor) -> Any:
        rows = torch.ops.mpc.linear(x, self.v, None) if fine else x
        return torch.ops.mpc.rms_norm_linear(rows, self.w, None, 1e-5, rows=9)

    graph = Graph(body, normal(1, 3, 8), w=normal(4, 8), v=normal(8, 8))
    (node,) = [n for n in graph.module.graph.nodes if "norm_linear" in str(n.target)]
    largest = measured.pop("largest", 30.0)
    node.meta |= {"range": (-largest, largest), "unscaled": unscaled, "mean_square": 1.0}
    node.meta |= {"factor": 1.0, **measured}
    legalize(graph.module, 16)
    op = op_of(node)
    assert op is not None and issubclass(op, NormedLinear)
    found = bind(op, node)
    if found["rows"]:
        total = found["kept"] + 16 + found["bits"] + math.log2(unscaled)
        assert total <= HEADROOM_BITS - RANGE_MARGIN_BITS
    assert found["x"].meta["frac"] == (32 if fine else 16)
    assert node.meta["frac"] == (48 if found["fine"] else 32) + found["bits"]
    return found


@pytest.mark.parametrize("exponent", range(-6, 40))
def test_the_product_fits_before_it_is_scaled(exponent: int) -> None:
    """Or the norm runs first, and the matrix keeps the bits that it has in any case."""
    found = _legal(2.0**exponent)
    assert found["rows"] == (9 if exponent <= 27 else 0)
    if not found["rows"] or exponent <= 21:
        assert found["bits"] == 6
    assert found["kept"] == (16 if found["rows"] else 0)


def test_results_beyond_what_scaling_supports_run_the_norm_first() -> None:
    assert _legal(2.0, largest=2.0**10.9)["rows"] == 9
    assert _legal(2.0, largest=2.0**11.1)["rows"] == 0
    assert _legal(2.0, largest=0.0)["rows"] == 0


@pytest.mark.parametrize(
    ("unscaled", "factor", "wanted"),
    [
        # All bits of the rows fit.
        (1.0, 1.0, (32, 6, 9)),
        # Some are dropped, as many as a normalized row does not have.
        (2.0**15, 1.0, (22, 6, 9)),
        # Rows that are scaled up need more, and the matrix gets fewer.
        (2.0**15, 2.0**8, (24, 4, 9)),
        (2.0**15, 2.0**10, (26, 2, 9)),
        (2.0**15, 2.0**12, (28, 0, 9)),
        (2.0**15, 2.0**13, (0, 6, 0)),
    ],
)
def test_rows_keep_the_bits_that_they_have_when_they_are_normalized(
    unscaled: float, factor: float, wanted: tuple[int, int, int]
) -> None:
    found = _legal(unscaled, fine=True, factor=factor)
    assert (found["kept"], found["bits"], found["rows"]) == wanted
