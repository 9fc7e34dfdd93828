from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from mergec.compiler.backend.legalize import legalize
from mergec.compiler.config import CompileConfig
from mergec.compiler.frontend.capture import Captured, capture
from mergec.compiler.graph.manager import PassReport
from mergec.compiler.pipeline import rewrite
from mergec.compiler.text import dump
from mergec.runtime.core.op import target
from mergec.runtime.core.spec import Vis
from mergec.runtime.ops.attention import Attention
from mergec.runtime.ops.constant_attention import ConstantAttention
from tests.encoder_decoders import random_model
from tests.families import captured
from tests.merge_models import VOCAB, looks_back
from tests.passes.harness import Graph, normal

CALIBRATION = ((3, 1, 4, 1, 5, 9, 2, 6, 5, 3), (2, 7, 1, 8))
ASKED = CompileConfig(enable=("fix_attention",), calibration=CALIBRATION)


def outputs(step: Captured, ids: torch.Tensor, cut: int) -> torch.Tensor:
    """Logits of the last token, of which those from `cut` on come one by one."""
    caches = [
        torch.zeros([0 if isinstance(s, str) else s for s in spec.shape], dtype=torch.float64)
        for spec in step.inputs[1:]
    ]
    pieces = [ids[:, :cut], *(ids[:, i : i + 1] for i in range(cut, ids.shape[1]))]
    with torch.no_grad():
        for piece in pieces:
            logits, *caches = step.graph_module(piece, *caches)
    return logits


def fixed(step: Captured) -> tuple[Captured, dict[str, PassReport]]:
    return step, {report.name: report for report in rewrite(step, ASKED)}


def test_exact_for_a_head_that_looks_by_position() -> None:
    """Within the calibrated length, and beyond it."""
    model = looks_back()
    step, reports = fixed(capture(model))
    assert reports["fix_attention"].sites == 1
    ids = torch.randint(0, VOCAB, (1, 14), generator=torch.Generator().manual_seed(1))
    for length, cut in ((6, 6), (9, 4), (14, 12), (14, 14)):
        with torch.no_grad():
            wanted = model(input_ids=ids[:, :length]).logits[:, -1:]
        assert float((outputs(step, ids[:, :length], cut) - wanted).abs().max()) < 1e-9


def test_queries_keys_and_their_cache_are_gone() -> None:
    step, _ = fixed(captured("llama"))
    text = dump(step.graph_module)
    assert [spec.name for spec in step.inputs] == ["input_ids", "cache.0.value", "cache.1.value"]
    for gone in ("q_proj", "k_proj", "rotary", "softmax", "mpc.attention"):
        assert gone not in text
    assert text.count("mpc.constant_attention") == 2
    tables = {name: vis for name, vis in step.constants.items() if name.endswith(".table")}
    assert list(tables.values()) == [Vis.SERVER] * 2
    assert rewrite(step, ASKED)[0].sites == 0
    assert dump(step.graph_module) == text


def test_a_cache_that_only_tables_read_is_opened_to_the_server_alone() -> None:
    """Half the bytes of an opening to both, which the cache of an attention needs."""
    step, _ = fixed(capture(looks_back()))
    usual = captured("llama")
    rewrite(usual, CompileConfig())
    for made, form in ((step, "sent"), (usual, "masked")):
        legalize(made.graph_module, 16)
        nodes = list(made.graph_module.graph.nodes)
        caches = [node for node in nodes if node.op == "placeholder"][1:]
        assert caches
        longer = nodes[-1].args[0][1:]
        assert {node.meta["form"] for node in (*caches, *longer)} == {form}


def test_the_table_is_the_mean_attention() -> None:
    step, _ = fixed(captured("gpt2"))
    table = step.tensors()["transformer.h.0.attn.table"][0]
    assert table.shape == (4, 10, 10)
    assert torch.allclose(table.sum(-1), torch.ones(4, 10, dtype=torch.float64))
    assert not table.triu(1).any()


def test_rows_beyond_the_table() -> None:
    """As the last row: at the same distances, and at the first token."""
    table = torch.rand(2, 4, 4, dtype=torch.float64).tril()
    values = torch.eye(7, dtype=torch.float64)[None, None]
    rows = ConstantAttention.reference(values, table, 7)[0]
    assert torch.equal(rows[:, :4, :4], table)
    assert not rows[:, :4, 4:].any()
    for i in (4, 5, 6):
        assert torch.equal(rows[:, i, 0], table[:, 3, 0])
        assert torch.equal(rows[:, i, i - 2 : i + 1], table[:, 3, 1:])
        assert not rows[:, i, 1 : i - 2].any()
    assert torch.equal(ConstantAttention.reference(values, table, 2)[0], rows[:, -2:])


def test_weights_are_those_of_attention() -> None:
    q, k, v = normal(1, 4, 3, 8), normal(1, 2, 5, 8, seed=1), normal(1, 2, 5, 8, seed=2)
    weights = Attention.probabilities(q, k, None, 0.5)
    assert torch.equal(weights @ v.repeat_interleave(2, 1), Attention.reference(q, k, v, None, 0.5))


@pytest.mark.parametrize("name", ["fix_attention", "softmax_2quad"])
def test_a_last_layer_computes_the_last_position_alone(name: str) -> None:
    config = {"enable": (name,), "calibration": CALIBRATION}
    step, whole = captured("gpt2"), captured("gpt2")
    rewrite(step, CompileConfig(**config))
    rewrite(whole, CompileConfig(**config, disable=("hoist_last_position",)))
    ids = torch.randint(0, 97, (1, 8), generator=torch.Generator().manual_seed(3))
    for cut in (8, 5):
        assert float((outputs(step, ids, cut) - outputs(whole, ids, cut)).abs().max()) < 1e-12
    ops = ("constant_attention", "ratio_attention")
    rows = [
        str(node.meta["val"].shape[2])
        for node in step.graph_module.graph.nodes
        if any(node.target is target(op) for op in ops)
    ]
    assert rows[-1] == "1"
    assert rows[0] != "1"


def test_near_misses() -> None:
    """Another pass replaced the attention first, or none was recognized."""
    step = captured("gpt2")
    rewrite(step, CompileConfig(enable=("softmax_2quad",)))
    before = dump(step.graph_module)
    reports = {report.name: report for report in rewrite(step, ASKED)}
    assert reports["fix_attention"].sites == 0
    assert dump(step.graph_module) == before
    graph = Graph(lambda m, q, k, v: (q @ k.transpose(-1, -2)) @ v, *(normal(1, 4, 3, 8),) * 3)
    assert graph.run("fix_attention") == 0
    assert not any(n.target is target("constant_attention") for n in graph.module.graph.nodes)


# --------------------------------------------------------------------------------- encoder-decoders

LENGTH = 6
SOURCE = [3, 1, 4, 1, 5, 9]


@functools.cache
def by_position() -> tuple[Any, Captured]:
    """A T5 whose queries are zero: its attention follows from positions alone, or is a mean. With
    its captured step, of which to change a copy."""
    model = random_model("t5").double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".q.weight"):
                parameter.zero_()
    return model, capture(model)


def answered(step: Captured, source: list[int], tokens: list[int], cut: int) -> torch.Tensor:
    """Logits after the tokens of an answer, of which those from `cut` on come one by one."""
    given = step.inputs[2:]
    caches = [
        torch.zeros([0 if isinstance(s, str) else s for s in spec.shape], dtype=torch.float64)
        for spec in given
    ]
    pieces = [tokens[:cut], *([token] for token in tokens[cut:])]
    with torch.no_grad():
        for piece in pieces:
            ids = torch.tensor([source]), torch.tensor([piece])
            logits, *found = step.graph_module(*ids, *caches)
            caches = found[: len(given)]
    return logits


def test_an_encoder_decoder_gets_tables_of_three_kinds() -> None:
    """Exact for a source as long as those of calibration, if its heads attend by position alone."""
    model, captured_step = by_position()
    step = captured_step.copy()
    calibration = ((3, 1, 4, 1, 5, 9), (2, 7, 1, 8, 2, 8))
    config = CompileConfig(enable=("fix_attention",), calibration=calibration)
    reports = {report.name: report for report in rewrite(step, config)}
    assert reports["fix_attention"].sites == 6
    tokens = [0, 2, 6, 5, 3, 5]
    for length, cut in ((1, 1), (4, 4), (6, 2)):
        with torch.no_grad():
            ids, begun = torch.tensor([SOURCE]), torch.tensor([tokens[:length]])
            wanted = model(input_ids=ids, decoder_input_ids=begun).logits[:, -1:]
        found = answered(step, SOURCE, tokens[:length], cut)
        assert float((found - wanted).abs().max()) < 1e-5  # T5's norms round to float32
    tables = {name: step.tensors()[name][0] for name in step.constants if name.endswith(".table")}
    (encoder,) = [v for k, v in tables.items() if k.startswith("encoder.block.0")]
    (own,) = [v for k, v in tables.items() if k.startswith("decoder.block.0.layer.0")]
    (cross,) = [v for k, v in tables.items() if k.startswith("decoder.block.0.layer.1")]
    assert encoder.triu(1).any() and not own.triu(1).any()
    assert torch.allclose(cross, torch.full_like(cross, 1 / LENGTH))


def test_caches_of_keys_are_gone_also_for_cross_attention() -> None:
    step = by_position()[1].copy()
    rewrite(step, CompileConfig(enable=("fix_attention",), calibration=(tuple(SOURCE),)))
    assert [spec.name for spec in step.inputs] == [
        "input_ids", "decoder_input_ids", "cache.0.value", "cache.1.value"
    ]  # fmt: skip
    *_, output = step.graph_module.graph.nodes
    results = output.args[0]
    assert len(results) == 1 + 2 + 2
    assert all(node.target is target("cache_fill") for node in results[3:])
    text = dump(step.graph_module)
    for gone in ("relative_attention_bias", "mpc.attention", ".q.", ".k."):
        assert gone not in text


def test_a_weight_is_the_mean_over_the_sequences_that_have_it() -> None:
    """Cross-attention is a mean over the source here, so weights are 1/6, or (1/6 + 1/2) / 2."""
    step = by_position()[1].copy()
    config = CompileConfig(enable=("fix_attention",), calibration=(tuple(SOURCE), (8, 9)))
    rewrite(step, config)
    table = step.tensors()["decoder.block.0.layer.1.EncDecAttention.table"][0]
    wanted = torch.full((4, LENGTH, LENGTH), 1 / 6, dtype=torch.float64)
    wanted[:, :2, :2] = (1 / 6 + 1 / 2) / 2
    assert torch.allclose(table, wanted)


def test_rows_and_columns_beyond_a_whole_table() -> None:
    """An encoder's later tokens attend as a decoder's; cross-attention repeats its last row."""
    table = torch.rand(2, 4, 4, dtype=torch.float64)
    eye = torch.eye(7, dtype=torch.float64)[None, None]
    for length in (2, 4):
        values = eye[:, :, :length, :length]
        rows = ConstantAttention.reference(values, table, length, None, False)[0]
        assert torch.equal(rows, table[:, :length, :length])
    rows = ConstantAttention.reference(eye, table, 7, None, False)[0]
    assert torch.equal(rows[:, :4, :4], table) and not rows[:, :4, 4:].any()
    later = ConstantAttention.reference(eye, table, 7)[0]
    assert torch.equal(rows[:, 4:], later[:, 4:])
    wide = table[:, :3]
    for length in (2, 7):
        values = eye[:, :, :length, :length]
        rows = ConstantAttention.reference(values, wide, 2, 5, False)[0]
        seen = min(length, 4)
        assert torch.equal(rows[:, :, :seen], wide[:, [2, 2], :seen])
        assert not rows[:, :, seen:].any()
    first = ConstantAttention.reference(eye, wide, 2, 2, False)[0]
    assert torch.equal(first[:, :, :4], wide[:, :2])
