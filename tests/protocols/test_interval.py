"""Piecewise polynomials: the overlapping windows make the unknown borrow harmless."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergec.runtime.core.spec import CLIENT, SERVER
from mergec.runtime.correlations.dpf import Generator, Keys
from mergec.runtime.correlations.prg import Prg, new_seed
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.kernels.aes import LANES
from mergec.runtime.protocols.interval import (
    evaluate,
    evaluate_by_instructions,
    evaluate_by_library,
    evaluate_cost,
    fit,
    fit_finely,
)
from tests.protocols.harness import run, words


@pytest.mark.parametrize("step_bits", [6, 9])
def test_every_value_of_a_small_domain(step_bits: int) -> None:
    """All x in the table's domain, each under masks that produce every borrow."""
    windows, unit = 16, 8
    table = fit(np.sin, unit, -(4 << step_bits), windows, step_bits, out_frac=40)
    domain = torch.arange(table.start, table.start + (windows - 1) * 2**step_bits + 1)
    simulation = Simulation()

    def protocol(ctx, p):
        yield from ()
        mask = ctx.mask(domain.shape, torch.int32)
        masks[p] = mask
        opened = domain.to(torch.int32) + masks[2]
        return evaluate(ctx, opened if p < 2 else opened.to("meta"), mask, table)

    masks: dict[int, torch.Tensor] = {}
    worst = 0.0
    for _ in range(5):
        # The dealer runs first, so that its mask exists when the parties look up.
        result, cost = run(simulation, protocol)
        error = result.double() * 2.0**-40 - torch.sin(domain.double() * 2.0**-unit)
        worst = max(worst, float(error.abs().max()))
        assert cost == evaluate_cost(len(domain), table)
    # The cubic's error on a window of width h and the one before: h**4 / 192 of the 4th derivative.
    step = 2.0 ** (step_bits - unit)
    assert worst < step**4 / 192 * 1.2 + 2**-30


@pytest.mark.parametrize("make", [fit, fit_finely])
@pytest.mark.parametrize("drop", [0, 2])
def test_no_cubics_are_closer_on_a_window_and_the_one_before(make: Any, drop: int) -> None:
    """Of all cubics the best is h**4 / 192 of the 4th derivative off, on a window of width h."""
    windows, unit, step = 16, 10, 8
    table = make(np.sin, unit, -(3 << unit), windows, step, 60, drop)
    begin = (table.start + np.arange(windows)[:, None] * 2**step) * 2.0**-unit
    place = np.linspace(-1, 1, 2001)
    powers = (place * 2.0 ** (step - drop)) ** np.arange(4)[:, None]
    found = table.coefficients.astype(float) @ powers * 2.0**-60
    size = 2.0 ** (step - unit)
    assert np.abs(found - np.sin(begin + place * size)).max() < size**4 / 192


def test_more_elements_than_one_piece_holds() -> None:
    table = fit(np.cos, 16, 0, 8, 14, out_frac=60)
    values = words(10_000, 0, 7 * 2**14)
    masks: dict[int, torch.Tensor] = {}
    simulation = Simulation()

    def protocol(ctx, p):
        yield from ()
        masks[p] = ctx.mask(values.shape, torch.int32)
        opened = values.to(torch.int32) + masks[2]
        return evaluate(ctx, opened if p < 2 else opened.to("meta"), masks[p], table)

    result, _ = run(simulation, protocol)
    error = result.double() * 2.0**-60 - torch.cos(values.double() * 2.0**-16)
    assert error.abs().max() < 3e-5


def test_dropped_bits_cost_at_most_one_unit_of_what_is_left() -> None:
    table = fit(lambda x: x, 16, 0, 8, 18, out_frac=40, drop=4)
    values = words(5_000, 0, 7 * 2**18)
    masks: dict[int, torch.Tensor] = {}
    simulation = Simulation()

    def protocol(ctx, p):
        yield from ()
        masks[p] = ctx.mask(values.shape, torch.int32)
        opened = values.to(torch.int32) + masks[2]
        return evaluate(ctx, opened if p < 2 else opened.to("meta"), masks[p], table)

    result, _ = run(simulation, protocol)
    error = result.double() * 2.0**-40 - values.double() * 2.0**-16
    assert error.abs().max() <= 2.0**-11


@pytest.mark.skipif(not LANES, reason="this processor has no instructions for AES")
@pytest.mark.parametrize("count", [1, 3, 131])
@pytest.mark.parametrize("party", [CLIENT, SERVER])
def test_instructions_and_library_grow_the_same_trees(party: int, count: int) -> None:
    """Keys that belong to no table: whatever they expand to must be equal bit for bit."""
    table = fit(np.tanh, 16, -(2**19), 64, 14, 40, drop=2)
    generator = Generator(2)
    prg = Prg(new_seed())
    roots, corrections, points = (
        prg.read(8 * count * each).view(np.uint64).reshape(count, each) for each in (2, 16, 1)
    )
    keys, points = Keys(roots, corrections), points.view(np.int64)[:, 0]
    grown, expected = np.empty(count, np.int64), np.empty(count, np.int64)
    evaluate_by_library(points, keys, table, party, generator, expected)
    evaluate_by_instructions(points, keys, table, party, generator, grown)
    assert np.array_equal(grown, expected)
    assert generator.round_keys.shape == (4, 11, 2 * LANES)


@pytest.mark.slow
@pytest.mark.parametrize("missing", [["vaes"], ["avx512f"], ["aes"]])
def test_processors_that_lack_instructions(missing: list[str], tmp_path: Path) -> None:
    """Run the tests of all kernels in a process that assumes a processor with fewer features."""
    here = Path(__file__)
    others = here.with_name("test_octave.py"), here.parents[1] / "test_dpf.py"
    files = [str(file) for file in (here, *others)]
    script = (
        "import sys, llvmlite.binding as binding, pytest\n"
        "features = binding.get_host_cpu_features()\n"
        f"features |= dict.fromkeys({missing}, False)\n"
        "binding.get_host_cpu_features = lambda: features\n"
        f"sys.exit(pytest.main(['-q', '-m', 'not slow', '-p', 'no:cacheprovider', *{files}]))"
    )
    # Kernels of another width must not be read from the cache, or written to it.
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout
