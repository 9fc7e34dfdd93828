"""Protocols chosen by their cost on a network."""

from __future__ import annotations

import pytest

from mergec.compiler.backend.cost import cost_report
from mergec.runtime.core.network import MAKING, NETWORKS, Network
from mergec.runtime.core.spec import CHOICES, ROLES, Cost
from tests.session import compiled


def test_profiles_are_those_that_can_be_asked_for() -> None:
    assert tuple(NETWORKS) == CHOICES["network"]


def test_seconds_are_rounds_and_bytes() -> None:
    network = Network(latency=0.01, bandwidth=1e6, overhead=0.001)
    cost = Cost(rounds=100, online=4_000_000, offline=10**9)
    assert network.seconds(cost) == pytest.approx(100 * 0.011 + 2.0)
    assert network.weight(cost) == pytest.approx(network.seconds(cost) + 10**9 / MAKING)


def test_slow_networks_get_fewer_rounds_and_more_bytes() -> None:
    programs = {name: compiled("llama", reveal="token", network=name)[1] for name in NETWORKS}
    costs = {name: cost_report(p.any_role, 1, 8).total for name, p in programs.items()}
    assert costs["wan"].rounds <= costs["lan"].rounds < costs["loopback"].rounds
    assert costs["wan"].offline > costs["loopback"].offline
    for name, program in programs.items():
        assert program.manifest.network == name
        network = NETWORKS[name]
        best = min(costs.values(), key=network.weight)
        assert network.weight(costs[name]) == network.weight(best)


def test_inspection_tells_the_estimate() -> None:
    _, program = compiled("llama", reveal="token", network="wan")
    total = cost_report(program.any_role, 1, 8).total
    facts = program.inspect(1, 8).facts
    assert (facts["weights"], facts["reveal"], facts["network"]) == ("server", "token", "wan")
    seconds = total.rounds * 0.02005 + total.online / 2 / 12.5e6
    assert facts["estimated_network_seconds"] == pytest.approx(seconds, abs=1e-4)


def test_all_roles_get_the_same_choice() -> None:
    _, program = compiled("llama", reveal="token", network="wan")
    (one, *others) = [program.roles[role].instructions for role in ROLES]
    assert all(other == one for other in others)
    assert [item.args[1] for item in one if item.target == "mpc.reveal_token"] == [[8, 16]]
