"""A program's max_length is never more than the model can take, and its graph is the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mergec.compiler.config import DEFAULT_LENGTH, CompileConfig
from mergec.compiler.driver import compile_decoder
from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.calibration import calibration, longest
from mergec.compiler.frontend.capture import Captured, capture
from mergec.compiler.frontend.lengths import declared_limit
from tests.families import error, random_decoder, tokens

VOCAB, WIDTH, ROWS = 48, 16, 32


class Own(nn.Module):
    """A decoder without a cache; `change` is what a case does to its hidden state."""

    def __init__(self, change: Callable[[Any, torch.Tensor, int], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.places = nn.Embedding(ROWS, WIDTH)
        self.register_buffer("table", torch.randn(1, ROWS, WIDTH))
        self.register_buffer("position_ids", torch.arange(ROWS)[None])
        self.change = change

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.change(self, self.embed(ids), ids.shape[1]))


def asserts(model: Any, x: torch.Tensor, n: int) -> torch.Tensor:
    assert n <= ROWS, "too long"
    return x


def raises(model: Any, x: torch.Tensor, n: int) -> torch.Tensor:
    if n > ROWS:
        raise ValueError("too long")
    return x


def slices(model: Any, x: torch.Tensor, n: int) -> torch.Tensor:
    return x + model.table[:, :n]


def narrows(model: Any, x: torch.Tensor, n: int) -> torch.Tensor:
    return x + model.table.narrow(1, 0, n)


def looks_up(model: Any, x: torch.Tensor, n: int) -> torch.Tensor:
    return x + model.places(torch.arange(n))


def looks_up_buffered(model: Any, x: torch.Tensor, n: int) -> torch.Tensor:
    """The buffer has the name of an input, and more rows than a step has tokens."""
    return x + model.places(model.position_ids[:, :n])


def indexes(model: Any, x: torch.Tensor, n: int) -> torch.Tensor:
    return x + model.table[0][torch.arange(n)]


def looks_up_further_on(model: Any, x: torch.Tensor, n: int) -> torch.Tensor:
    return x + model.places(torch.arange(n) + 2)


def looks_up_within(model: Any, x: torch.Tensor, n: int) -> torch.Tensor:
    return x + model.places(torch.arange(n).clamp(max=ROWS - 1))


def scales(model: Any, x: torch.Tensor, n: int) -> torch.Tensor:
    return x * (n // 4 + 1)


def limit_by(change: Any) -> Captured:
    return capture(Own(change))


@pytest.mark.parametrize(
    ("change", "length", "reason"),
    [
        (asserts, ROWS, "on 33 tokens it fails: too long"),
        (raises, ROWS, "on 33 tokens it fails: too long"),
        (slices, ROWS, "on 33 tokens it fails: The size of tensor a"),
        (narrows, ROWS, "on 33 tokens it fails"),
        (looks_up, ROWS, "places.weight is a table of 32x16"),
        (looks_up_buffered, ROWS, "on 33 tokens it fails"),
        (indexes, ROWS, "table is a table of 1x32x16"),
        (looks_up_further_on, ROWS - 2, "places.weight is a table of 32x16"),
    ],
)
def test_a_models_limit_is_found(change: Any, length: int, reason: str) -> None:
    step = limit_by(change)
    assert step.limit is not None
    assert step.branch is None
    assert step.limit.length == step.max_length == longest(CompileConfig(), step) == length
    assert reason in step.limit.reason
    assert longest(CompileConfig(max_length=8), step) == 8
    with pytest.raises(CompileError, match=f"at most {length} tokens: .*; ask for {length} or"):
        longest(CompileConfig(max_length=length + 1), step)
    ids = tokens(length) % VOCAB
    with torch.no_grad():
        assert error(step.graph_module(ids)[0], Own(change)(ids)) < 1e-5


@pytest.mark.parametrize("change", [looks_up_within, scales])
def test_a_length_without_a_limit(change: Any) -> None:
    step = limit_by(change)
    assert (step.limit, step.branch) == (None, None)
    assert longest(CompileConfig(), step) == DEFAULT_LENGTH


def flips(condition: Callable[[int], bool]) -> Any:
    def change(model: Any, x: torch.Tensor, n: int) -> torch.Tensor:
        if condition(n):
            x = -x
        return x

    return change


@pytest.mark.parametrize(
    ("condition", "length"),
    [
        (lambda n: n > 16, 16),
        (lambda n: n >= 10, 9),
        (lambda n: n == 7, 6),
        (lambda n: n // 5 > 1, 9),
    ],
)
def test_a_branch_on_the_length_is_refused(condition: Any, length: int) -> None:
    model = Own(flips(condition))
    step = capture(model)
    assert step.branch is not None
    assert step.branch.length == length
    with pytest.raises(CompileError, match=rf"test_lengths.py:\d+\).*max_length={length} or less"):
        longest(CompileConfig(), step)
    with pytest.raises(CompileError, match="computes something else"):
        longest(CompileConfig(max_length=length + 1), step)
    short = CompileConfig(max_length=length)
    assert longest(short, step) == length
    assert max(map(len, calibration(short, step))) <= length


@pytest.mark.parametrize(
    "condition", [lambda n: n == 1, lambda n: n > 1, lambda n: n >= 2, lambda n: n % 2 == 0]
)
def test_a_branch_on_short_texts_is_refused(condition: Any) -> None:
    with pytest.raises(CompileError, match=r"token.* something else .*test_lengths.py:\d+"):
        capture(Own(flips(condition)))


def test_a_branch_that_changes_nothing_is_accepted() -> None:
    def masks(model: Any, x: torch.Tensor, n: int) -> torch.Tensor:
        if n > 1:
            x = x + torch.zeros(n, 1).triu(1)
        return x

    assert limit_by(masks).max_length is None


def test_a_branch_that_is_too_long_to_try_is_where_the_graph_ends() -> None:
    step = limit_by(flips(lambda n: n > 2000))
    assert longest(CompileConfig(), step) == DEFAULT_LENGTH
    with pytest.raises(CompileError, match="captured for at most 2000 tokens"):
        longest(CompileConfig(max_length=2001), step)


def test_a_model_that_takes_no_single_token_is_refused() -> None:
    def two(model: Any, x: torch.Tensor, n: int) -> torch.Tensor:
        if n < 2:
            raise ValueError("too short")
        return x

    with pytest.raises(CompileError, match="fails on 1 token: too short"):
        limit_by(two)


def test_the_module_of_a_branch_is_named() -> None:
    class Part(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.shape[1] > 16 else x

    class Whole(Own):
        def __init__(self) -> None:
            super().__init__(lambda model, x, n: model.parts[0](x))
            self.parts = nn.ModuleList([Part(), Part()])

    branch = capture(Whole()).branch
    assert branch is not None
    assert "in parts.0)" in branch.reason


def test_a_lower_limit_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    program = compile_decoder(Own(looks_up), progress=said.append)
    assert program.manifest.max_length == ROWS
    assert any(line.startswith(f"max_length is {ROWS}, the most") for line in said)


class Settings:
    """A configuration with attributes."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        (Settings(max_position_embeddings=24), 24),
        (Settings(max_seq_len=24), 24),
        (Settings(max_target_positions=24, max_source_positions=8), 24),
        (Settings(n_ctx=24), 24),
        (Settings(n_positions=24, n_ctx=8), 24),
        (Settings(get_text_config=lambda decoder: Settings(n_positions=24)), 24),
        (Settings(max_position_embeddings=None), None),
        (Settings(max_position_embeddings=-1), None),
        (None, None),
    ],
)
def test_a_configuration_states_a_limit(settings: Any, length: int | None) -> None:
    bound = declared_limit(settings)
    assert (bound.length if bound else None) == length


def rotary(**settings: Any) -> Any:
    return {"rope_parameters": {"rope_theta": 1e4, **settings}}


def test_rotary_frequencies_that_change_beyond_the_limit() -> None:
    """Dynamic scaling begins where the configuration's positions end."""
    model = random_decoder("llama", **rotary(rope_type="dynamic", factor=4.0))
    step = capture(model)
    assert (step.max_length, step.branch) == (64, None)
    assert model.model.rotary_emb.rope_type == "dynamic"
    ids, empty = tokens(), [torch.zeros(1, 2, 0, 8, dtype=torch.float64)] * 4
    with torch.no_grad():
        wanted = model(ids).logits[:, -1:]
        assert error(step.graph_module(ids, *empty)[0], wanted) < 1e-9


def test_rotary_frequencies_that_change_within_the_limit() -> None:
    scaled = rotary(
        rope_type="longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4, factor=8.0,
        original_max_position_embeddings=8,
    )  # fmt: skip
    model = random_decoder("phi3", original_max_position_embeddings=8, **scaled)
    with torch.no_grad():
        model(tokens(20))  # leaves the long frequencies behind
    step = capture(model)
    assert step.branch is not None
    assert step.branch.length == 8
    with pytest.raises(CompileError, match=r"longrope.*max_length=8 or less"):
        longest(CompileConfig(), step)
    ids, empty = tokens(7), [torch.zeros(1, 4, 0, 8, dtype=torch.float64)] * 4
    with torch.no_grad():
        wanted = model(ids).logits[:, -1:]
        assert error(step.graph_module(ids, *empty)[0], wanted) < 1e-9
