"""Helpers that run a protocol at all three roles and combine the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Shared, Wide
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.protocols.wide import sum_wide


def integers(simulation: Simulation, values: torch.Tensor) -> list[Shared]:
    """Fresh shares of integers."""
    return simulation.share(values, 0)


def run(
    simulation: Simulation, build: Callable[[Context, int], Protocol]
) -> tuple[torch.Tensor, Cost]:
    """The sum of the two parties' results, and the cost of the run."""
    simulation.cost = Cost()
    client, server, dealer = simulation.run(build)
    assert dealer.is_meta and dealer.shape == client.shape
    return client + server, simulation.cost


def run_list(
    simulation: Simulation, build: Callable[[Context, int], Protocol]
) -> tuple[list[torch.Tensor], Cost]:
    """Like `run`, for protocols that return several shares."""
    simulation.cost = Cost()
    client, server, _ = simulation.run(build)
    return [a + b for a, b in zip(client, server, strict=True)], simulation.cost


def wide_value(client: Wide, server: Wide) -> torch.Tensor:
    """What shares modulo 2**128 stand for, in their units, as float64."""
    total = sum_wide((client.low, client.high), (server.low, server.high), client.frac)
    low = (total.low >> 1).double() * 2 + (total.low & 1)
    return total.high.double() * 2.0**64 + low + 2.0**64 * (total.low < 0)


def uniform_bytes(payloads: Sequence[torch.Tensor]) -> float:
    """Chi-square statistic of all bytes, in standard deviations from its mean."""
    raw = torch.cat([p.contiguous().view(-1).view(torch.uint8) for p in payloads])
    counts = torch.bincount(raw.long(), minlength=256).double()
    expected = len(raw) / 256
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - 255) / (2 * 255) ** 0.5


def words(count: int, low: int, high: int, seed: int = 0) -> torch.Tensor:
    """Seeded random int64 in [low, high)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (count,), generator=generator)
