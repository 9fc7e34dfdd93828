"""Windows of shares: which bits they hold, and which there are."""

from __future__ import annotations

import pytest
import torch

from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.protocols.compare import take_window
from mergec.runtime.protocols.opening import Cut
from tests.protocols.harness import integers, words


def test_window_of_high_bits_is_exact_up_to_one_unit() -> None:
    values = words(50_000, -(2**61), 2**61)
    simulation = Simulation()
    shares = integers(simulation, values)
    drop = 31
    total = sum(take_window(shares[p].share, drop) for p in (0, 1))
    error = total.long() - (values >> drop)
    # A borrow from the dropped bits costs one unit; modulo 2**32 the top is right.
    assert set(error.unique().tolist()) <= {0, -1}


def test_only_windows_that_lie_within_the_word() -> None:
    """Both ways to take a window: bits dropped before the opening, or after it."""
    share = words(3, -(2**63), 2**63 - 1)
    for drop in (0, 32):
        assert take_window(share, drop).dtype is torch.int32
        assert Cut(share, drop, drop).drop == drop
    for drop in (-1, 33):
        with pytest.raises(ValueError, match=f"the lowest {drop}"):
            take_window(share, drop)
        with pytest.raises(ValueError, match=f"begins at bit {drop}"):
            Cut(share, drop, drop)
