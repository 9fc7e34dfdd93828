"""Columns of massive activations get a scale of their own, and the values stay the same."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from mergec import CompileConfig, Program, compile_decoder
from mergec.compiler.backend.outliers import FEW, shrink_outliers
from mergec.compiler.frontend.capture import capture
from mergec.compiler.graph.ir import absmax, bind, calls
from mergec.compiler.graph.ranges import annotate_ranges
from mergec.compiler.graph.streams import streams
from mergec.compiler.graph.visibility import annotate_visibility
from mergec.compiler.pipeline import rewrite
from mergec.compiler.selection import select
from mergec.runtime.core.op import target
from mergec.runtime.ops.rms_norm import RmsNorm
from mergec.runtime.roles.inprocess import InProcessSession
from tests.families import random_decoder

IDS, MASSIVE = [1, 5, 9, 30, 22], 5
PLAIN = CompileConfig(logit_noise=0.0)


def decoder(larger: float, columns: int = 1) -> Any:
    """A Llama whose first layer writes a few columns of the stream far larger than the others."""
    model = random_decoder("llama", hidden_size=64, intermediate_size=96)
    for layer in model.model.layers[:1]:
        layer.mlp.down_proj.weight.data *= 2.0**14
        layer.mlp.down_proj.weight.data[MASSIVE : MASSIVE + columns] *= larger
    return model


@functools.cache
def compiled(larger: float) -> Program:
    return compile_decoder(decoder(larger), config=PLAIN)


def norms(program: Program) -> list[Any]:
    return [item for item in program.any_role.instructions if item.target == "mpc.rms_norm"]


def test_a_massive_column_is_shrunk_and_the_logits_stay() -> None:
    model, program = decoder(32.0), compiled(32.0)
    for norm in norms(program):
        columns = norm.args[-1]
        assert columns[:1] == [MASSIVE] and columns[2] == 1 and columns[3] > 0
    with InProcessSession(program.roles) as session:
        for new, past in ((IDS, []), ([7], IDS)):
            found = session.step(new, len(past))
            with torch.inference_mode():
                wanted = model(input_ids=torch.tensor([[*past, *new]])).logits[0, -1]
            assert float((found - wanted).abs().max()) < 2e-3


def test_it_saves_the_truncations_before_the_products() -> None:
    """Against a stream whose columns are all as large, which cannot be helped."""
    few = compiled(32.0).inspect(new=1, past=8).total
    model = decoder(32.0, columns=64)
    all_large = compile_decoder(model, config=PLAIN).inspect(new=1, past=8).total
    assert few.rounds == all_large.rounds - 4
    assert few.online < all_large.online


@pytest.mark.parametrize(("largest", "columns", "shrunk"), [
    (2.0**11 + 1, 1, 1), (2.0**13, 64 // FEW + 1, 0),
    pytest.param(2.0**11, 1, 0, marks=pytest.mark.slow),
    pytest.param(2.0**19, 1, 1, marks=pytest.mark.slow),
    pytest.param(2.0**19 + 1, 1, 0, marks=pytest.mark.slow),
    pytest.param(2.0**13, 64 // FEW, 64 // FEW, marks=pytest.mark.slow),
])  # fmt: skip
def test_only_a_few_large_columns(largest: float, columns: int, shrunk: int) -> None:
    """2**11 have room beside 48 fractional bits and the usual margin; 8 bits more are possible."""
    step = capture(random_decoder("llama", hidden_size=64, intermediate_size=96))
    rewrite(step, PLAIN, select(PLAIN), [IDS])
    annotate_visibility(step.graph_module, step.inputs, step.constants)
    annotate_ranges(step.graph_module, step.inputs, [IDS], tables=False)
    (stream,) = streams(step.graph_module.graph)
    most = torch.full((64,), 100.0, dtype=torch.float64)
    most[MASSIVE : MASSIVE + columns] = largest
    for value in stream.values:
        value.meta |= {"columns": (-most, most), "range": (-largest, largest)}
    sums = [value for value in stream.values if calls(value, target("add"))]
    assert shrink_outliers(step, 16) == shrunk
    for value in sums:
        assert (
            value.meta["range"][1] == largest if not shrunk else 2.0**7 < absmax(value) <= 2.0**11
        )
    assert [bool(bind(RmsNorm, norm)["columns"]) for norm in stream.readers] == [bool(shrunk)] * 5
