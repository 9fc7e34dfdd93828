"""The token that is revealed alone: exact where the logits differ, a softmax where it is drawn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mergec.runtime.core.context import DealerContext
from mergec.runtime.core.draw import MAX_TOP_K, Draw
from mergec.runtime.core.errors import PromptError
from mergec.runtime.core.op import REGISTRY
from mergec.runtime.core.spec import DEALER, Cost
from mergec.runtime.correlations.prg import Prg
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.ops import load_all
from mergec.runtime.program.manifest import Manifest
from mergec.runtime.protocols.gumbel import gumbel
from mergec.runtime.session.sampling import Sampling, draw_for

load_all()
OP = REGISTRY["reveal_token"]
TOKEN = Manifest(reveal="token", vocab_size=50)


def _draw(logits: torch.Tensor, draw: Draw | None = None, frac: int = 32) -> torch.Tensor:
    simulation = Simulation()
    dealer = simulation.contexts[DEALER]
    assert isinstance(dealer, DealerContext)
    dealer._own = Prg(b"the noise of a test, repeatable.")
    for context in simulation.contexts:
        context.draw = draw or Draw()
    shares = simulation.share(logits, frac)
    simulation.cost = Cost()
    client, server, dealer_view = simulation.run(lambda ctx, p: OP.protocol(ctx, shares[p]))
    assert server.value.is_meta and dealer_view.value.is_meta
    top_k = draw.top_k if draw else 0
    assert simulation.cost == OP.cost(shares[DEALER], fixed=16, top_k=top_k)  # type: ignore[call-arg]
    return client.value


def _logits(rows: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, size, dtype=torch.float64, generator=generator) * 4


def test_the_best_token_is_plaintexts() -> None:
    for size in (2, 97, 1000):
        logits = _logits(20, size)
        best = logits.topk(2).values
        clear = best[:, 0] - best[:, 1] > 2.0**-14
        assert clear.sum() > 15
        assert torch.equal(_draw(logits)[clear], logits.argmax(-1)[clear])
    assert _draw(_logits(6, 97).reshape(2, 3, 97)).shape == (2, 3)


def test_extreme_and_close_logits() -> None:
    """The ends of the range, one unit that counts, and equals: any of these may win."""
    far = torch.tensor([[-16_000.0, 16_000.0, -16_000.0, 15_999.999]], dtype=torch.float64)
    assert _draw(far).item() == 1
    close = torch.zeros(50, 97, dtype=torch.float64)
    close[:, 40] = 2.0**-15
    assert set(_draw(close).tolist()) == {40}
    equal = torch.full((50, 97), -3.0, dtype=torch.float64)
    equal[:, [5, 70]] = 12.25
    assert set(_draw(equal).tolist()) <= {5, 70}
    assert _draw(_logits(3, 9), frac=16).tolist() == _logits(3, 9).argmax(-1).tolist()


@pytest.mark.parametrize("frac", [16, 32, 47, 48, 49, 54])
def test_any_number_of_fractional_bits(frac: int) -> None:
    """A window further up than bit 32 would be no share modulo 2**32 any more."""
    logits = _logits(40, 97).clamp(-60, 60)
    assert torch.equal(_draw(logits, frac=frac), logits.argmax(-1))
    assert set(_draw(logits, Draw(2**16, 2), frac=frac).tolist()) <= set(range(97))


@pytest.mark.parametrize(
    ("temperature", "top_k"), [(1.0, 0), (0.5, 0), (3.0, 0), (1.0, 3), (2.0, 2)]
)
def test_draws_follow_the_softmax(temperature: float, top_k: int) -> None:
    """Chi-square over 8,000 draws; the noise is the dealer's, from a fixed seed."""
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5, 1.5, -3.0], dtype=torch.float64)
    scores = logits / temperature
    if top_k:
        scores[scores < scores.topk(top_k).values.min()] = -torch.inf
    expected = torch.softmax(scores, -1) * 8000
    sampling = Sampling(temperature=temperature, top_k=top_k)
    drawn = _draw(logits.expand(8000, -1), draw_for(sampling, replace(TOKEN, vocab_size=7)))
    counts = torch.bincount(drawn, minlength=7).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = ((counts - expected) ** 2 / expected)[possible].sum()
    freedom = int(possible.sum()) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_noise_is_standard_gumbel() -> None:
    raw = torch.from_numpy(Prg(bytes(32)).read(8 * 200_000)).view(torch.int64)
    noise = gumbel(raw).double() * 2.0**-16
    assert abs(noise.mean() - 0.5772) < 0.02
    assert abs(noise.var() - torch.pi**2 / 6) < 0.03
    edges = gumbel(torch.tensor([0, -1])).double() * 2.0**-16
    assert -3.7 < edges[0] < -3.6 and 36.7 < edges[1] < 36.8


def test_noise_is_fresh_and_unknown_to_the_parties() -> None:
    simulation = Simulation()
    client, server, dealer = simulation.contexts
    first, second = dealer.private_words((64,)), dealer.private_words((64,))
    assert len(torch.cat([first, second]).unique()) == 128
    for party in (client, server):
        with pytest.raises(RuntimeError, match="only the dealer"):
            party.private_words((1,))


def test_what_is_dealt_does_not_depend_on_the_temperature() -> None:
    """Nor do the messages: a server or a listener sees the same sizes for every request."""
    shapes = []
    for units in (0, 2**16, 5):
        simulation = Simulation(record=True)
        for context in simulation.contexts:
            context.draw = Draw(units)
        shares = simulation.share(_logits(1, 97), 32)
        simulation.run(lambda ctx, p, shares=shares: OP.protocol(ctx, shares[p]))
        sent = [tuple(t.shape) for t in simulation.transcript]
        shapes.append((sent, simulation.dealt))
    assert shapes[0] == shapes[1] == shapes[2]


def test_what_cannot_be_drawn_is_told() -> None:
    assert draw_for(Sampling(temperature=0.8, top_p=0.9, seed=3), Manifest()) == Draw()
    assert draw_for(Sampling(), TOKEN) == Draw()
    assert draw_for(Sampling(temperature=0.5, top_k=1), TOKEN) == Draw()
    assert draw_for(Sampling(temperature=0.5, top_k=5), TOKEN) == Draw(2**15, 5)
    assert draw_for(Sampling(temperature=1.0, top_k=5), replace(TOKEN, vocab_size=5)) == Draw(2**16)
    for sampling, words in (
        (Sampling(temperature=1.0, top_p=0.9), "top-p needs the logits"),
        (Sampling(temperature=1.0, seed=3), "noise that nobody may know"),
        (Sampling(temperature=1.0, top_k=MAX_TOP_K + 1), f"top-k is {MAX_TOP_K + 1}.*1 to 8"),
        (Sampling(temperature=99.0), "temperature can be 0 to 64"),
    ):
        with pytest.raises(PromptError, match=words):
            draw_for(sampling, TOKEN)
    with pytest.raises(PromptError, match="support only greedy choice"):
        draw_for(Sampling(temperature=1.0), TOKEN, "crypten")
