from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mergec.compiler.config import CompileConfig
from mergec.compiler.frontend.capture import capture
from mergec.compiler.pipeline import rewrite
from mergec.compiler.text import dump
from mergec.runtime.core.spec import Vis
from mergec.runtime.core.structural import target_name

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
    """Rows that have the same mean and deviation, and nothing else in common."""
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


def nearest(rows: torch.Tensor) -> tuple[float, float]:
    """Gain and shift that bring rows nearest to their LayerNorm."""
    wanted = nn.functional.layer_norm(rows, (WIDTH,), eps=1e-5)
    terms = torch.stack([rows.reshape(-1), torch.ones(rows.numel(), dtype=rows.dtype)], 1)
    gain, shift = torch.linalg.lstsq(terms, wanted.reshape(-1, 1)).solution.reshape(-1).tolist()
    return gain, shift


def test_no_other_constants_are_nearer() -> None:
    model = Decoder(nn.LayerNorm(WIDTH, elementwise_affine=False))
    step = capture(model)
    rewrite(step, CompileConfig(enable=("simplify_norms",), calibration=((0, 3, 4, 7),)))
    gain, shift = nearest(model.embed.weight[[0, 3, 4, 7]].detach())
    with torch.no_grad():
        wanted = model.head(gain * model.embed(IDS[:, 5:6]) + shift)
    assert float((step.graph_module(IDS[:, 5:6])[0] - wanted).abs().max()) < 1e-4


class Gated(nn.Module):
    """Layers that add a term quadratic in a norm's result."""

    def __init__(self, table: torch.Tensor, layers: int) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.embed = nn.Embedding.from_pretrained(table, freeze=False)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH, eps=1e-6) for _ in range(layers))
        self.gates = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCAB)
        self.double()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for norm, gate in zip(self.norms, self.gates, strict=True):
            y = norm(x)
            x = x + nn.functional.silu(gate(y)) * y
        return self.head(x)


def test_a_row_that_is_far_larger_does_not_grow_from_layer_to_layer() -> None:
    """With each norm's gain taken from a typical row, it would reach 1e300."""
    table = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(1))
    table[4] *= 1e3
    model = Gated(table, layers=12)
    step = capture(model)
    ids = tuple(range(VOCAB))
    reports = rewrite(step, CompileConfig(enable=("simplify_norms",), calibration=(ids,)))
    assert next(r for r in reports if r.name == "simplify_norms").sites == 12
    with torch.no_grad():
        largest = float(model(IDS[:, 4:5]).abs().max())
        found = float(step.graph_module(IDS[:, 4:5])[0].abs().max())
    assert largest / 4 < found < 4 * largest


def test_near_misses() -> None:
    for norm in (nn.Identity(), nn.Linear(WIDTH, WIDTH)):
        step = capture(Decoder(copy.deepcopy(norm)))
        plain = capture(Decoder(copy.deepcopy(norm)))
        reports = {report.name: report for report in rewrite(step, CONFIG)}
        rewrite(plain, CompileConfig())
        assert reports["simplify_norms"].sites == 0
        assert dump(step.graph_module) == dump(plain.graph_module)
