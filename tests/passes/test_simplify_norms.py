from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from compiler.capture import capture
from compiler.config import CompileConfig
from compiler.ir import dump
from compiler.pipeline import rewrite
from runtime.spec import Vis
from runtime.structural import target_name

VOCAB, WIDTH = 11, 8
CONFIG = CompileConfig(enable=("simplify_norms",))
IDS = torch.arange(VOCAB)[None]


class Decoder(nn.Module):
    """Embedding, norm, head."""

    def __init__(self, norm: nn.Module, table: torch.Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.norm = norm
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            if table is not None:
                self.embed.weight.copy_(table)
        self.double()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(ids)))


def alike() -> torch.Tensor:
    """Rows that have one mean and one deviation, and nothing else in common."""
    rows = torch.tensor([2.0] * 4 + [-1.0] * 4)
    return torch.stack([rows[torch.randperm(WIDTH)] for _ in range(VOCAB)]) * 3.0


NORMS = {
    "layer": lambda: nn.LayerNorm(WIDTH),
    "layer without gain": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
    "layer without bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "rms": lambda: nn.RMSNorm(WIDTH, eps=1e-6),
}


@pytest.mark.parametrize("kind", NORMS)
def test_exact_where_all_rows_have_the_same_statistics(kind: str) -> None:
    model = Decoder(NORMS[kind](), alike())
    step = capture(model)
    reports = {report.name: report for report in rewrite(step, CONFIG)}
    assert reports["simplify_norms"].sites == 1
    names = {target_name(n.target) for n in step.graph_module.graph.nodes if n.op != "output"}
    assert "mpc.mul" in names
    assert not names & {"mpc.layer_norm", "mpc.rms_norm"}
    assert ("mpc.add" in names) == kind.startswith("layer")
    with torch.no_grad():
        assert float((step.graph_module(IDS)[0] - model(IDS)).abs().max()) < 1e-9
    made = {name: vis for name, vis in step.constants.items() if ".gain" in name}
    assert set(made.values()) == {Vis.SERVER}


def test_the_gain_is_that_of_a_typical_row() -> None:
    model = Decoder(nn.RMSNorm(WIDTH, eps=0.0))
    with torch.no_grad():
        model.embed.weight[4] *= 1e6
    step = capture(model)
    rewrite(step, CONFIG)
    with torch.no_grad():
        typical = model.embed.weight[torch.arange(VOCAB) != 4]
        ratio = step.graph_module(IDS[:, :4])[0] / model(IDS[:, :4])
        roots = typical.square().mean(-1).sqrt()
    assert float(ratio.min()) > 0.3
    assert float(ratio.max()) < 3.0
    assert float(roots.max() / roots.min()) > 1.2


def test_near_misses() -> None:
    for norm in (nn.Identity(), nn.Linear(WIDTH, WIDTH)):
        step = capture(Decoder(copy.deepcopy(norm)))
        plain = capture(Decoder(copy.deepcopy(norm)))
        reports = {report.name: report for report in rewrite(step, CONFIG)}
        rewrite(plain, CompileConfig())
        assert reports["simplify_norms"].sites == 0
        assert dump(step.graph_module) == dump(plain.graph_module)
