"""What the client is told of the logits, and what it is not."""

from __future__ import annotations

import pytest
import torch

from mergec.runtime.core.errors import BundleError
from mergec.runtime.core.op import REGISTRY
from mergec.runtime.core.spec import CLIENT, DEALER, MAX_NOISE, ROLES, SERVER, Vis
from mergec.runtime.core.values import Shared, decode, encode
from mergec.runtime.correlations.prg import Prg
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.ops import load_all
from mergec.runtime.ops.reveal import REVEALED_FRAC, normal
from mergec.runtime.roles.inprocess import InProcessSession
from tests import decoder
from tests.session import compiled, play

load_all()
LENGTH = 4096


@pytest.mark.parametrize("frac", range(63))
def test_the_client_sees_the_value_to_12_fractional_bits(frac: int) -> None:
    """Ends of the range among them. A share holds numbers below 2**62."""
    end = 2.0 ** min(15, 62 - frac)
    x = (torch.rand(LENGTH, dtype=torch.float64) * 2 - 1) * end
    unit = 2.0 ** -min(frac, REVEALED_FRAC)
    ends = [-end, -end + unit, end - unit, end - 2 * unit, 0.0, unit, -unit, -unit / 3]
    x[: len(ends)] = torch.tensor(ends, dtype=torch.float64)
    simulation = Simulation()
    views = simulation.share(x, frac)
    client, server, dealer = simulation.run(
        lambda ctx, party: REGISTRY["reveal"].protocol(ctx, views[party])
    )
    assert client.vis is server.vis is dealer.vis is Vis.CLIENT
    assert server.value.is_meta
    assert dealer.value.is_meta
    rounding = 0.0 if frac <= REVEALED_FRAC else unit
    error = client.value - decode(encode(x, frac), frac)
    assert error.abs().max() <= rounding
    # On average nothing is lost, but for half a unit of the share: within that and 6.5 standard
    # deviations of a mean of uniform numbers.
    assert abs(float(error.mean())) <= 2.0**-frac + 6.5 * rounding / (3 * LENGTH) ** 0.5
    # No bit below the unit is shown.
    assert torch.equal(client.value, torch.round(client.value / unit) * unit)
    assert simulation.cost.online == 4 * LENGTH
    assert simulation.cost.rounds == 1


def test_what_is_sent_is_the_window_alone() -> None:
    """Shares that differ below the window give the same message."""
    frac, messages = 48, []
    words = encode(torch.tensor([1.5, -2.25], dtype=torch.float64), frac)
    for low in (0, 2 ** (frac - REVEALED_FRAC) - 1):
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


def _revealed(simulation: Simulation, x: torch.Tensor, frac: int, noise: float) -> torch.Tensor:
    views = simulation.share(x, frac)
    results = simulation.run(
        lambda ctx, party: REGISTRY["reveal"].protocol(ctx, views[party], noise)
    )
    value: torch.Tensor = results[CLIENT].value
    return value


@pytest.mark.parametrize("frac", [12, 16, 32, 54, 62])
def test_the_noise_has_the_deviation_that_is_asked_for(frac: int) -> None:
    """In shares of any precision; for each element and each query anew; without a message."""
    noise = 2.0**-8
    x = torch.full((2 * LENGTH,), 0.25, dtype=torch.float64)
    simulation = Simulation()
    first = _revealed(simulation, x, frac, noise) - x
    assert simulation.cost.online == 4 * len(x)
    assert simulation.cost.offline == 0
    second = _revealed(simulation, x, frac, noise) - x
    pairs = torch.stack([first[:LENGTH], first[LENGTH:], second[:LENGTH], second[LENGTH:]])
    # The window adds the variance of a uniform number or two. 6.5 standard deviations each.
    expected = (noise**2 + 2.0 ** (-2 * REVEALED_FRAC) / 6) ** 0.5
    assert (pairs.mean(1).abs() < 6.5 * noise / LENGTH**0.5).all()
    assert ((pairs.std(1) / expected - 1).abs() < 6.5 / (2 * LENGTH) ** 0.5).all()
    among = torch.corrcoef(pairs) - torch.eye(4, dtype=torch.float64)
    assert (among.abs() < 6.5 / LENGTH**0.5).all()


def test_the_largest_noise_fits_beside_any_value() -> None:
    """The extreme words of the generator, on the largest numbers of a share with 62 bits."""
    extreme = normal(torch.tensor([0, -1])) * MAX_NOISE
    assert torch.isclose(extreme[0], -extreme[1])
    assert extreme.abs().max() < 1


def test_numbers_of_the_noise_are_standard_normal() -> None:
    words = torch.from_numpy(Prg(bytes(32)).read(8 * 200_000)).view(torch.int64)
    numbers = normal(words).sort().values
    positions = (torch.arange(len(numbers), dtype=torch.float64) + 0.5) / len(numbers)
    distance = (torch.special.ndtr(numbers) - positions).abs().max()
    # Kolmogorov: a distance of more than 3 / sqrt(n) occurs once in 10**7.
    assert distance < 3 / len(numbers) ** 0.5


def test_only_the_server_knows_its_noise() -> None:
    simulation = Simulation()
    client, server, dealer = simulation.contexts
    first, second = server.server_words((64,)), server.server_words((64,))
    assert len(torch.cat([first, second]).unique()) == 128
    for other in (client, dealer):
        with pytest.raises(RuntimeError, match="only the server"):
            other.server_words((1,))


def test_sessions_of_one_pair_of_seeds_differ_only_if_the_noise_is_fresh() -> None:
    """The dealer knows the seeds of a session, and could remove noise that came from them."""
    x = torch.zeros(64, dtype=torch.float64)
    noise = 2.0**-6
    seen = [_revealed(Simulation(), x, 16, noise) for _ in range(2)]
    assert not torch.equal(*seen)
    programs = {role: decoder.program(role, noise=noise) for role in ROLES}
    repeated = []
    for _ in range(2):
        with InProcessSession(programs, seeds=(bytes(32), bytes([1] * 32))) as session:
            repeated.append(session.step([5], 0))
    assert torch.equal(*repeated), "a test that gives the seeds repeats the noise, too"


@pytest.mark.parametrize("noise", [-1e-3, 2 * MAX_NOISE, float("nan")])
def test_noise_out_of_range_is_refused(noise: float) -> None:
    with pytest.raises(BundleError, match=r"it can be 0 to 0\.0625"):
        _revealed(Simulation(), torch.zeros(1, dtype=torch.float64), 16, noise)


def test_a_compiled_program_has_its_noise() -> None:
    """Its manifest says how much, and the logits vary by as much."""
    noise, prompt = 2.0**-5, [3, 14, 15]
    _, program = compiled("gpt2", logit_noise=noise)
    assert program.manifest.logit_noise == noise
    assert f"{noise}" in program.inspect(1, 4).to_markdown()
    _, without = compiled("gpt2")
    assert without.manifest.logit_noise == 0.0
    noisy, plain = (play(p.roles, [prompt])[0].logits.reshape(-1) for p in (program, without))
    added = noisy - plain
    # Roundings add a hundredth of it. 6.5 standard deviations of a deviation.
    assert abs(float(added.std()) / noise - 1) < 0.02 + 6.5 / (2 * len(added)) ** 0.5


def test_a_program_that_reveals_only_the_token_has_none() -> None:
    _, program = compiled("gpt2", reveal="token", logit_noise=2.0**-5)
    assert program.manifest.logit_noise == 0.0
