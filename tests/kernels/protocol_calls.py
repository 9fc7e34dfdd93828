"""Protocols that the small decoder does not run so, on a device and on the CPU.

With the same seeds all three roles must get the same words, and deal the same bytes. Of these each
crosses once where it is dealt and once where it is read, and no other word does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from mergec.runtime.core.context import (
    ByteSink,
    ClientContext,
    Context,
    DealerContext,
    ServerContext,
)
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.spec import CLIENT, SERVER
from mergec.runtime.core.values import Shared
from mergec.runtime.engine.simulate import Corrections, Simulation
from mergec.runtime.kernels.transfers import Guard, to_device, to_host
from mergec.runtime.ops.gelu import GELU
from mergec.runtime.ops.glu import gated_table
from mergec.runtime.ops.silu import SILU
from mergec.runtime.ops.tanh import TANH
from mergec.runtime.protocols.argmax import Candidates, best
from mergec.runtime.protocols.finer import finer_products
from mergec.runtime.protocols.gated import gated
from mergec.runtime.protocols.histogram import crest
from mergec.runtime.protocols.opening import open_masked
from mergec.runtime.protocols.peak import peak
from mergec.runtime.protocols.probabilities import WAYS, probabilities
from mergec.runtime.protocols.rectify import rectify
from mergec.runtime.protocols.rows import exponentials
from mergec.runtime.protocols.saturate import Function, apply, function_input
from mergec.runtime.protocols.slots import top_slot
from tests.kernels.cases import words

SEEDS = bytes(range(32)), bytes(range(32, 64))
Build = Callable[[Context, torch.Tensor], Protocol]


def _apply(function: Function) -> Build:
    return lambda ctx, x: apply(ctx, function, function_input(ctx, Shared(x, 16)), 16)


def _exponentials(shift: str) -> Build:
    return lambda ctx, x: exponentials(ctx, Shared(x, 16), _valid(*x.shape), shift)


def _weights(ctx: Context, x: torch.Tensor) -> Protocol:
    """With products, of which two rows share a group of values."""
    valid, length = _valid(*x.shape), x.shape[1]
    found = yield from probabilities(ctx, Shared(x, 16), valid, WAYS["log-6"], 24)
    values = yield from open_masked(ctx, Shared(x.reshape(1, length, 2), 16))
    return (yield from finer_products(ctx, found[None], values))


def _gated(ctx: Context, share: torch.Tensor) -> Protocol:
    x = Shared(share, 16)
    return (yield from gated(ctx, gated_table("silu", 48, 16), function_input(ctx, x), x))


def _rectified(ctx: Context, share: torch.Tensor) -> Protocol:
    x = Shared(share, 16)
    return (yield from rectify(ctx, function_input(ctx, x), x))


def _best(ctx: Context, share: torch.Tensor) -> Protocol:
    found = yield from best(ctx, Candidates(share), 1, (4, 2))
    return found.labels


def _valid(rows: int, length: int) -> torch.Tensor:
    valid = torch.ones((rows, length), dtype=torch.bool)
    valid[0, length // 3 :] = False
    return valid


CASES: dict[str, tuple[Build, tuple[int, ...], torch.dtype]] = {
    "tanh": (_apply(TANH), (5,), torch.int64),
    "silu": (_apply(SILU.from_server(9)), (5,), torch.int64),
    "gelu": (_apply(GELU.from_server(6)), (3,), torch.int64),
    "rectify": (_rectified, (5,), torch.int64),
    "best": (_best, (1, 7), torch.int32),
    "peak": (lambda ctx, x: peak(ctx, x, _valid(2, 5), 4), (2, 5), torch.int32),
    "exponentials": (_exponentials("slots-6"), (2, 5), torch.int64),
    "broad exponentials": (_exponentials("broad-7"), (2, 5), torch.int64),
    "probabilities": (_weights, (2, 5), torch.int64),
    "slots": (lambda ctx, x: top_slot(ctx, x, _valid(2, 9), 6), (2, 9), torch.int32),
    "gated unit": (_gated, (3,), torch.int64),
    "slots by digits": (_exponentials("broad-6-digits"), (2, 5), torch.int64),
    "slots by keys": (_exponentials("broad-6-keys"), (2, 5), torch.int64),
    "slots of long rows": (
        lambda ctx, x: top_slot(ctx, x, _valid(2, 300), 7),
        (2, 300),
        torch.int32,
    ),
    "crest": (lambda ctx, x: crest(ctx, x, _valid(2, 60)), (2, 60), torch.int32),
}


class _Dealer(DealerContext):
    """Counts the bytes that it deals, once if both parties are sent them."""

    written = 0

    def _write(self, words: torch.Tensor, *sinks: ByteSink) -> None:
        self.written += words.nbytes
        super()._write(words, *sinks)


def run(build: Build, shares: tuple[torch.Tensor, ...], device: str) -> list[Any]:
    """What client and server get, the bytes that both were dealt, and those that dealing copies."""
    simulation = Simulation()
    client, server = Corrections(), Corrections()
    simulation.to_client, simulation.to_server = client, server
    dealer = _Dealer(*SEEDS, client, server, device)
    simulation.contexts = (
        ClientContext(SEEDS[CLIENT], client, device),
        ServerContext(SEEDS[SERVER], server, device),
        dealer,
    )
    place = torch.device(device)
    given = [*(to_device(share, place, "input") for share in shares), shares[0].to("meta")]
    results = simulation.run(lambda ctx, party: build(ctx, given[party]))
    found = [to_host(results[party], "output") for party in (CLIENT, SERVER)]
    dealt = client.total + server.total
    return [*found, torch.tensor([client.total, server.total, dealt + dealer.written])]


def compared(
    name: str, device: str, inside: Callable[[], AbstractContextManager[Any]]
) -> tuple[str, bool]:
    """What a call gives on a device, beside the CPU's words; and whether it is right.

    inside: what the call on the device runs within, in a guard.
    """
    build, shape, dtype = CASES[name]
    shares = words(*shape, dtype=dtype), words(*shape, dtype=dtype)
    expected = run(build, shares, "cpu")
    with inside(), Guard() as guard:
        found = run(build, shares, device)
    same = all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    crosses = torch.device(device).type != "cpu"
    more = guard.bytes["dealt"] - int(found[-1][-1]) if crosses else 0
    outcome = f"{more} bytes cross that are not dealt" if more else "equal"
    return outcome if same else "DIFFERENT", same and not more
