"""A tensor that is written part by part is a concatenation; other writes to parts are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.capture import capture

VOCAB, WIDTH, HALF = 23, 16, 8


class Decoder(nn.Module):
    """What `body` makes of the embedded tokens [1, N, 16], and a head."""

    def __init__(self, body: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.body = body

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(ids)))


def latent(x: torch.Tensor) -> torch.Tensor:
    """As in DeepSeek's keys; one part is expanded."""
    y = x.new_empty(*x.shape)
    y[..., :HALF].copy_(x[..., HALF:] * 2)
    y[..., HALF:].copy_(x[..., :1].expand(-1, -1, HALF))
    return y


def assigned(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    y[..., :3], y[..., 3:-4], y[..., -4:] = x[..., :3] + 1, x[..., 3:12] * 3, x[..., :4]
    return y * y.sum()


def colons(x: torch.Tensor) -> torch.Tensor:
    """All dimensions are cut, two of them as a whole; one part is broadcast."""
    y = torch.empty(1, x.shape[1], WIDTH)
    y[:, :, :HALF], y[:, :, HALF:] = x[..., :1], x[..., HALF:]
    return y


@pytest.mark.parametrize("body", [latent, assigned, colons])
def test_parts_in_order_are_joined(body: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = Decoder(body).eval()
    step = capture(model).graph_module
    called = [str(node.target) for node in step.graph.nodes]
    assert "aten.cat.default" in called
    assert "aten.copy_.default" not in called
    for ids in (torch.tensor([[3, 1, 4, 1, 5]]), torch.tensor([[9]])):
        with torch.no_grad():
            assert torch.equal(step(ids)[0], model(ids))


def gap(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    y[..., :4], y[..., 5:] = x[..., :4], x[..., 5:]
    return y


def short(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    y[..., :HALF] = x[..., :HALF]
    return y


def overlap(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    y[..., :9], y[..., HALF:] = x[..., :9], x[..., HALF:]
    return y


def steps(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    y[..., 0::2], y[..., 1::2] = x[..., :HALF], x[..., HALF:]
    return y


def two_dimensions(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    y[:, :1], y[..., HALF:] = x[:, :1], x[..., HALF:]
    return y


def read_between(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    y[..., :HALF] = x[..., :HALF]
    early = y.sum()
    y[..., HALF:] = x[..., HALF:]
    return y + early


def broadcast(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    y[..., :HALF].copy_(x[..., :HALF])
    y[..., HALF:].copy_(x[..., :1])
    return y


def another_type(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    y[..., :HALF], y[..., HALF:] = x[..., :HALF], x[..., HALF:].half()
    return y


def not_new(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    y[..., :HALF], y[..., HALF:] = x[..., HALF:], x[..., :HALF]
    return y


@pytest.mark.parametrize(
    "body",
    [
        gap, short, overlap, steps, two_dimensions, read_between, broadcast, another_type, not_new,
    ],
)  # fmt: skip
def test_other_writes_to_parts_are_refused(body: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(CompileError, match="read through another name later; join the parts by"):
        capture(Decoder(body).eval())
