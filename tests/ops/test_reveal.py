"""What the client is told of the logits, and what it is not."""

from __future__ import annotations

import pytest
import torch

from mergec.runtime.core.op import REGISTRY
from mergec.runtime.core.spec import CLIENT, DEALER, SERVER, Vis
from mergec.runtime.core.values import Shared, encode
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.ops import load_all

load_all()
LENGTH = 4096


@pytest.mark.parametrize("frac", [8, 16, 17, 32, 40, 48, 50, 54])
def test_the_client_sees_a_window_of_the_value(frac: int) -> None:
    """Ends of the range among them: of a share with more than 48 bits it is narrower."""
    end = 2.0 ** (15 if frac <= 48 else 63 - frac)
    x = (torch.rand(LENGTH, dtype=torch.float64) * 2 - 1) * end
    unit = 2.0 ** -min(frac, max(16, frac - 32))
    ends = [-end + unit, end - 2 * unit, 0.0, unit, -unit, -unit / 3]
    x[: len(ends)] = torch.tensor(ends, dtype=torch.float64)
    simulation = Simulation()
    views = simulation.share(x, frac)
    client, server, dealer = simulation.run(
        lambda ctx, party: REGISTRY["reveal"].protocol(ctx, views[party])
    )
    assert client.vis is server.vis is dealer.vis is Vis.CLIENT
    assert server.value.is_meta
    assert dealer.value.is_meta
    rounding = 2.0**-frac
    assert (client.value - x).abs().max() <= unit + rounding
    # No bit below the unit is shown.
    assert torch.equal(client.value, torch.round(client.value / unit) * unit)
    assert simulation.cost.online == 4 * LENGTH
    assert simulation.cost.rounds == 1


def test_what_is_sent_is_the_window_alone() -> None:
    """Shares that differ below the window give the same message."""
    frac, messages = 48, []
    words = encode(torch.tensor([1.5, -2.25], dtype=torch.float64), frac)
    for low in (0, 2**32 - 1):
        simulation = Simulation(record=True)
        views = [Shared(torch.zeros_like(words), frac)] * 3
        views[SERVER] = Shared(words + low, frac)
        views[DEALER] = Shared(torch.empty_like(words, device="meta"), frac)
        simulation.run(lambda ctx, party: REGISTRY["reveal"].protocol(ctx, views[party]))  # noqa: B023
        messages.append(simulation.transcript)
    assert CLIENT == 0
    (first,), (second,) = messages
    assert first.dtype is torch.int32
    assert torch.equal(first, second)
