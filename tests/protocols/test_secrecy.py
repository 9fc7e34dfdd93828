"""Foundations of the protocols' security: masks used once, uniform openings, equal shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergec.runtime.core.spec import SERVER
from mergec.runtime.core.values import Shared
from mergec.runtime.correlations.prg import Prg, derive, new_seed
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.ops.silu import SILU
from mergec.runtime.ops.softmax import Softmax
from mergec.runtime.ops.top_k import TopK
from mergec.runtime.protocols.deferred import Deferred, deferred_norm
from mergec.runtime.protocols.formula import open_bits
from mergec.runtime.protocols.normalize import RowNorm, normalize
from mergec.runtime.protocols.opening import open_masked, open_under
from mergec.runtime.protocols.power import Power, power
from mergec.runtime.protocols.probabilities import WAYS, probabilities
from mergec.runtime.protocols.rectify import rectify
from mergec.runtime.protocols.rows import HISTOGRAM
from mergec.runtime.protocols.saturate import apply, function_input
from mergec.runtime.protocols.truncate import cut, truncate
from mergec.runtime.protocols.weights import send, share_weight
from tests.protocols.harness import integers, uniform_bytes

COUNT = 4096
LIMIT = 6.5
"""Standard deviations; a uniform transcript exceeds them once in 10**8."""


def _transcript(protocol, values: torch.Tensor) -> list[torch.Tensor]:
    simulation = Simulation(record=True)
    shares = simulation.share(values * 2.0**-16)
    simulation.run(lambda ctx, p: protocol(ctx, shares[p]))
    return simulation.transcript


def _deferred_norm(ctx, x):
    """Of rows of 64 words, with a matrix that is put under its mask first."""
    words = torch.arange(-64, 64).reshape(2, 64).to(torch.int32)
    weight = yield from share_weight(
        ctx, "w", words if ctx.party == SERVER else words.to("meta"), 6
    )
    spec = Deferred(RowNorm(64, 16, 1e-5, 2.0**10), 3, 6, 8)
    return (yield from deferred_norm(ctx, x.share.reshape(-1, 64), weight, spec))


PROTOCOLS = {
    "open": open_masked,
    "send": send,
    "truncate": lambda ctx, x: truncate(ctx, x.share, 16),
    "truncate far": lambda ctx, x: truncate(ctx, x.share, 40),
    "silu": lambda ctx, x: apply(ctx, SILU, function_input(ctx, x), 16),
    "silu times itself": lambda ctx, x: apply(ctx, SILU, function_input(ctx, x), 16, x),
    "relu": lambda ctx, x: rectify(ctx, cut(ctx, x.share, 0), x),
    "top_k": lambda ctx, x: TopK.protocol(ctx, Shared(x.share.reshape(-1, 64), x.frac), 8),
    "softmax": lambda ctx, x: Softmax.protocol(ctx, Shared(x.share.reshape(-1, 64), x.frac)),
    "softmax by histograms": lambda ctx, x: Softmax.protocol(
        ctx, Shared(x.share.reshape(-1, 64), x.frac), HISTOGRAM
    ),
    "probabilities": lambda ctx, x: probabilities(
        ctx,
        Shared(x.share.reshape(-1, 64), x.frac),
        torch.ones(x.share.numel() // 64, 64, dtype=torch.bool),
        WAYS["log-7"],
        24,
    ),
    "power": lambda ctx, x: power(ctx, x.share, Power(-1.0, 16, 6, 33), 16),
    "normalize": lambda ctx, x: normalize(
        ctx, x.share.reshape(-1, 64), RowNorm(64, 16, 1e-5, 2.0**10)
    ),
    "deferred norm": _deferred_norm,
}


def test_received_messages_are_uniform_for_fixed_secrets() -> None:
    """All parties' messages for the same value in every position: no byte is more frequent."""
    for name, protocol in PROTOCOLS.items():
        for secret in (0, -(2**16), 123_456):
            values = torch.full((COUNT,), secret)
            score = uniform_bytes(_transcript(protocol, values))
            assert abs(score) < LIMIT, f"{name} with secret {secret}: {score:.1f}"


def test_opened_values_are_uniform_and_not_only_their_shares() -> None:
    """Both messages of an opening add up to z = x + r, which must be uniform, too."""
    for secret in (0, 1, -1, 2**40):
        first, second = _transcript(open_masked, torch.full((COUNT * 4,), secret))
        assert abs(uniform_bytes([first + second])) < LIMIT


def test_transcripts_of_different_secrets_have_the_same_shape() -> None:
    for name, protocol in PROTOCOLS.items():
        shapes = []
        for secret in (0, 5, -(2**20)):
            transcript = _transcript(protocol, torch.full((COUNT,), secret))
            shapes.append([(t.dtype, tuple(t.shape)) for t in transcript])
        assert shapes[0] == shapes[1] == shapes[2], name


def test_opening_the_same_value_twice_uses_fresh_masks() -> None:
    simulation = Simulation()
    shares = integers(simulation, torch.zeros(COUNT, dtype=torch.int64))
    opened = [simulation.run(lambda ctx, p: open_masked(ctx, shares[p]))[0] for _ in range(2)]
    assert not bool((opened[0].opened == opened[1].opened).any())
    assert not bool((opened[0].mask == opened[1].mask).any())


def test_a_mask_that_would_be_used_twice_raises() -> None:
    simulation = Simulation()
    shares = integers(simulation, torch.zeros(3, dtype=torch.int64))

    def words(ctx, p):
        mask = ctx.mask((3,))
        yield from open_under(ctx, shares[p].share, mask)
        yield from open_under(ctx, shares[p].share, mask)

    def bits(ctx, p):
        mask = ctx.mask_bits((3,))
        secret = torch.zeros(3, dtype=torch.uint8, device=ctx.tensor_device)
        for _ in range(2):
            yield from open_bits(ctx, secret, mask)

    def weights(ctx, p):
        words = torch.ones(3, dtype=torch.int32, device="cpu" if p == SERVER else "meta")
        for _ in range(2):
            yield from share_weight(ctx, "w", words, 0)

    for protocol in (words, bits):
        with pytest.raises(RuntimeError, match="opened under the same mask"):
            simulation.run(protocol)
    with pytest.raises(RuntimeError, match="a second constant would be opened under the mask of w"):
        simulation.run(weights)


def test_the_stream_never_repeats_and_depends_on_the_purpose() -> None:
    seed = new_seed()
    stream = Prg(seed)
    blocks = torch.from_numpy(stream.read(1 << 20)).view(torch.int64)
    again = torch.from_numpy(stream.read(1 << 20)).view(torch.int64)
    assert len(torch.cat([blocks, again]).unique()) == 2 * len(blocks)
    assert (Prg(derive(seed, "a")).read(64) != Prg(derive(seed, "b")).read(64)).any()
    assert (Prg(seed).read(64) == Prg(seed).read(64)).all()
    pieces = Prg(seed)
    joined = torch.cat([torch.from_numpy(pieces.read(n)) for n in (1, 7, 24, 32)])
    assert (joined.numpy() == Prg(seed).read(64)).all()


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_seed_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"a seed must have 32 bytes, not {size}"):
        Prg(bytes(size))


def test_stream_is_aes_256_in_counter_mode() -> None:
    """The block of the zero key at counter zero, from the AES-256 known answers (zero input)."""
    expected = bytes.fromhex("dc95c078a2408989ad48a21492842087")
    assert bytes(Prg(bytes(32)).read(16)) == expected


def test_shares_of_a_mask_add_up_to_what_the_dealer_knows() -> None:
    client, server, dealer = Simulation().contexts
    for dtype in (torch.int64, torch.int32):
        parts = [ctx.mask((100,), dtype) for ctx in (client, server, dealer)]
        assert torch.equal(parts[0] + parts[1], parts[2])
    bits = [ctx.mask_bits((100,)) for ctx in (client, server, dealer)]
    assert torch.equal(bits[0] ^ bits[1], bits[2])
    known = [ctx.client_mask((100,)) for ctx in (client, server, dealer)]
    assert torch.equal(known[0], known[2])
    assert known[1].is_meta


def test_words_of_any_shape_are_the_stream_in_order_and_nobody_elses() -> None:
    seed = new_seed()
    stream, found = Prg(seed), []
    shapes = [((3,), np.uint8), ((2, 5), np.int64), ((0, 4), np.int64), ((9_000,), np.int64),
              ((), np.int32), ((7,), np.uint8), ((5,), np.int16), ((4, 3), np.uint64)]  # fmt: skip
    for shape, kind in shapes * 3:
        words = stream.words(shape, np.dtype(kind))
        assert words.shape == shape
        assert words.ctypes.data % words.itemsize == 0
        found.append(words.tobytes())
        words[...] = 0
    joined = b"".join(found)
    assert joined == Prg(seed).read(len(joined)).tobytes()


def test_a_mask_may_lie_where_one_lay_that_is_gone() -> None:
    context = Simulation().contexts[0]
    places = set()
    for _ in range(1000):
        mask = context.mask((1,))
        context.spend(mask)
        places.add(id(mask))
        del mask
    assert len(places) < 1000
