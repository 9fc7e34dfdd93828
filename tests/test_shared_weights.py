"""weights="shared": whole programs, the predicted cost, and that nobody else knows the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergec import CompileConfig, Program
from mergec.compiler.answer import Answer
from mergec.compiler.backend.cost import cost_report
from mergec.compiler.driver import compile_decoder
from mergec.compiler.errors import CompileError
from mergec.runtime.core.spec import CLIENT, DEALER, SERVER, Vis
from mergec.runtime.roles.local import run_local
from mergec.runtime.session.requests import Plan
from mergec.runtime.session.stores.reader import Store
from mergec.runtime.transport.authority import make_certificates
from mergec.runtime.transport.connect import Security
from tests.families import every_family, random_decoder, tokens
from tests.services import deployment
from tests.session import compiled, play

RUN = ("gpt2", "llama")
KEY = bytes.fromhex("ab" * 32)
STEPS = ([int(t) for t in tokens(6)[0]], [7], [1, 2])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Program:
    path = tmp_path_factory.mktemp("shared") / "bundles"
    compiled("llama", weights="shared")[1].save(path)
    return Program.load(path)


@every_family(RUN)
def test_every_family_compiles(family: str) -> None:
    """No value of the program is the server's alone, and its tensors are in its bundle only."""
    _, program = compiled(family, weights="shared")
    for role, side in program.roles.items():
        shared = {spec.name for spec in side.constants if spec.vis is Vis.SHARED}
        assert shared
        assert Vis.SERVER not in {spec.vis for spec in side.constants}
        assert Vis.SERVER not in {item.vis for item in side.instructions}
        assert "mpc.send" not in {item.target for item in side.instructions}
        assert shared <= set(side.tensors) if role == "server" else not shared & set(side.tensors)


@pytest.mark.parametrize("family", RUN)
def test_steps_cost_what_was_predicted_and_give_the_models_logits(family: str) -> None:
    model, program = compiled(family, weights="shared")
    steps = play(program.roles, STEPS)
    past = 0
    for ids, step in zip(STEPS, steps, strict=True):
        predicted = cost_report(program.any_role, len(ids), past)
        costs = {row.name: row.cost for row in predicted.rows}
        for party in (CLIENT, SERVER, DEALER):
            total = step.records[party].total
            assert total.rounds == predicted.total.rounds
            if party != DEALER:
                assert total.online == predicted.total.online
            if party == DEALER:
                assert total.offline == predicted.total.offline
            for name, cost in step.records[party].by_instruction.items():
                assert cost.rounds == costs[name].rounds, name
        past += len(ids)
    with torch.no_grad():
        ids = torch.tensor([[t for step in STEPS for t in step]])
        wanted = model(input_ids=ids).logits[0, -1]
    assert (steps[-1].logits.reshape(-1) - wanted).abs().max() < 0.02


@pytest.mark.slow
def test_three_processes(saved: Program) -> None:
    assert saved.path is not None
    prompt = STEPS[0]
    ours = run_local(saved.path, prompt, max_tokens=2, ignore_stop=True)
    plain = saved.plaintext(Answer("", prompt, ours.tokens))
    assert ours.tokens == plain.tokens
    for record in ours.records:
        total = cost_report(saved.any_role, record.new, record.past).total
        assert record.rounds == total.rounds
        assert record.sent + record.received == total.online
        assert record.offline_bytes == total.offline
    words = sum(
        torch.Size(spec.shape).numel()
        for spec in saved.any_role.constants
        if spec.vis is Vis.SHARED
    )
    assert ours.setup is not None
    assert ours.setup.sent + ours.setup.received == 32 + 8 * words, "each constant is opened once"


def test_services_over_tls_and_from_a_store(saved: Program, tmp_path: Path) -> None:
    """Each session has its own masks for the shared constants; sessions of one store share them."""
    assert saved.path is not None
    make_certificates(tmp_path / "certs", ("ann",))
    key = tmp_path / "key"
    key.write_text("ab" * 32)
    certs = ("--certs", str(tmp_path / "certs"))
    stores = ("--stores", str(tmp_path / "server"), "--store-key", str(key))
    ann = Security("client", tmp_path / "certs" / "ann")
    prompt = STEPS[0]
    with deployment(saved.path, serve=(*certs, *stores), deal=certs) as made:

        def ask(**options: Any) -> list[int]:
            with made.connection(security=ann, **options) as connection:
                return [t.token for t in connection.generate(prompt, max_tokens=2, stop=())]

        first = ask()
        assert first == saved.plaintext(Answer("", prompt, first)).tokens
        assert ask() == first
        place, _ = made.connection(security=ann).prepare(
            Plan(answers=2, prompt=2, tokens=len(prompt)), tmp_path / "client", KEY
        )
        made.dealer.end()
        for _ in range(2):
            assert ask(dealer=None, store=Store.open(place, KEY)) == first


@pytest.mark.slow
def test_stock_protocols(saved: Program) -> None:
    assert saved.path is not None
    stock = run_local(saved.path, STEPS[0], max_tokens=2, mode="crypten", ignore_stop=True)
    assert len(stock.tokens) == 2


def test_only_the_moving_factor_costs(saved: Program) -> None:
    """A linear layer opens 16 bytes per input instead of 8, and rounds do not increase."""
    held = cost_report(compiled("llama")[1].any_role, 1, 8)
    shared = cost_report(saved.any_role, 1, 8)
    assert saved.manifest.weights == "shared"
    assert held.total.online < shared.total.online < 2 * held.total.online
    assert shared.total.rounds <= held.total.rounds


def test_unknown_values_are_told() -> None:
    with pytest.raises(CompileError, match="weights is 'both'; it can be: server, shared"):
        CompileConfig(weights="both")


def test_what_the_server_would_compute_alone_is_computed_at_compile_time() -> None:
    """A gain that the model computes from its parameter would need a protocol on shares."""

    class Head(torch.nn.Module):
        def __init__(self, weight: torch.nn.Parameter) -> None:
            super().__init__()
            self.weight = weight
            self.steepness = torch.nn.Parameter(torch.tensor([0.3]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight) * torch.exp(self.steepness)

    model = random_decoder("llama").float()
    model.lm_head = Head(model.lm_head.weight)
    # That pass would compute it before the weights are shared.
    config = CompileConfig(
        max_length=64, weights="shared", disable=("fold_weights",), logit_noise=0
    )
    program = compile_decoder(model, config=config)
    folded = [spec for spec in program.any_role.constants if spec.name.startswith("_shared_")]
    assert [spec.shape for spec in folded] == [(1,)]
    (step,) = play(program.roles, STEPS[:1])
    with torch.no_grad():
        wanted = model(torch.tensor([STEPS[0]]), use_cache=False).logits[0, -1]
    assert (step.logits.reshape(-1) - wanted).abs().max() < 0.02
