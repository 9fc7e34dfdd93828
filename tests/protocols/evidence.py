"""Tests every protocol on random and adversarial inputs of its range; writes docs/evidence.md.

Usage: python -m tests.protocols.evidence [--count N] [--truncations N] [--only WORD]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import REGISTRY
from mergec.runtime.core.spec import FRACTIONAL_BITS, SERVER
from mergec.runtime.core.values import Masked, Shared
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.kernels.long import HALF_BITS, ONES, added
from mergec.runtime.ops import load_all
from mergec.runtime.ops.attention import _cap
from mergec.runtime.ops.glu import ACTIVATIONS, gated_table
from mergec.runtime.ops.log import OCTAVES as LOG
from mergec.runtime.ops.reciprocal import SPEC as RECIPROCAL
from mergec.runtime.ops.rsqrt import SPEC as RSQRT
from mergec.runtime.protocols.argmax import LOWEST, Candidates, best, plan_for
from mergec.runtime.protocols.broad import Broad, broad_exponentials
from mergec.runtime.protocols.deferred import Deferred, deferred_norm, deferred_norm_wide
from mergec.runtime.protocols.finer import HALVES, finer_products
from mergec.runtime.protocols.gated import OUT_FRAC, gated
from mergec.runtime.protocols.histogram import crest
from mergec.runtime.protocols.multiply import multiply
from mergec.runtime.protocols.normalize import SCALED_FRAC, RowNorm, normalize
from mergec.runtime.protocols.opening import Cut
from mergec.runtime.protocols.peak import peak
from mergec.runtime.protocols.power import COLUMN_BITS, Power, rounded_octaves
from mergec.runtime.protocols.probabilities import WAYS, probabilities
from mergec.runtime.protocols.rectify import rectify
from mergec.runtime.protocols.rows import EXP_FRAC, inverse
from mergec.runtime.protocols.saturate import Function, apply, function_input
from mergec.runtime.protocols.slots import top_slot
from mergec.runtime.protocols.squares import truncated_square
from mergec.runtime.protocols.top_k import top_k
from mergec.runtime.protocols.truncate import cut, truncate
from mergec.runtime.protocols.weights import linear, send, share_weight
from mergec.runtime.protocols.wide import narrow
from tests.protocols.harness import integers, run, words

TARGET = Path(__file__).resolve().parent.parent.parent / "docs" / "evidence.md"

UNIT = 2.0**-FRACTIONAL_BITS
RANGE = 2**30 - 1
"""Largest input of a scalar function, in units: just below 2**14."""
EDGE = 2**62 - 1

load_all()


@dataclass
class Outcome:
    """tried: results compared. failures: beyond the bound. worst: largest error / bound."""

    tried: int = 0
    failures: int = 0
    worst: float = 0.0

    def add(self, error: torch.Tensor, bound: torch.Tensor | float) -> None:
        """Record errors and their bounds; results that must be exact have a bound of 0."""
        allowed = torch.as_tensor(bound, dtype=torch.float64).expand(error.shape)
        error = error.abs().double()
        self.tried += error.numel()
        self.failures += int((error > allowed).sum())
        ratio = torch.where(error == 0, 0.0, error / allowed)
        self.worst = max(self.worst, float(ratio.max()))


@dataclass
class Check:
    """A protocol, its inputs, its promise, and the function that tests it.

    cost: relative time per input compared with other protocols; expensive ones get fewer inputs.
    """

    name: str
    inputs: str
    bound: str
    attempt: Callable[[int], Outcome]
    cost: int = 1


def pieces(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Sizes that add up to `count`, each with a seed for its inputs."""
    for seed, start in enumerate(range(0, count, size)):
        yield min(size, count - start), seed


def inputs(count: int, seed: int, low: int, high: int, near: list[int]) -> torch.Tensor:
    """Integers in [low, high]: a third uniform, a third of any magnitude, a third near `near`."""
    third = count // 3
    anywhere = words(third, low, high + 1, seed)
    sizes = torch.rand(third, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sized = torch.exp2(sizes * math.log2(max(-low, high) + 1)).to(torch.int64)
    sized[::2] *= -1
    left = count - 2 * third
    places = torch.tensor([p + d for p in (*near, 0, low, high) for d in (-1, 0, 1)])
    chosen = places[words(left, 0, len(places), seed + 1)]
    return torch.cat([anywhere, sized, chosen]).clamp(low, high)


# ---------------------------------------------------------------------------- exact protocols


def truncations(shift: int) -> Callable[[int], Outcome]:
    def attempt(count: int) -> Outcome:
        outcome = Outcome()
        for size, seed in pieces(count, 1 << 21):
            values = words(size, EDGE - 2**40, EDGE + 1, seed)
            values[::2] *= -1
            values[:1000] = inputs(1000, seed, -EDGE, EDGE, [2**shift, -(2**shift)])
            simulation = Simulation()
            shares = integers(simulation, values)
            result, _ = run(simulation, lambda ctx, p, s=shares: truncate(ctx, s[p].share, shift))
            # Rounded down or up; from the shift of a window on, half a unit more in either
            # direction.
            doubled = 2 * (result - (values >> shift)) - (1 if shift <= 32 else 0)
            outcome.add(doubled, 1.0 if shift <= 32 else 3.0)
        return outcome

    return attempt


def products(count: int) -> Outcome:
    outcome = Outcome()
    for size, seed in pieces(count, 1 << 18):
        x, y = (words(size, -(2**63), 2**63 - 1, 2 * seed + i) for i in (0, 1))
        simulation = Simulation()
        a, b = integers(simulation, x), integers(simulation, y)

        def protocol(ctx: Any, p: int, a: Any = a, b: Any = b) -> Any:
            (product,) = yield from multiply(ctx, (a[p].share, b[p].share))
            return product

        result, _ = run(simulation, protocol)
        outcome.add(result - x * y, 0.0)
    return outcome


def linear_layers(count: int) -> Outcome:
    outcome = Outcome()
    rows, features, results = 16, 64, 1 << 12
    for _, seed in pieces(count, rows * results):
        x = words(rows * features, -(2**63), 2**63 - 1, 2 * seed).reshape(rows, features)
        w = words(results * features, -(2**31), 2**31, 2 * seed + 1).reshape(results, features)
        narrow = w.to(torch.int32)
        simulation = Simulation()
        shares = integers(simulation, x)

        def protocol(ctx: Any, p: int, shares: Any = shares, narrow: Any = narrow) -> Any:
            held = narrow if p == SERVER else narrow.to("meta")
            weight = yield from share_weight(ctx, "w", held, 0)
            sent = yield from send(ctx, shares[p])
            return linear(ctx, sent, weight)

        result, _ = run(simulation, protocol)
        outcome.add(result - x @ w.T, 0.0)
    return outcome


THRESHOLDS = [0, 1, -1, 255, 256, -256, 2**16, 2**24, -(2**24), RANGE, -RANGE]


def rectified(count: int) -> Outcome:
    outcome = Outcome()
    for size, seed in pieces(count, 1 << 16):
        values = inputs(size, seed, -(2**30), RANGE, THRESHOLDS)
        simulation = Simulation()
        shares = integers(simulation, values)
        result, _ = run(simulation, lambda ctx, p, s=shares: rectify(ctx, cut(ctx, s[p].share, 0)))
        outcome.add(result - values.clamp(min=0), 0.0)
    return outcome


def squares(count: int) -> Outcome:
    outcome, shift = Outcome(), 31
    for size, seed in pieces(count, 1 << 18):
        values = inputs(size, seed, -EDGE, EDGE, [2**shift, -(2**shift), 2**46])
        simulation = Simulation()
        shares = integers(simulation, values)
        result, _ = run(
            simulation, lambda ctx, p, s=shares: truncated_square(ctx, s[p].share, shift)
        )
        low = (values >> shift) ** 2
        high = ((values >> shift) + 1) ** 2
        outcome.add(torch.minimum((result - low).abs(), (result - high).abs()), 0.0)
    return outcome


# ---------------------------------------------------------------------------- rows


def row_values(rows: int, length: int, seed: int, limit: int) -> torch.Tensor:
    """Random rows; every fourth has all its values within a few units, with ties."""
    values = words(rows * length, -limit, limit + 1, seed).reshape(rows, length)
    values[::4] = words(len(values[::4]) * length, -2, 3, seed).reshape(-1, length)
    values[1::4, :2] = torch.tensor([limit, -limit])
    return values


def near_maxima(
    find: Callable[..., Protocol], length: int, edge: int, reach: int
) -> Callable[[int], Outcome]:
    """Rows of values within `edge` of zero; the result is less than `reach` below the maximum."""

    def attempt(count: int) -> Outcome:
        outcome = Outcome()
        for size, seed in pieces(max(1, count // length), max(1, (1 << 17) // length)):
            values = row_values(size, length, seed, edge * 2**16)
            valid = torch.ones(values.shape, dtype=torch.bool)
            simulation = Simulation()
            shares = [s.share.to(torch.int32) for s in integers(simulation, values)]
            result, _ = run(simulation, lambda ctx, p, s=shares, v=valid: find(ctx, s[p], v))
            below = (values.max(1).values - result.long()) * UNIT
            # In [0, reach): half of it in either direction from the middle.
            outcome.add(below - reach / 2, reach / 2)
            outcome.tried += values.numel() - size
        return outcome

    return attempt


def largest(count: int) -> Outcome:
    outcome, length = Outcome(), 5_000
    for size, seed in pieces(max(1, count // length), 20):
        keys = row_values(size, length, seed, -LOWEST - 1)
        simulation = Simulation()
        shares = [s.share.to(torch.int32) for s in integers(simulation, keys)]
        plan = plan_for(length, 1)
        client, server, _ = simulation.run(
            lambda ctx, p, s=shares, plan=plan: best(ctx, Candidates(s[p]), 1, plan)
        )
        labels = (client.labels + server.labels)[:, 0].long()
        outcome.add(labels - keys.argmax(1), 0.0)
        outcome.tried += keys.numel() - size
    return outcome


def chosen(count: int) -> Outcome:
    outcome, length, k = Outcome(), 64, 8
    for size, seed in pieces(max(1, count // length), 100):
        keys = row_values(size, length, seed, -LOWEST - 1)
        simulation = Simulation()
        shares = [Cut(s.share.to(torch.int32)) for s in integers(simulation, keys)]
        found, _ = run(simulation, lambda ctx, p, s=shares: top_k(ctx, s[p], k, 0))
        best_first = keys.sort(dim=1, descending=True, stable=True).indices
        outcome.add(found - torch.zeros_like(keys).scatter(1, best_first[:, :k], 1), 0.0)
    return outcome


def softmaxes(length: int) -> Callable[[int], Outcome]:
    def attempt(count: int) -> Outcome:
        outcome, softmax = Outcome(), REGISTRY["softmax"]
        for size, seed in pieces(max(1, count // length), max(1, (1 << 15) // length)):
            values = row_values(size, length, seed, 10_000 * 2**16)
            values[1::4, 2:9] = 10_000 * 2**16 - torch.arange(7) * 2**15
            simulation = Simulation()
            shares = [Shared(s.share, FRACTIONAL_BITS) for s in integers(simulation, values)]
            results = simulation.run(lambda ctx, p, s=shares: softmax.protocol(ctx, s[p]))
            exact = torch.softmax(values.double() * UNIT, -1)
            outcome.add(simulation.reveal(results) - exact, 1e-4)
        return outcome

    return attempt


def by_logarithm(name: str, length: int) -> Callable[[int], Outcome]:
    """Rows of any spread up to the bound, with ties, and with their first entry at either end."""

    def attempt(count: int) -> Outcome:
        outcome, way, frac = Outcome(), WAYS[name], 24
        for size, seed in pieces(max(1, count // length), max(1, (1 << 14) // length)):
            edge = round(way.spread * 2**15)
            values = row_values(size, length, seed, edge)
            values[2::4] = words(len(values[2::4]) * length, -8 << 16, 1, seed).reshape(-1, length)
            valid = torch.ones(values.shape, dtype=torch.bool)
            simulation = Simulation()
            shares = [Shared(s.share, FRACTIONAL_BITS) for s in integers(simulation, values)]
            client, server, _ = simulation.run(
                lambda ctx, p, s=shares, v=valid: probabilities(ctx, s[p], v, way, frac)
            )
            found = added(client.reshape(-1, HALVES), server.reshape(-1, HALVES)).long()
            whole = (found[:, 0] & ONES) + (found[:, 1] << HALF_BITS)
            outcome.failures += int((found[:, 2] != whole >> 63).sum())
            exact = torch.softmax(values.double() * UNIT, -1)
            error = whole.reshape(exact.shape).double() * 2.0**-frac - exact
            outcome.add(error, 2.0**-frac + 2.0**-27 + exact * 2.0**-14)
        return outcome

    return attempt


def fine_products(count: int) -> Outcome:
    """Weights below 2**25, values below 2**37 in rows of 8, under uniform masks."""
    outcome, length, features = Outcome(), 8, 64
    for size, seed in pieces(max(1, count // features), 1 << 9):
        weights = words(size * length, 0, 1 << 25, seed).reshape(1, size, length)
        values = inputs(length * features, seed, -(2**37), 2**37, []).reshape(1, length, features)
        masks = words(values.numel(), -(2**63), 2**63 - 1, seed + 1).reshape(values.shape)
        own = words(values.numel(), -(2**63), 2**63 - 1, seed + 2).reshape(values.shape)
        low = torch.stack([weights, weights * 0, weights * 0], -1).to(torch.int32)
        client = words(low.numel(), -(2**31), 2**31, seed + 3).to(torch.int32).reshape(low.shape)
        ones = torch.tensor([1, 0, 0], dtype=torch.int32).expand(low.shape).reshape(-1, HALVES)
        # The negative of the client's share is its complement and one.
        server = added(added(low.reshape(-1, HALVES), ~client.reshape(-1, HALVES)), ones.clone())
        shares = client, server.reshape(low.shape), low.to("meta")
        held, simulation = (own, masks - own, masks), Simulation()

        def protocol(ctx: Any, p: int, s: Any = shares, h: Any = held, z: Any = values) -> Any:
            opened = z + h[2] if p < 2 else h[2].to("meta")
            return finer_products(ctx, s[p], Masked(opened, h[p], 16))

        result, _ = run(simulation, protocol)
        # Products are below 2**65: their upper parts are exact, and lower ones carry.
        upper = weights @ (values >> 8) + ((weights @ (values & 255)) >> 8)
        outcome.add(2 * (result - upper) - 1, 1.0)
    return outcome


def broad(reach: int) -> Callable[[int], Outcome]:
    """A unit and what both factors' roundings make of the value."""

    def attempt(count: int) -> Outcome:
        outcome, table = Outcome(), Broad(reach, 4, EXP_FRAC)
        end = (table.top << FRACTIONAL_BITS) - 1
        for size, seed in pieces(count, 1 << 14):
            near = words(size // 2, end - 20 * 2**16, end + 1, seed)
            x = torch.cat([near, words(size - size // 2, table.start, end + 1, seed)])
            x[:4] = torch.tensor([table.start, end, 0, -1])[:size]
            simulation = Simulation()
            cuts = [Cut(s.share.to(torch.int32)) for s in integers(simulation, x)]
            found, _ = run(simulation, lambda ctx, p, c=cuts: broad_exponentials(ctx, c[p], table))
            exact = (x.double() * UNIT).exp()
            unit = 2.0**-EXP_FRAC
            outcome.add(found.double() * unit - exact, unit + exact * 2.0**-22)
        return outcome

    return attempt


def norms(eps: float, bound: float, spread: float, peak_value: float) -> Callable[[int], Outcome]:
    def attempt(count: int) -> Outcome:
        outcome, width, frac = Outcome(), 576, 32
        for size, seed in pieces(max(1, count // width), 64):
            generator = torch.Generator().manual_seed(seed)
            rows = torch.randn(size, width, dtype=torch.float64, generator=generator)
            rows *= spread * torch.exp2(-8 * torch.rand(size, 1, generator=generator).double())
            if peak_value:
                rows[:, seed % width] = peak_value
            simulation = Simulation()
            shares = integers(simulation, torch.round(rows * 2.0**frac).long())
            spec = RowNorm(width, frac, eps, bound)
            result, _ = run(
                simulation, lambda ctx, p, s=shares, n=spec: normalize(ctx, s[p].share, n)
            )
            exact = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
            # Two units of the row's 16 bits, and 2**-14 of the mantissa.
            outcome.add(
                result.double() * 2.0**-SCALED_FRAC - exact, 2 * UNIT + 2**-14 * exact.abs()
            )
        return outcome

    return attempt


def deferred_norms(
    bound: float, spread: float, peak_value: float, kept: int, wide: bool = False
) -> Callable[[int], Outcome]:
    """Of each row 64 results count. Rows are rounded to `kept` of their 32 fractional bits.

    wide: results are shares modulo 2**128, truncated to 16 fractional bits.
    """

    def attempt(count: int) -> Outcome:
        outcome, width, frac, results, weight_frac = Outcome(), 576, 32, 64, 16
        spec = Deferred(RowNorm(width, frac, 1e-5, bound), frac - kept, weight_frac, 6)
        for size, seed in pieces(max(1, count // results), 64):
            generator = torch.Generator().manual_seed(seed)
            rows = torch.randn(size, width, dtype=torch.float64, generator=generator)
            rows *= spread * torch.exp2(-8 * torch.rand(size, 1, generator=generator).double())
            if peak_value:
                rows[:, seed % width] = peak_value
            matrix = words(results * width, -(2**14), 2**14, seed).reshape(results, width)
            simulation = Simulation()
            shares = integers(simulation, torch.round(rows * 2.0**frac).long())

            def protocol(ctx: Any, p: int, shares: Any = shares, matrix: Any = matrix) -> Any:
                held = matrix if p == SERVER else matrix.to("meta")
                weight = yield from share_weight(ctx, "w", held, weight_frac)
                if not wide:
                    return (yield from deferred_norm(ctx, shares[p].share, weight, spec))
                result = yield from deferred_norm_wide(ctx, shares[p].share, weight, spec)
                return narrow(ctx, result, result.frac - FRACTIONAL_BITS)

            found, _ = run(simulation, protocol)
            frac_out = FRACTIONAL_BITS if wide else SCALED_FRAC + spec.finer
            real = matrix.double() * 2.0**-weight_frac
            scale = torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-5)
            exact = (rows @ real.T) * scale
            # Two units, 2**-14 of the mantissa, and a unit of each entry of the row.
            moved = 2.0**-kept * real.abs().sum(-1) * scale
            outcome.add(
                found.double() * 2.0**-frac_out - exact,
                (3 if wide else 2) * UNIT + 2**-14 * exact.abs() + moved,
            )
        return outcome

    return attempt


# ---------------------------------------------------------------------------- scalar functions


def table_edges(function: Function) -> list[int]:
    """Ends of windows, positions where tails begin, and the ends of the table."""
    table = function.table
    windows = [table.start + (i << table.step_bits) for i in range(table.windows + 1)]
    ends = (table.start + (t << function.end_bits) for t in function.thresholds)
    return [*windows, *ends]


def scalar(name: str, *rest: Any, low: int = -RANGE, high: int = RANGE) -> Callable[[int], Outcome]:
    op = REGISTRY[name]
    step = [i << 13 for i in range(-160, 161)]

    def attempt(count: int) -> Outcome:
        outcome = Outcome()
        for size, seed in pieces(count, 1 << 15):
            values = inputs(size, seed, low, high, step)
            # A third lies where the function bends.
            values[: size // 3] = words(size // 3, -20 << 16, 20 << 16, seed).clamp(low, high)
            simulation = Simulation()
            shares = [Shared(s.share, FRACTIONAL_BITS) for s in integers(simulation, values)]
            results = simulation.run(lambda ctx, p, s=shares: op.protocol(ctx, s[p], *rest))
            exact = op.reference(values.double() * UNIT, *rest)
            outcome.add(simulation.reveal(results) - exact, 5e-5)
        return outcome

    return attempt


def gated_units(act: str, span: int, frac: int) -> Callable[[int], Outcome]:
    """What the cosines are off, and a unit and a half of half the factor."""

    def attempt(count: int) -> Outcome:
        outcome, table, end = Outcome(), gated_table(act, span, frac), span << FRACTIONAL_BITS
        for size, seed in pieces(count, 1 << 14):
            gates = inputs(size, seed, -end, end, [i << 13 for i in range(-160, 161)])
            gates[: size // 3] = words(size // 3, -20 << 16, 20 << 16, seed)
            largest = (1 << 62) - 1 if frac > 40 else 1 << (frac + 20)
            ups = inputs(size, seed + 1, -largest, largest, [0, 1, -1])
            # Factors of all sizes.
            ups >>= words(size, 0, 50, seed + 2)
            simulation = Simulation()
            x = [Shared(s.share, FRACTIONAL_BITS) for s in integers(simulation, gates)]
            y = [Shared(s.share, frac) for s in integers(simulation, ups)]
            found, _ = run(
                simulation,
                lambda ctx, p, x=x, y=y: gated(ctx, table, function_input(ctx, x[p]), y[p]),
            )
            active = ACTIVATIONS[act](gates.double() * UNIT)
            up, unit = ups.double() * 2.0**-frac, 3 * UNIT
            bound = 3e-5 * (up.abs() + unit) + unit * active.abs() + 2.0**-31
            outcome.add(found.double() * 2.0**-OUT_FRAC - active * up, bound)
        return outcome

    return attempt


def score_caps(count: int) -> Outcome:
    outcome, cap = Outcome(), 50.0
    function = _cap(cap)
    for size, seed in pieces(count, 1 << 14):
        values = inputs(size, seed, -RANGE, RANGE, table_edges(function))
        simulation = Simulation()
        shares = [Shared(s.share, FRACTIONAL_BITS) for s in integers(simulation, values)]
        result, _ = run(
            simulation,
            lambda ctx, p, s=shares: apply(ctx, function, function_input(ctx, s[p]), 16),
        )
        exact = cap * np.tanh(values.numpy() * UNIT / cap)
        outcome.add(result.double() * UNIT - torch.from_numpy(exact), 5e-5 * cap)
    return outcome


def positive(name: str, low: int, high: int, bound: Callable[[Any], Any]) -> Callable[..., Outcome]:
    """Integers of every magnitude in [2**low, 2**high), and the neighbours of powers of two."""
    op = REGISTRY[name]
    octaves = [2**k for k in range(low, high)]

    def attempt(count: int) -> Outcome:
        outcome = Outcome()
        for size, seed in pieces(count, 1 << 11):
            values = inputs(size, seed, 2**low, 2**high - 1, octaves)
            spread = torch.rand(size // 2, generator=torch.Generator().manual_seed(seed))
            values[: size // 2] = torch.exp2(low + (high - low) * spread.double()).to(torch.int64)
            values.clamp_(2**low, 2**high - 1)
            simulation = Simulation()
            shares = [Shared(s.share, FRACTIONAL_BITS) for s in integers(simulation, values)]
            results = simulation.run(lambda ctx, p, s=shares: op.protocol(ctx, s[p]))
            exact = op.reference(values.double() * UNIT)
            outcome.add(simulation.reveal(results) - exact, bound(exact))
        return outcome

    return attempt


def mantissas(spec: Power) -> Callable[[int], Outcome]:
    """Of numbers of every magnitude, the column that is not zero, with 16 fractional bits."""
    least, most = 2**spec.low, 2 ** (spec.high + 1) - 1
    columns = spec.first_exponent - COLUMN_BITS * torch.arange(spec.octaves.columns).double()

    def attempt(count: int) -> Outcome:
        outcome = Outcome()
        for size, seed in pieces(count, 1 << 11):
            values = inputs(size, seed, least, most, [2**k for k in range(spec.low, spec.high)])
            spread = torch.rand(size // 2, generator=torch.Generator().manual_seed(seed))
            sizes = spec.low + (spec.high + 1 - spec.low) * spread.double()
            values[: size // 2] = torch.exp2(sizes).to(torch.int64)
            values.clamp_(least, most)
            simulation = Simulation()
            shares = integers(simulation, values)
            found, _ = run(
                simulation,
                lambda ctx, p, s=shares: rounded_octaves(ctx, s[p].share, spec, FRACTIONAL_BITS),
            )
            # Of a column that should be zero one unit would be four units of the next, and more.
            total = (found.double() * torch.exp2(columns)).sum(1) * UNIT
            unit = UNIT * torch.exp2(columns[found.abs().argmax(1)])
            exact = (values.double() * 2.0**-spec.v_frac) ** spec.exponent
            outcome.add(total - exact, unit + 2**-17 * exact)
        return outcome

    return attempt


def _relative(exact: torch.Tensor) -> torch.Tensor:
    return 2**-16 * exact.abs() + 1.5 * UNIT


_ANY = "anywhere, of any size, beside thresholds and ends"
_TAILS = f"abs(x) < 2^14; {_ANY}"
_REACHED = 2**25 - 2**20
_REACH = f"abs(x) < 2^9 - 2^4; {_ANY}"
_UNITS = "one unit (rounded down or up)"

CHECKS = [
    Check("truncation by 16", "abs(x) within 2^40 of 2^62", _UNITS, truncations(16)),
    Check("truncation by 32", "the same", _UNITS, truncations(32)),
    Check("truncation by 40", "the same", "one and a half units", truncations(40)),
    Check("product", "all 64-bit words", "exact", products),
    Check("linear layer, server's weight", "all words, 32-bit weights", "exact", linear_layers),
    Check("max(x, 0)", f"[-2^30, 2^30); {_ANY}", "exact", rectified),
    Check("square of a truncated value", "abs(x) < 2^62", _UNITS + " of the root", squares),
    Check(
        "near maximum, rows of 256",
        "abs(x) < 2^14, ties",
        "[0, 2) below",
        near_maxima(peak, 256, 16_383, 2),
    ),
    Check(
        "near maximum, rows of 4,096",
        "the same",
        "[0, 2) below",
        near_maxima(peak, 4096, 16_383, 2),
    ),
    Check(
        "the same by histograms, rows of 256",
        "abs(x) < 16,000, ties",
        "[0, 4) below",
        near_maxima(crest, 256, 16_000, 4),
    ),
    Check(
        "the same by histograms, rows of 4,096",
        "the same",
        "[0, 4) below",
        near_maxima(crest, 4096, 16_000, 4),
    ),
    Check(
        "the same by one histogram, rows of 255",
        "abs(x) < 253, ties",
        "[0, 4) below",
        near_maxima(partial(top_slot, bits=9), 255, 253, 4),
    ),
    Check(
        "the same digit by digit",
        "abs(x) < 253, ties",
        "[0, 4) below",
        near_maxima(partial(top_slot, bits=9, digits=True), 255, 253, 4),
    ),
    Check(
        "the same with keys for slots",
        "abs(x) < 253, ties",
        "[0, 4) below",
        near_maxima(partial(top_slot, bits=9, digits=True, keys=True), 255, 253, 4),
    ),
    Check(
        "the same in coarse slots",
        "abs(x) < 251, ties",
        "[0, 8) below",
        near_maxima(partial(top_slot, bits=9, digits=True, coarse=True), 255, 251, 8),
    ),
    Check("place of the largest of 5,000", "abs(x) < 2^30, ties", "exact, the first", largest),
    Check("the 8 largest of 64", "abs(x) < 2^30, ties", "exact, the first", chosen, cost=4),
    Check("exp of scores in one round, spread 64", "all of it", "2^-17 + 2^-22 y", broad(6)),
    Check("the same, spread 512", "all of it", "2^-17 + 2^-22 y", broad(9)),
    Check(
        "softmax by the logarithm of the sum, rows of 128",
        "scores up to 246 apart, ties",
        "2^-24 + 2^-27 + 2^-14 y",
        by_logarithm("log-8", 128),
    ),
    Check(
        "the same, rows of 4,096",
        "scores up to 502 apart, ties",
        "2^-24 + 2^-27 + 2^-14 y",
        by_logarithm("log-9", 4096),
    ),
    Check(
        "products modulo 2^72",
        "weights below 2^25, values below 2^37",
        _UNITS,
        fine_products,
    ),
    Check("softmax, rows of 256", "scores from -1e4 to 1e4", "1e-4", softmaxes(256)),
    Check("softmax, rows of 4,096", "the same", "1e-4", softmaxes(4096)),
    Check("norm, rows of 576", "unit size", "2^-15 + 2^-14 y", norms(1e-5, 2.0**4, 1.0, 0.0)),
    Check(
        "norm, one activation of 25,000",
        "spread 30",
        "2^-15 + 2^-14 y",
        norms(1e-5, 2.0**24, 30.0, 25_000.0),
    ),
    Check("norm, eps of 10^6", "spread 30", "2^-15 + 2^-14 y", norms(1e6, 2.0**12, 30.0, 0.0)),
    Check(
        "product behind its norm, 576 to 64",
        "unit size",
        "2^-15 + 2^-14 y, and the row's",
        deferred_norms(2.0**4, 1.0, 0.0, 30),
    ),
    Check(
        "product behind its norm, one activation of 25,000",
        "spread 30",
        "2^-15 + 2^-14 y, and the row's",
        deferred_norms(2.0**24, 30.0, 25_000.0, 24),
    ),
    Check(
        "the same, truncated without a message",
        "spread 30",
        "3 2^-16 + 2^-14 y, and the row's",
        deferred_norms(2.0**24, 30.0, 25_000.0, 24, wide=True),
    ),
    Check("SiLU", _TAILS, "5e-5", scalar("silu")),
    Check("GELU", _TAILS, "5e-5", scalar("gelu")),
    Check("GELU by tanh", _TAILS, "5e-5", scalar("gelu", True)),
    Check("SiLU, to the server", _REACH, "5e-5", scalar("silu", 9, low=-_REACHED, high=_REACHED)),
    Check(
        "GELU, to the server",
        _REACH,
        "5e-5",
        scalar("gelu", False, 9, low=-_REACHED, high=_REACHED),
    ),
    Check(
        "SiLU times a factor, by one opening",
        "abs(x) up to 48, factors of 54 bits below 2^8",
        "3e-5 u + 3 2^-16 y",
        gated_units("silu", 48, 54),
    ),
    Check(
        "GELU times a factor, by one opening",
        "abs(x) up to 80, factors of 32 bits below 2^20",
        "3e-5 u + 3 2^-16 y",
        gated_units("gelu", 80, 32),
    ),
    Check("x sigmoid(1.702 x)", _TAILS, "5e-5", scalar("quick_gelu")),
    Check("ELU", _TAILS, "5e-5", scalar("elu")),
    Check("mish", _TAILS, "5e-5", scalar("mish")),
    Check("tanh", _TAILS, "5e-5", scalar("tanh")),
    Check("sigmoid", _TAILS, "5e-5", scalar("sigmoid")),
    Check("exp", "-2^14 < x <= 1/4", "5e-5", scalar("exp", high=2**14)),
    Check("50 tanh(x / 50)", _TAILS, "2.5e-3", score_caps, cost=2),
    Check(
        "mantissas of an inverse root",
        "all squares of a row of 576",
        "one unit, and 2^-17 y",
        mantissas(RowNorm(576, 32, 1e-5, 2.0**18).inverse_root),
        cost=4,
    ),
    Check(
        "mantissas of a reciprocal",
        "all sums of a row of 256",
        "one unit, and 2^-17 y",
        mantissas(inverse(256, "pairs")),
        cost=4,
    ),
    Check(
        "1 / x",
        "2^-10 <= x < 2^18",
        "2^-16 y + 1.5 units",
        positive("reciprocal", RECIPROCAL.low, RECIPROCAL.high + 1, _relative),
        cost=4,
    ),
    Check(
        "1 / sqrt(x)",
        "2^-16 <= x < 2^29",
        "2^-16 y + 1.5 units",
        positive("rsqrt", RSQRT.low, RSQRT.high + 1, _relative),
        cost=4,
    ),
    Check(
        "log(x)",
        "2^-16 <= x < 2^29",
        "2e-5 + 1.5 units",
        positive("log", LOG.low, LOG.high + 1, lambda exact: 2e-5 + 1.5 * UNIT),
        cost=4,
    ),
]


def _rows(page: Path) -> dict[str, list[str]]:
    """The rows of a written page, by the name of their check."""
    found: dict[str, list[str]] = {}
    lines = page.read_text(encoding="utf-8").splitlines() if page.exists() else []
    for line in lines:
        if line.startswith("| "):
            found.setdefault(line.split(" | ")[0].removeprefix("| "), []).append(line)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--truncations", type=int, default=100_000_000)
    parser.add_argument(
        "--only",
        default="",
        help="run checks whose name holds this word; keep the page's other rows",
    )
    parser.add_argument("--output", type=Path, default=TARGET)
    options = parser.parse_args()
    lines = [
        "# Evidence",
        "",
        "Each protocol on random and adversarial inputs, with fresh masks for every one: a third",
        "drawn from the whole range, a third of any size, a third at and beside thresholds and",
        "ends. Of rows all entries count. What is compared is what the protocols' docstrings",
        "promise; a unit is the last bit. Functions of positive numbers get fewer inputs, as each",
        "takes many times the randomness. Made by `make evidence`. That every input of small",
        "domains is right is tested in `tests/protocols`.",
        "",
        "| protocol | inputs | promised error | results | beyond it | largest error, of it | s |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    failed = []
    kept = _rows(options.output) if options.only else {}
    for check in CHECKS:
        if options.only not in check.name:
            lines += kept.get(check.name, [])
            continue
        count = options.truncations if check.name == "truncation by 16" else options.count
        began = time.process_time()
        outcome = check.attempt(count // check.cost)
        spent = time.process_time() - began
        worst = "exact" if outcome.worst == 0 else f"{outcome.worst:.0%}"
        lines.append(
            f"| {check.name} | {check.inputs} | {check.bound} | {outcome.tried:,} | "
            f"{outcome.failures:,} | {worst} | {spent:.0f} |"
        )
        print(lines[-1], flush=True)
        if outcome.failures:
            failed.append(check.name)
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if failed:
        raise SystemExit(f"beyond what they promise: {', '.join(failed)}")


if __name__ == "__main__":
    main()
