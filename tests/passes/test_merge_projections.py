from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import fx

from mergec.compiler.config import CompileConfig
from mergec.compiler.frontend.capture import Captured, capture
from mergec.compiler.graph.manager import PassReport
from mergec.compiler.pipeline import rewrite
from mergec.compiler.selection import select
from mergec.compiler.text import dump
from mergec.passes.merge_projections import MergeProjections
from mergec.runtime.core.spec import Vis
from mergec.runtime.core.structural import target_name
from tests.encoder_decoders import model_and_step
from tests.families import LAYERS, captured, random_decoder
from tests.merge_models import VOCAB, looks_back
from tests.passes.test_fix_attention import CALIBRATION, outputs

PASSES = ("fix_attention", "merge_projections")
# The products that it makes have siblings.
ASKED = CompileConfig(enable=PASSES, calibration=CALIBRATION, disable=("merge_siblings",))


def merged(step: Captured) -> dict[str, PassReport]:
    return {report.name: report for report in rewrite(step, ASKED)}


def norms(step: Captured) -> int:
    names = [target_name(n.target) for n in step.graph_module.graph.nodes if n.op != "output"]
    return sum(name in ("mpc.rms_norm", "mpc.layer_norm") for name in names)


def test_exact_where_all_rows_have_the_same_statistics() -> None:
    """Attention depends on positions alone, and rows before the MLP have mean 0 and deviation 1."""
    model = looks_back()
    step = capture(model)
    reports = merged(step)
    assert reports["merge_projections"].sites == 1
    assert norms(step) == 2, "the first and the final one"
    ids = torch.randint(0, VOCAB, (1, 12), generator=torch.Generator().manual_seed(2))
    for length, cut in ((6, 6), (9, 4), (12, 12)):
        with torch.no_grad():
            wanted = model(input_ids=ids[:, :length]).logits[:, -1:]
        assert float((outputs(step, ids[:, :length], cut) - wanted).abs().max()) < 1e-8


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_the_norm_between_is_gone(family: str) -> None:
    step = captured(family)
    reports = merged(step)
    assert reports["merge_projections"].sites == LAYERS
    assert norms(step) == LAYERS + 1
    made = {name: vis for name, vis in step.constants.items() if "merged_weight" in name}
    assert len(made) == LAYERS * (2 if family == "llama" else 1)
    assert set(made.values()) == {Vis.SERVER}
    text = dump(step.graph_module)
    assert merged(step)["merge_projections"].sites == 0
    assert dump(step.graph_module) == text


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma2", "not added directly to the residual stream"),
        ("falcon", "not followed by one norm and an MLP"),
        ("gptj", "not followed by one norm and an MLP"),
    ],
)
def test_near_misses(family: str, reason: str) -> None:
    """A norm stands between; attention and MLP are parallel."""
    step = captured(family)
    report = merged(step)["merge_projections"]
    assert report.sites == 0
    assert len(report.skips) == LAYERS
    assert all(reason in str(skip) for skip in report.skips)


def test_attention_that_is_not_constant_stays() -> None:
    step, plain = captured("gpt2"), captured("gpt2")
    rewrite(step, CompileConfig(enable=("merge_projections",)))
    rewrite(plain, CompileConfig())
    assert dump(step.graph_module) == dump(plain.graph_module)


def test_resent_hidden_states_count() -> None:
    """They are far longer here than the rows of the embedding."""
    sizes = {}
    for preset in ("merge-mm", "merge"):
        model = random_decoder("llama")
        with torch.no_grad():
            model.model.embed_tokens.weight *= 1e-3
            model.model.layers[0].self_attn.o_proj.weight *= 1e-3
        step = capture(model)
        rewrite(step, CompileConfig(preset=preset, disable=("merge_siblings",)))
        found = [v for n, (v, _) in step.tensors().items() if "layers.0" in n and "residual" in n]
        sizes[preset] = float(found[0].abs().max())
    assert sizes["merge"] < sizes["merge-mm"] / 10


# --------------------------------------------------------------------------------- encoder-decoders


@pytest.mark.parametrize(
    ("family", "sites", "left", "reason"),
    [
        # Before the values of encoder and self-attention; after encoder and decoder.
        ("t5", 4, 2 * LAYERS + 2, None),
        # After each of the three MLPs' sums and self-attention, and those of the embeddings.
        ("bart", 4, 3 * LAYERS + 2, "not followed by one norm and an MLP"),
    ],
)
def test_encoder_decoders(family: str, sites: int, left: int, reason: str | None) -> None:
    """T5 merges both projections of a decoder's layer; BART's residual stream leaves its norms."""
    step = model_and_step(family)[1].copy()
    report = merged(step)["merge_projections"]
    assert report.sites == sites
    assert norms(step) == left
    assert [skip.reason for skip in report.skips] == [f"it is {reason}"] * (LAYERS if reason else 0)
    made = {name for name in step.constants if "merged_weight" in name}
    both = {name for name in made if name.endswith("_2")}
    assert len(made) - len(both) == sites
    assert len(both) == (LAYERS if family == "t5" else 0)
    text = dump(step.graph_module)
    assert merged(step)["merge_projections"].sites == 0
    assert dump(step.graph_module) == text


class Loosened(MergeProjections):
    """Replaces the norms in between, and merges nothing."""

    def run(self, graph_module: fx.GraphModule) -> int:
        return self.loosen(graph_module)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_merged_products_are_those_of_constant_norms(family: str) -> None:
    """The same graph with affine maps in place of the norms, and no product merged."""
    config = replace(ASKED, check_passes=False)
    whole, parts = (model_and_step(family)[1].copy() for _ in range(2))
    rewrite(whole, config)
    rewrite(
        parts, config, passes=[Loosened if p is MergeProjections else p for p in select(config)]
    )
    source, ids = torch.tensor([[5, 9, 33, 2, 71]]), torch.tensor([[0, 4, 7]])
    given = [torch.zeros(1, 4, 0, 4) for _ in whole.inputs[2:]]
    with torch.no_grad():
        found = whole.graph_module(source, ids, *given)
        wanted = parts.graph_module(source, ids, *given)
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).abs().max()) < 1e-4 * max(1.0, float(b.abs().max()))
