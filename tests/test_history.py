"""The history of a compile: what each pass changes and saves, and the graphs before and after."""

from __future__ import annotations

import re
from itertools import pairwise

import onnx
import pytest

from mergec import CompileConfig, Program, compile_decoder
from mergec.compiler.report.rows import Saving
from mergec.runtime.core.errors import BundleError
from tests.families import LAYERS, float_decoder

LENGTHS = (1, 8)


@pytest.fixture(scope="module")
def program() -> Program:
    model, captured = float_decoder("llama")
    config = CompileConfig(max_length=64, disable=("fuse_cache",))
    return compile_decoder(model, config=config, captured=captured)


@pytest.fixture(scope="module")
def savings(program: Program) -> dict[str, Saving]:
    assert program.history is not None
    return {saving.name: saving for saving in program.history.savings(*LENGTHS)}


def test_changes_are_told_once_for_all_layers_alike(program: Program) -> None:
    assert program.history is not None
    changes = {change.name: change for change in program.history.changes}
    ran = [row.name for row in program.inspect(*LENGTHS).passes if row.sites]
    assert list(changes) == ran
    (hunk,) = changes["fuse_glu"].hunks
    assert hunk.layers == tuple(f"model.layers.{i}" for i in range(LAYERS))
    assert [line.split(" = ")[1].split("(")[0] for line in hunk.removed] == [
        "mpc.silu", "aten.mul.Tensor",
    ]  # fmt: skip
    (added,) = hunk.added
    assert "mpc.glu(%model.layers.N.mlp.gate_proj.linear" in added
    norms = changes["fuse_rms_norm"].hunks
    assert [hunk.layers for hunk in norms][-1] == ("model.norm",)
    assert any("%model.layers.N-1." in line for hunk in norms for line in hunk.added)


def test_a_node_that_only_got_another_operand_is_no_change(program: Program) -> None:
    assert program.history is not None
    changes = {change.name: change for change in program.history.changes}
    assert changes["fuse_glu"].rewired == LAYERS
    assert not any("down_proj" in line for h in changes["fuse_glu"].hunks for line in h.added)


def test_the_last_saving_ends_at_the_programs_own_cost(
    program: Program, savings: dict[str, Saving]
) -> None:
    compared = [s for s in savings.values() if s.with_it is not None]
    total = program.inspect(*LENGTHS).total
    last = compared[-1].with_it
    assert last is not None
    assert (last.rounds, last.online, last.offline) == (total.rounds, total.online, total.offline)
    for earlier, later in pairwise(compared):
        assert earlier.with_it == later.without


def test_what_a_pass_saves_is_what_leaving_it_out_costs(
    program: Program, savings: dict[str, Saving]
) -> None:
    """Of the last pass that can be left out, as no other is left out with it."""
    last = [s for s in savings.values() if s.without is not None][-1]
    disabled = ("fuse_cache", last.name)
    config = CompileConfig(max_length=64, disable=disabled)
    model, captured = float_decoder("llama")
    total = compile_decoder(model, config=config, captured=captured).inspect(*LENGTHS).total
    assert last.without is not None
    assert (last.without.rounds, last.without.online) == (total.rounds, total.online)


def test_needed_passes_say_why(savings: dict[str, Saving]) -> None:
    needed = savings["linear_to_dialect"]
    assert needed.without is None
    assert "cannot be lowered" in needed.needed
    rms = savings["fuse_rms_norm"]
    assert rms.without is not None
    assert rms.with_it is not None
    assert rms.without.rounds > rms.with_it.rounds


def test_the_table_holds_the_savings(program: Program, savings: dict[str, Saving]) -> None:
    rows = {row.name: row for row in program.inspect(*LENGTHS, savings=True).passes}
    assert rows["fuse_rms_norm"].without == savings["fuse_rms_norm"].without
    assert rows["fuse_rms_norm"].instructions == savings["fuse_rms_norm"].instructions
    assert program.inspect(*LENGTHS).why_not("fuse_cache").verdict == (
        "did not run: the option `disable` names it"
    )


def test_both_graphs_as_text_dot_and_onnx(program: Program) -> None:
    before, after = program.captured_graph, program.graph
    assert "aten.rsqrt.default(" in str(before)
    assert "mpc.rms_norm(" in str(after)
    assert "aten.rsqrt.default(" not in str(after)
    for view in (before, after):
        onnx.checker.check_model(view.to_onnx())
        dot = view.to_dot()
        assert dot.startswith("digraph step {")
        assert dot.count("{") == dot.count("}")
        assert 'label="model.layers.1";' in dot
        for item in view.program.instructions:
            assert f'"{item.name}" [label="{item.name}\\n{item.target}"' in dot


def test_shapes_stand_in_the_text(program: Program, tmp_path) -> None:
    (line,) = [
        li for li in str(program.graph).splitlines() if li.startswith("%model.layers.0.add ")
    ]
    assert re.search(r" : shared f\d+ 1xnewx32\b", line)
    loaded = Program.load(program.save(tmp_path / "bundles"), roles=("client",))
    assert str(loaded.graph) == str(program.graph)
    with pytest.raises(BundleError, match="inspect the model itself"):
        _ = loaded.captured_graph
    with pytest.raises(BundleError, match="inspect the model itself"):
        loaded.inspect(*LENGTHS, savings=True)
