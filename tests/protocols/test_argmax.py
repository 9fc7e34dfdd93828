"""The best few of a row: against torch's own sort, on ties, extremes and every group size."""

from __future__ import annotations

import pytest
import torch

from mergec.runtime.core.spec import Cost
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.protocols.argmax import (
    LOWEST,
    SIZES,
    Candidates,
    again_cost,
    best,
    best_cost,
    plan_for,
    plans,
)
from tests.protocols.harness import uniform_bytes, words

TOP = 2**30 - 1


def _shares(keys: torch.Tensor) -> list[torch.Tensor]:
    mask = words(keys.numel(), -(2**31), 2**31, seed=99).reshape(keys.shape).to(torch.int32)
    return [mask, keys.to(torch.int32) - mask, keys.to(torch.int32).to("meta")]


def _best(keys: torch.Tensor, keep: int, sizes: tuple[int, ...], simulation: Simulation):
    shares = _shares(keys)
    simulation.cost = Cost()
    client, server, dealer = simulation.run(
        lambda ctx, p: best(ctx, Candidates(shares[p]), keep, sizes)
    )
    assert dealer.keys.shape == client.keys.shape == (len(keys), keep)
    assert simulation.cost == best_cost(*keys.shape, keep, sizes)
    return client.keys + server.keys, client.labels + server.labels


def _check(keys: torch.Tensor, keep: int, sizes: tuple[int, ...]) -> None:
    found, labels = _best(keys, keep, sizes, Simulation())
    ordered = keys.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(found.long(), ordered.values[:, :keep])
    assert torch.equal(labels.long(), ordered.indices[:, :keep])


@pytest.mark.parametrize("count", [2, 3, 4, 5, 17, 63, 64, 65, 97, 300])
def test_every_plan_finds_the_first_of_the_largest(count: int) -> None:
    keys = words(3 * count, LOWEST + 1, TOP + 1, seed=count).reshape(3, count)
    keys[1, count // 2 :] = keys[1].max()
    keys[2] = -7
    for sizes in plans(count):
        _check(keys, 1, sizes)


def test_edges_and_neighbours() -> None:
    """The largest differences that fit, differences of one unit, and of one byte's borrow."""
    rows = [
        [LOWEST + 1, TOP, LOWEST + 1, TOP],
        [TOP, TOP - 1, TOP, TOP - 2],
        [0, -1, 1, 0],
        [255, 256, 257, 256],
        [-(2**16), -(2**16) - 1, -(2**16) + 1, -(2**24)],
        [LOWEST + 1] * 4,
    ]
    for turn in range(4):
        keys = torch.tensor(rows).roll(turn, 1)
        _check(keys, 1, (4,))
        _check(keys, 3, (4,))
        _check(keys.repeat(1, 5), 1, (4, 8))


@pytest.mark.parametrize("keep", [2, 3, 5, 8])
def test_the_best_few_in_order(keep: int) -> None:
    for count in (keep + 1, 40, 333):
        keys = words(2 * count, -50, 50, seed=count).reshape(2, count)
        _check(keys, keep, plan_for(count, keep))


def test_a_vocabulary() -> None:
    keys = words(50_257, LOWEST + 1, TOP + 1).reshape(1, -1)
    keys[0, [11, 50_256]] = TOP
    _check(keys, 1, (4, 8, 32, 64))


def test_secret_labels_go_with_their_keys() -> None:
    simulation = Simulation()
    keys, labels = words(30, -99, 99).reshape(2, 15), words(30, 0, 2**31 - 1, seed=1).reshape(2, 15)
    shares, hidden = _shares(keys), _shares(labels)
    simulation.cost = Cost()
    client, server, _ = simulation.run(
        lambda ctx, p: best(ctx, Candidates(shares[p], hidden[p]), 1, (4, 4))
    )
    assert simulation.cost == again_cost(2, 15, 1, (4, 4))
    wanted = labels.gather(1, keys.argmax(1, keepdim=True))
    assert torch.equal((client.labels + server.labels).long(), wanted)


def test_numbers_at_the_ends_of_the_range_are_never_taken_for_what_fills_a_group() -> None:
    """All above -2**30 and below 2**30, in a group of which the last three are filled up."""
    for low in (-(2**30) + 1, 2**30 - 1):
        keys = torch.full((2, 5), low)
        keys[1, 2] = 2**30 - 1
        _check(keys, 1, (4, 4))
        _check(keys, 3, (8,))


def test_plans_for_a_few_of_many_shrink_them_to_a_quarter() -> None:
    """Groups of four times the power of two from how many are kept on."""
    assert plan_for(50_257, 1) == (8, 8, 8, 8, 8, 2)
    assert plan_for(333, 3) == (16, 16, 16)
    assert plan_for(64, 8) == (32, 16)
    assert plan_for(8, 1) == (8,)
    assert plan_for(9, 1) == (8, 2)


def test_a_plan_that_leaves_too_many_is_refused() -> None:
    with pytest.raises(ValueError, match=r"groups of \[4\] leave 3 candidates"):
        _best(words(12, -9, 9).reshape(1, 12), 1, (4,), Simulation())


def test_plans_begin_with_groups_of_any_size() -> None:
    assert {sizes[0] for sizes in plans(5000)} == set(SIZES)


def test_plans_cover_what_they_are_for() -> None:
    for count in (2, 97, 50_257, 256_000):
        for sizes in plans(count):
            left = count
            for size in sizes:
                assert size in (2, *SIZES)
                left = -(-left // size)
            assert left == 1
            assert list(sizes[:-1]) == sorted(sizes[:-1])


def test_messages_are_uniform_and_tell_nothing_by_their_shape() -> None:
    shapes = []
    for secret in (0, TOP, LOWEST + 1):
        simulation = Simulation(record=True)
        _best(torch.full((16, 256), secret), 1, (4, 8, 8), simulation)
        assert abs(uniform_bytes(simulation.transcript)) < 5
        shapes.append([(t.dtype, tuple(t.shape)) for t in simulation.transcript])
    assert shapes[0] == shapes[1] == shapes[2]
