"""Protocols chosen by their cost on a network."""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch

from mergec.compiler.backend.choose import chosen_otherwise
from mergec.compiler.backend.cost import cost_report, dealt_bytes
from mergec.compiler.config import CompileConfig
from mergec.compiler.driver import compile_decoder
from mergec.compiler.frontend.capture import Captured, capture
from mergec.compiler.program import Program
from mergec.runtime.core.network import MAKING, NETWORKS, Link, Network
from mergec.runtime.core.op import REGISTRY
from mergec.runtime.core.spec import CHOICES, ROLES, Cost
from mergec.runtime.engine.plan import Planned
from mergec.runtime.engine.rehearsal import Rehearsal, exchanged, latencies
from tests.families import float_decoder, random_decoder
from tests.session import compiled


def test_every_network_has_a_profile() -> None:
    assert tuple(NETWORKS) == CHOICES["network"]


def test_time_is_counted_link_by_link() -> None:
    network = Network(Link(0.01, 1e6), Link(0.02, 2e6), Link(0.03, 4e6), overhead=0.001)
    cost, dealt = Cost(100, 4 * 10**6, 14 * 10**6), {"client": 6 * 10**6, "server": 8 * 10**6}
    waiting = network.waiting(cost, dealt)
    assert waiting.latencies == pytest.approx(100 * 0.011)
    known = network.waiting(cost, dealt, latencies=80, transfer=2.5)
    assert (known.latencies, known.online) == (pytest.approx(80 * 0.01 + 100 * 0.001), 2.5)
    assert waiting.online == pytest.approx(2.0)
    assert waiting.to_client == pytest.approx(0.02 + 3.0)
    assert waiting.to_server == pytest.approx(0.03 + 2.0)
    assert waiting.prepared == pytest.approx(3.1)
    assert waiting.total == pytest.approx(3.1)
    making = sum(dealt[role] / rate for role, rate in MAKING.items())
    assert network.weight(cost, dealt) == pytest.approx(3.1 + 3.0 + 2.0 + making)
    assert network.weight(cost, dealt, waits=False) == pytest.approx(3.1 + making)


def test_a_step_waits_for_the_slowest_link() -> None:
    link = Link(0.0, 1e6)
    network = Network(link, link, link, overhead=0.0)
    for client, server in ((9, 1), (1, 9)):
        dealt = {"client": client * 10**6, "server": server * 10**6}
        assert network.waiting(Cost(1, 4 * 10**6, 10**7), dealt).total == pytest.approx(9.0)


def test_slow_networks_get_fewer_rounds_and_more_bytes() -> None:
    programs = {name: compiled("llama", reveal="token", network=name)[1] for name in NETWORKS}
    # The step that protocols are chosen for.
    costs = {name: cost_report(p.any_role, 1, 63).total for name, p in programs.items()}
    dealt = {name: dealt_bytes(p.any_role, 1, 63) for name, p in programs.items()}
    assert costs["wan"].rounds <= costs["lan"].rounds < costs["loopback"].rounds
    assert costs["wan3"].offline > costs["loopback"].offline
    for name, program in programs.items():
        assert program.manifest.network == name
        assert sum(dealt[name].values()) == costs[name].offline
        weights = {
            other: NETWORKS[name].weight(costs[other], dealt[other], waits=False)
            for other in programs
        }
        # Where messages take no time no norm is deferred, however small the model is; and what the
        # dealer sends is chosen for a prompt.
        assert weights[name] == min(weights.values()) or name in ("loopback", "lan")


def test_inspection_tells_the_estimate() -> None:
    _, program = compiled("llama", reveal="token", network="wan")
    total, dealt = cost_report(program.any_role, 1, 8).total, dealt_bytes(program.any_role, 1, 8)
    inspection = program.inspect(1, 8)
    facts = inspection.facts
    assert (facts["weights"], facts["reveal"], facts["network"]) == ("server", "token", "wan")
    assert (facts["dealt_to_client"], facts["dealt_to_server"]) == tuple(dealt.values())
    rounds = Rehearsal(program.any_role).step(1, 8)
    assert facts["one_way_latencies"] == latencies(rounds) <= total.rounds == len(rounds)
    waiting = facts["waiting_for"]
    count = latencies(rounds)
    assert waiting["latencies"] == pytest.approx(count * 0.02 + len(rounds) * 5e-5, abs=1e-4)
    together = exchanged([[forms] for forms in rounds], NETWORKS["wan"].parties)
    assert waiting["online"] == pytest.approx(together - count * 0.02, abs=1e-4)
    # Between both directions at once all the time, and never at once.
    assert 0.5 <= waiting["online"] / (total.online / 12.5e6) <= 1
    assert waiting["to_client"] == pytest.approx(0.02 + dealt["client"] / 12.5e6, abs=1e-4)
    assert waiting["to_server"] == pytest.approx(0.0005 + dealt["server"] / 1.25e9, abs=1e-4)
    assert facts["estimated_network_seconds"] == pytest.approx(
        waiting["latencies"] + waiting["online"], abs=2e-4
    )
    said = inspection.to_markdown()
    assert "* waiting for: latencies " in said
    assert f"* one way latencies: {latencies(rounds)}\n" in said


def test_inspection_tells_what_is_chosen_otherwise_than_for_loopback() -> None:
    key = "chosen_otherwise_than_for_loopback"
    said = compiled("llama", reveal="token", network="wan")[1].inspect().facts[key]
    assert said == (
        "1 of mpc.rms_norm_linear (norm deferred, wide), 2 of mpc.attention, "
        "3 of mpc.rms_norm_linear (norm deferred), 2 of mpc.glu (one opening), "
        "1 of mpc.reveal_token"
    )
    assert key not in compiled("llama", reveal="token")[1].inspect().facts
    _, program = compiled("llama", reveal="token", network="wan")
    assert chosen_otherwise(program.any_role, NETWORKS["wan"], 16) == {}
    assert sum(chosen_otherwise(program.any_role, NETWORKS["loopback"], 16).values()) == 9


def test_arguments_at_the_end_that_say_nothing_are_left_out() -> None:
    given = {"x": None, "bits": 0, "columns": (), "wide": False}
    for optional, kept in (
        ({"columns", "wide"}, 2),
        ({"columns"}, 4),  # it is not the last one
        ({"bits", "columns", "wide"}, 1),
        (set(), 4),
        (set(given), 0),
    ):
        assert Planned.written(given, optional) == dict(list(given.items())[:kept])
    full = {**given, "columns": (3,)}
    assert Planned.written(full, {"columns", "wide"}) == dict(list(full.items())[:3])
    assert Planned.written({**given, "wide": True}, set(given)) == {**given, "wide": True}


def test_all_roles_get_the_same_choice() -> None:
    _, program = compiled("llama", reveal="token", network="wan")
    (one, *others) = [program.roles[role].instructions for role in ROLES]
    assert all(other == one for other in others)
    assert [item.args[1] for item in one if item.target == "mpc.reveal_token"] == [[8, 16]]


def _shifts(program: Program) -> list[str]:
    items = program.any_role.instructions
    return [item.args[6] for item in items if item.target == "mpc.attention"]


@functools.cache
def _wide_rows() -> tuple[Any, Captured]:
    """A decoder whose scores are further apart than slots reach."""
    model = random_decoder("llama").float()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 500
            layer.self_attn.k_proj.weight *= 20
    return model, capture(model)


@functools.cache
def _of_wide_rows(network: str, max_length: int = 64) -> Program:
    model, captured = _wide_rows()
    disable = "defer_norm", "open_once"
    config = CompileConfig(max_length=max_length, network=network, disable=disable)
    return compile_decoder(model, config=config, captured=captured)


def test_attention_takes_fewer_rounds_on_a_slow_network() -> None:
    near, far = _of_wide_rows("loopback"), _of_wide_rows("wan3")
    assert set(_shifts(near)) == {"pairs-to-server"}
    assert set(_shifts(far)) == {"histogram-to-server"}
    rounds = [cost_report(p.any_role, 1, 60).total.rounds for p in (near, far)]
    assert rounds[0] == rounds[1] + 2 * len(_shifts(near))


@pytest.mark.parametrize("network", NETWORKS)
def test_rows_that_spread_little_take_slots_on_every_network(network: str) -> None:
    """With exponentials in one round; counts take one more where bytes cost more than rounds. Where
    a message takes long, rows are divided by their sum at once."""
    _, program = compiled("llama", network=network)
    found, by_words, by_digits = set(_shifts(program)), "broad-6", "broad-6-digits"
    wanted = {"loopback": {by_digits}, "lan": {by_words, by_digits}}.get(network, {"log-6"})
    assert found and found <= wanted


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logarithms_save_a_round_for_each_layer_of_a_decode_step(family: str) -> None:
    """And two latencies, where a chain of nine openings becomes one of eight."""
    _, program = compiled(family, network="wan")
    layers = len(_shifts(program))
    assert layers and set(_shifts(program)) == {"log-6"}
    items = [
        replace(item, args=(*item.args[:6], "broad-6", *item.args[7:]))
        if item.target == "mpc.attention"
        else item
        for item in program.any_role.instructions
    ]
    before = replace(program.any_role, instructions=items)
    rounds = [cost_report(role, 1, 20).total.rounds for role in (before, program.any_role)]
    assert rounds[0] - rounds[1] == layers
    waited = [latencies(Rehearsal(role).step(1, 20)) for role in (before, program.any_role)]
    assert waited[0] - waited[1] == 2 * layers


def _wide(program: Program) -> list[bool]:
    """For each product behind a norm whether it is shared modulo 2**128."""
    items = [i for i in program.any_role.instructions if "norm_linear" in i.target]
    return [len(item.args) > 11 and bool(item.args[11]) for item in items]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_products_that_are_only_truncated_are_shared_in_a_larger_ring(family: str) -> None:
    """Those of attention, not those of a gated unit, which takes any number of bits."""
    _, program = compiled(family, network="wan")
    wide = _wide(program)
    assert any(wide) and not all(wide)
    items = [
        replace(item, args=item.args[:10]) if "norm_linear" in item.target else item
        for item in program.any_role.instructions
    ]
    plain = replace(program.any_role, instructions=items)
    rounds = [cost_report(role, 1, 20).total.rounds for role in (plain, program.any_role)]
    assert rounds[0] - rounds[1] == sum(wide)


def test_no_products_are_with_shared_weights_or_exact_rounding() -> None:
    for setting in ({"weights": "shared"}, {"rounding": "exact"}):
        _, program = compiled("llama", network="wan", **setting)
        assert _wide(program) and not any(_wide(program))


def test_a_larger_ring_is_left_where_its_words_take_longer_than_a_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    far = NETWORKS["wan"].parties
    monkeypatch.setitem(NETWORKS, "wan3", Network(far, far, Link(far.latency, 1e5)))
    model, captured = float_decoder("llama")
    config = CompileConfig(max_length=64, network="wan3")
    program = compile_decoder(model, config=config, captured=captured)
    assert _wide(program) and not any(_wide(program))


def test_exact_rounding_leaves_pairs() -> None:
    """And no word of a reach: finer tables need keys."""
    _, program = compiled("llama", network="wan", rounding="exact")
    assert set(_shifts(program)) == {"pairs"}
    for name in ("attention", "glu"):
        known = list(inspect.signature(REGISTRY[name].reference).parameters)
        items = [i for i in program.any_role.instructions if i.target == f"mpc.{name}"]
        place = known.index("reach")
        assert items and all(len(item.args) <= place and not item.kwargs for item in items)


def test_a_program_for_few_tokens_is_chosen_for_as_many_as_it_takes() -> None:
    """A row of 16 scores takes as many rounds either way, and fewer bytes by pairs."""
    assert set(_shifts(_of_wide_rows("wan3", max_length=16))) == {"pairs-to-server"}


def test_the_dealer_s_bytes_count_where_a_step_would_wait_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Histograms save rounds for dealt bytes: not where these are what takes long."""
    far = NETWORKS["wan"].parties
    for bandwidth, shift in ((far.bandwidth, "histogram"), (1e4, "pairs")):
        slow = Network(far, Link(far.latency, bandwidth), Link(far.latency, bandwidth))
        monkeypatch.setitem(NETWORKS, "wan3", slow)
        program = _of_wide_rows.__wrapped__("wan3")
        assert set(_shifts(program)) == {f"{shift}-to-server"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("network", ["loopback", "wan"])
def test_the_client_is_dealt_little(family: str, network: str) -> None:
    """Nothing but keys of powers, of prompts' maxima, and of logarithms where parties are far."""
    _, program = compiled(family, network=network)
    reaches = [
        item.args[3:] if item.target == "mpc.glu" else item.args[2:]
        for item in program.any_role.instructions
        if item.target in ("mpc.glu", "mpc.gelu")
    ]
    assert reaches and all(reaches)
    for new, past in ((40, 0), (1, 50)):
        dealt = dealt_bytes(program.any_role, new, past)
        assert dealt["client"] < 0.2 * dealt["server"]
    assert chosen_otherwise(program.any_role, NETWORKS[network], 16) == {}


def test_activations_take_tables_for_the_server_on_every_network() -> None:
    """They are no longer than what keys take on the server's link alone."""
    lan, wan = (
        compiled("llama", network=name, disable=("defer_norm",))[1] for name in ("lan", "wan")
    )
    near, far = (
        [item.args[3] for item in p.any_role.instructions if item.target == "mpc.glu"]
        for p in (lan, wan)
    )
    assert near == far and near and all(near), "the powers of two that gates stay below"
    assert chosen_otherwise(lan.any_role, NETWORKS["lan"], 16) == {}


def test_inputs_that_reach_far_keep_their_keys() -> None:
    model = random_decoder("llama").float()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight *= 3000
    program = compile_decoder(model, config=CompileConfig(max_length=64, network="wan"))
    items = [item for item in program.any_role.instructions if item.target == "mpc.glu"]
    assert items and all(len(item.args) == 3 for item in items)


def test_a_prompt_is_shifted_by_pairs() -> None:
    """They take fewer dealt bytes, of which a prompt has many."""
    near, far = _of_wide_rows("loopback"), _of_wide_rows("wan3")

    def first(program: Program, new: int, past: int) -> Cost:
        rows = cost_report(program.any_role, new, past).rows
        return next(row.cost for row in rows if row.target == "mpc.attention")

    one, other = first(near, 50, 0), first(far, 50, 0)
    assert (one.rounds, one.online) == (other.rounds, other.online)
    assert first(near, 8, 42).rounds > first(far, 8, 42).rounds
