from __future__ import annotations

import pytest
import torch

from mergec.compiler.config import CompileConfig
from mergec.compiler.frontend.capture import Captured, capture
from mergec.compiler.graph.manager import PassReport
from mergec.compiler.pipeline import rewrite
from mergec.compiler.text import dump
from mergec.runtime.core.spec import Vis
from mergec.runtime.core.structural import target_name
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
