"""All ops without a protocol are reported together, grouped by kind, before anything runs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from mergec.compiler.config import CompileConfig
from mergec.compiler.driver import compile_decoder
from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.capture import capture
from mergec.compiler.graph.verify import verify_dialect
from mergec.compiler.pipeline import to_dialect
from tests.conftest import Golden
from tests.families import VOCAB, WIDTH
from tests.passes.harness import Graph, leaves, normal


class Mixer(nn.Module):
    """Calls functions without a protocol; one is a composition of functions that have one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ordered, _ = torch.sort(x, -1)
        best = torch.topk(x, 4, -1).values
        x = ordered + best.sum(-1, keepdim=True)
        return torch.erfinv(torch.addcmul(x, x, ordered, value=0.5))


class Decoder(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Mixer() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(torch.linalg.cross(x[..., :3], x[..., 3:6])[..., :1] + x)


def message(layers: int) -> str:
    """The error for the decoder, without the line numbers of this file."""
    with pytest.raises(CompileError) as caught:
        compile_decoder(Decoder(layers))
    assert len(caught.value.nodes) == 4 * layers + 1
    return re.sub(r"test_verify\.py:\d+", "test_verify.py", str(caught.value)) + "\n"


@pytest.mark.parametrize("layers", [1, 2, pytest.param(30, marks=pytest.mark.slow)])
def test_offenders_are_shown_once_for_all_layers(layers: int, golden: Golden) -> None:
    golden(f"errors/unlowerable_{layers}.txt", message(layers))


def test_a_size_that_depends_on_a_secret() -> None:
    """As in a mixture of experts: only some rows go on, and nobody may know how many."""

    class Chooses(Decoder):
        def forward(self, ids: torch.Tensor) -> Any:
            x = self.embed(ids)
            y = torch.zeros_like(x)
            chosen = x.argmax(-1) == 1
            y[chosen] = x[chosen]
            return self.head(y)

    with pytest.raises(CompileError, match=r"index_put_.default has no protocol") as caught:
        compile_decoder(Chooses(0), config=CompileConfig(max_length=16))
    assert all(node.meta["source"].startswith("test_verify.py") for node in caught.value.nodes)


@pytest.mark.parametrize(
    "look_up",
    [
        lambda table, ids: table[ids],
        lambda table, ids: torch.gather(table[None], 1, ids),
        lambda table, ids: table.index_select(0, ids[0])[None],
    ],
)
def test_a_look_up_by_a_secret_that_is_no_embedding(look_up: Any) -> None:
    """It would move each party's share by a number that one of them does not have."""

    class Looks(Decoder):
        def __init__(self) -> None:
            super().__init__(0)
            self.register_buffer("table", torch.randn(VOCAB))

        def forward(self, ids: torch.Tensor) -> Any:
            return self.head(self.embed(ids) * look_up(self.table, ids)[..., None])

    words = r"by the value of %(input_ids|select), .*embedding"
    with pytest.raises(CompileError, match=words) as caught:
        compile_decoder(Looks(), config=CompileConfig(max_length=16))
    assert len(caught.value.nodes) == 1


def test_an_operand_that_no_protocol_takes() -> None:
    """A matrix that the client alone knows, times a shared one."""

    class Compares(Decoder):
        def forward(self, ids: torch.Tensor) -> Any:
            return self.head((ids[:, :, None] == ids[:, None]).float() @ self.embed(ids))

    with pytest.raises(CompileError, match=r"could not run the program: 'matmul' \(mpc.matmul\)"):
        compile_decoder(Compares(0), config=CompileConfig(max_length=16))


def test_nothing_runs_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(*_: object) -> None:
        raise AssertionError("calibration ran")

    monkeypatch.setattr("mergec.compiler.pipeline.annotate_ranges", ran)
    with pytest.raises(CompileError):
        to_dialect(capture(Decoder()), CompileConfig())


def test_an_op_that_a_disabled_pass_would_have_made() -> None:
    from tests.families import random_decoder

    with pytest.raises(CompileError, match=r"5 ops .*(\n.*)*layer_norm"):
        to_dialect(capture(random_decoder("gpt2")), CompileConfig(disable=("fuse_layer_norm",)))


def test_a_result_that_nobody_learns() -> None:
    from tests.families import random_decoder

    with pytest.raises(
        CompileError, match=r"would not learn the result(\n.*)*let .* reveal_logits"
    ):
        to_dialect(capture(random_decoder("gpt2")), CompileConfig(disable=("reveal_logits",)))


def test_data_movement_and_public_arithmetic_pass() -> None:
    graph = Graph(
        lambda m, x: x.reshape(6).flip(0) if False else x.reshape(6)[None] + 0.0, normal(2, 3)
    )
    graph.run("arithmetic_to_dialect")
    verify_dialect(graph.module)
    public = Graph(lambda m, x: torch.cos(x) * 2.0, normal(2, 3), public=(0,))
    leaves(public, "arithmetic_to_dialect")
    verify_dialect(public.module)


def test_unknown_functions_of_public_values() -> None:
    graph = Graph(lambda m, x: torch.special.bessel_j0(x), normal(2, 3), public=(0,))
    with pytest.raises(CompileError, match="not a function that a program may call"):
        verify_dialect(graph.module)


@pytest.mark.parametrize("filled", [True, False])
def test_a_choice_by_a_public_mask_needs_a_pass_and_no_op(filled: bool) -> None:
    seen = torch.tensor([[True, False, True]])

    def body(m: Any, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        return x.masked_fill(seen, 2.0) if filled else torch.where(seen, x, 2 * x)

    graph = Graph(body, normal(2, 3), seen, public=(1,))
    graph.run("arithmetic_to_dialect")
    with pytest.raises(CompileError, match="its condition is public: write a pass"):
        verify_dialect(graph.module)
    secret = Graph(lambda m, x: torch.where(x > 0, x, 2 * x), normal(2, 3))
    secret.run("arithmetic_to_dialect")
    with pytest.raises(CompileError, match="needs an op with a protocol") as caught:
        verify_dialect(secret.module)
    assert "its condition is public" not in str(caught.value)


def test_a_view_of_a_name_that_no_pass_knows_needs_a_pass() -> None:
    graph = Graph(lambda m, x, y: x.view_as(y), normal(2, 3), normal(3, 2))
    with pytest.raises(CompileError, match="a pass that expresses it with ops that move data"):
        verify_dialect(graph.module)


def test_a_node_that_is_no_call() -> None:
    graph = Graph(lambda m, x: x.reshape(6), normal(2, 3))
    (node,) = [n for n in graph.module.graph.nodes if n.op == "call_function"]
    node.op, node.target = "call_method", "reshape"
    with pytest.raises(CompileError, match="a call_method node cannot be compiled"):
        verify_dialect(graph.module)
