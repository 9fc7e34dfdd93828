"""Calibration covers prompts and decode steps, and measures values and rows of norms."""

from __future__ import annotations

import pytest
import torch

from mergec.compiler.config import CompileConfig
from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.capture import capture
from mergec.compiler.graph.ir import absmax
from mergec.compiler.graph.ranges import annotate_ranges
from mergec.compiler.pipeline import calibration, to_dialect
from mergec.runtime.core.spec import Vis
from mergec.runtime.core.structural import target_name
from mergec.runtime.program.program import InputSpec
from tests.families import VOCAB, captured, decoder, random_decoder, tokens
from tests.passes.harness import Graph, normal

IDS = InputSpec("ids", Vis.CLIENT, "torch.int64", (1, "new"))


def measured(*names: str, seed: int = 0):
    """A table lookup and what follows from it; ranges of the tokens 1 and 2."""
    table = normal(4, 8, seed=seed) * 3.0

    def body(m, ids):
        x = torch.nn.functional.embedding(ids, m.w)
        y = torch.nn.functional.layer_norm(x, (8,))
        z = torch.nn.functional.rms_norm(x, (8,), eps=1e-6)
        return x * 2.0, y, z

    graph = Graph(body, torch.tensor([[1, 2]]), w=table)
    for name in ("fuse_layer_norm", "fuse_rms_norm", *names):
        graph.run(name)
    return graph, table


def meta(graph: Graph, target: str) -> dict:
    return next(n.meta for n in graph.module.graph.nodes if target_name(n.target) == target)


def test_largest_values_and_rows() -> None:
    graph, table = measured()
    annotate_ranges(graph.module, [IDS], [[1, 2], [2, 3]])
    rows = table[1:]
    ends = (2 * rows.min().item(), 2 * rows.max().item())
    assert meta(graph, "aten.mul.Tensor")["range"] == pytest.approx(ends)
    square = rows.square().mean(-1).max().item()
    assert meta(graph, "mpc.rms_norm")["mean_square"] == pytest.approx(square)
    centred = rows - rows.mean(-1, keepdim=True)
    square = centred.square().mean(-1).max().item()
    assert meta(graph, "mpc.layer_norm")["mean_square"] == pytest.approx(square)


def test_tokens_that_are_not_fed_do_not_count() -> None:
    graph, table = measured()
    annotate_ranges(graph.module, [IDS], [[0, 0]])
    ends = (2 * table[0].min().item(), 2 * table[0].max().item())
    assert meta(graph, "aten.mul.Tensor")["range"] == pytest.approx(ends)


def test_the_cache_is_fed_as_in_a_session() -> None:
    """The last tokens are fed one by one; what is measured is what the model computes."""
    step = captured("llama")
    ids = tokens()[0].tolist()
    annotate_ranges(step.graph_module, step.inputs, [ids])
    with torch.no_grad():
        hidden = decoder("llama")(tokens(), output_hidden_states=True).hidden_states
    largest = max(
        absmax(node)
        for node in step.graph_module.graph.nodes
        if node.meta.get("module") == "model.layers.1" and "add" in node.name
    )
    assert largest >= hidden[1].abs().max().item() * (1 - 1e-6)


def test_nothing_but_meta_changes() -> None:
    step = captured("gpt2")
    before = str(step.graph_module.graph)
    annotate_ranges(step.graph_module, step.inputs, [[1], [2, 3]])
    assert str(step.graph_module.graph) == before


def test_calibration_is_the_users_or_ours() -> None:
    def largest(config: CompileConfig, tokenizer: object = None) -> float:
        step = capture(random_decoder("gpt2").float())
        program = to_dialect(step, config, sequences=calibration(config, step, tokenizer))
        nodes = program.graph_module.graph.nodes
        return next(absmax(n) for n in nodes if "wte.embedding" in n.meta.get("module", "")
                    or n.meta.get("module") == "transformer.wte")  # fmt: skip

    table = random_decoder("gpt2").transformer.wte.weight.float().abs().amax(1)
    token = int(table.argmin())
    assert largest(CompileConfig(calibration=((token,) * 4,))) == pytest.approx(table.min().item())
    assert largest(CompileConfig()) <= table.max().item()

    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % VOCAB for letter in text]}

    assert largest(CompileConfig(), tokenizer) >= largest(CompileConfig()) * 0.9


def test_the_first_value_that_is_not_finite_is_named() -> None:
    def body(m, ids):
        x = torch.nn.functional.embedding(ids, m.w)
        return (x * 1e200).square() + 1.0

    graph = Graph(body, torch.tensor([[1, 2]]), w=normal(4, 8))
    with pytest.raises(CompileError, match="disable a lossy pass") as caught:
        annotate_ranges(graph.module, [IDS], [[1, 2]])
    (node,) = caught.value.nodes
    assert "pow" in target_name(node.target) or "square" in target_name(node.target)
    assert "\n" in str(caught.value)
    assert "While executing" not in str(caught.value)
