"""Calibration covers prompts and decode steps, and measures values and rows of norms."""

from __future__ import annotations

import pytest
import torch

from mergec.compiler.config import CompileConfig
from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.calibration import calibration
from mergec.compiler.frontend.capture import capture
from mergec.compiler.graph.extremes import extreme_tokens
from mergec.compiler.graph.ir import absmax
from mergec.compiler.graph.ranges import annotate_ranges
from mergec.compiler.pipeline import to_dialect
from mergec.runtime.core.spec import Vis
from mergec.runtime.core.structural import target_name
from mergec.runtime.program.program import InputSpec
from tests.families import (
    VOCAB,
    WIDTH,
    captured,
    decoder,
    float_decoder,
    random_decoder,
    tokens,
)
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


def test_extreme_tokens_count_even_if_they_are_not_fed() -> None:
    graph, table = measured()
    annotate_ranges(graph.module, [IDS], [[0, 0]])
    ends = (2 * table.min().item(), 2 * table.max().item())
    assert meta(graph, "aten.mul.Tensor")["range"] == pytest.approx(ends)


def test_which_tokens_are_extreme() -> None:
    table = torch.ones(97, 8, dtype=torch.float64) + normal(97, 8) * 0.01
    table[13] *= 50.0  # the largest
    table[29] *= 1e-3  # the smallest
    table[41] = 0.0  # unused
    table[60, 1:] *= 1e-2  # one large entry

    def body(m, ids):
        return torch.nn.functional.embedding(ids, m.w)

    graph = Graph(body, torch.tensor([[1, 2]]), w=table)
    found = extreme_tokens(graph.module, [torch.tensor([[1]])])
    assert found[0] == 13
    assert found[-1] == 29
    assert 60 in found
    assert 41 not in found
    assert len(found) == len(set(found)) <= 16


def test_positions_that_no_prompt_reaches_count() -> None:
    model = random_decoder("gpt2").float()
    with torch.no_grad():
        # A row without a mean: what is the same in all columns, LayerNorms take away.
        model.transformer.wpe.weight[50] = 9.0 * torch.tensor([1.0, -1.0]).repeat(WIDTH // 2)

    def largest(max_length: int) -> float:
        config = CompileConfig(max_length=max_length)
        program = to_dialect(capture(model), config, sequences=[[1, 2, 3]])
        nodes = program.graph_module.graph.nodes
        calls = [n for n in nodes if n.op == "call_function"]
        return next(absmax(n) for n in calls if n.meta.get("module") == "transformer.wpe")

    assert largest(64) == pytest.approx(9.0)
    assert largest(32) < 1.0, "no prompt may be that long"


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
        step = float_decoder("gpt2")[1]
        program = to_dialect(step.copy(), config, sequences=calibration(config, step, tokenizer))
        nodes = program.graph_module.graph.nodes
        return next(absmax(n) for n in nodes if "wte.embedding" in n.meta.get("module", "")
                    or n.meta.get("module") == "transformer.wte")  # fmt: skip

    table = random_decoder("gpt2").transformer.wte.weight.float().abs().amax(1)
    token = int(table.argmin())
    # Whatever the prompts are, the largest row counts.
    assert largest(CompileConfig(calibration=((token,) * 4,))) == pytest.approx(table.max().item())
    assert largest(CompileConfig()) == pytest.approx(table.max().item())

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


def test_a_mask_of_infinities_that_meets_a_secret_is_named() -> None:
    def body(m, ids):
        x = torch.nn.functional.embedding(ids, m.w)
        return x + torch.full((2, 8), -torch.inf).triu(1), x * 2.0

    graph = Graph(body, torch.tensor([[1, 2]]), w=normal(4, 8))
    with pytest.raises(CompileError, match=r"a public operand contains inf.* such as -10000"):
        annotate_ranges(graph.module, [IDS], [[1, 2]])
