"""xIELU as transformers writes it, and a decoder with it; its coefficients stay with the server."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from mergec.compiler.config import CompileConfig
from mergec.compiler.driver import compile_decoder
from mergec.compiler.program import Program
from mergec.runtime.core.spec import Vis
from tests.passes.harness import Graph, leaves, normal
from tests.session import play

P, N, B = torch.tensor([0.7]), torch.tensor([1.1]), torch.tensor(0.5)
PROMPT = [5, 17, 3, 88, 41]
EPS = 1e-5
"""Below eps the two forms differ by at most n times 10**-6."""


def xielu(m: Any, x: torch.Tensor, eps: float = -1e-6) -> torch.Tensor:
    cut = torch.min(x, torch.tensor(eps, dtype=x.dtype))
    return torch.where(
        x > 0, m.p * x * x + m.b * x, (torch.expm1(cut) - x) * m.n + m.b * x
    )  # fmt: skip


class Gate(nn.Module):
    """A decoder whose only activation is that of transformers."""

    def __init__(self) -> None:
        from transformers.activations import XIELUActivation

        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(97, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.act = XIELUActivation(alpha_p_init=0.7, alpha_n_init=1.3, dtype=torch.float32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        return (x + self.down(self.act(self.up(2 * x)))) @ self.embedding.weight.T


@functools.cache
def compiled() -> tuple[Gate, Program]:
    model = Gate().eval()
    return model, compile_decoder(model, config=CompileConfig(max_length=16, logit_noise=0.0))


def test_either_side_of_zero() -> None:
    x = torch.cat(
        [normal(2, 3, 8) * 3.0, torch.tensor([0.0, -1e-3, 1e-3, -20.0]).expand(2, 3, 4)], -1
    )
    graph = Graph(xielu, x, p=P, n=N, b=B)
    graph.run("remove_noops")
    assert graph.run("fuse_xielu") == 1
    assert {"mpc.glu", "mpc.elu"} <= set(graph.ops)
    assert "aten.where.self" not in graph.ops
    (before,), (after,) = graph.before, graph()
    assert float((before - after).abs().max()) < EPS


def test_near_miss_an_eps_that_matters() -> None:
    graph = Graph(functools.partial(xielu, eps=-0.5), normal(2, 3, 8), p=P, n=N, b=B)
    leaves(graph, "remove_noops", "fuse_xielu", reason="tiny eps")


def test_near_miss_two_inputs() -> None:
    def body(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        cut = torch.min(x, torch.tensor(-1e-6, dtype=x.dtype))
        below = (torch.expm1(cut) - x) * m.n + m.b * x
        return torch.where(x > 0, m.p * y * y + m.b * y, below)

    graph = Graph(body, normal(2, 3, 8), normal(2, 3, 8, seed=1), p=P, n=N, b=B)
    leaves(graph, "remove_noops", "fuse_xielu", reason="one coefficient each")


def test_private_logits_are_the_models() -> None:
    model, program = compiled()
    (step,) = play(program.roles, [PROMPT])
    with torch.no_grad():
        wanted = model(torch.tensor([PROMPT]))[0, -1].double()
    assert float((step.logits.reshape(-1, 97)[-1] - wanted).abs().max()) < 2e-3


def test_the_coefficients_stay_with_the_server() -> None:
    model, program = compiled()
    act = model.act
    alphas = torch.cat(
        [
            nn.functional.softplus(act.alpha_p),
            act.beta + nn.functional.softplus(act.alpha_n),
            act.alpha_p,
            act.alpha_n,
        ]
    ).tolist()
    held = {spec.name: spec.vis for spec in program.roles["server"].constants}
    assert {vis for name, vis in held.items() if "act" in name} == {Vis.SERVER}
    for role in ("client", "dealer"):
        assert not any("act" in name for name in program.roles[role].tensors)
    for instruction in program.roles["client"].instructions:
        for value in (*instruction.args, *instruction.kwargs.values()):
            if isinstance(value, float):
                assert all(value != pytest.approx(alpha) for alpha in alphas)
