"""reveal="token": whole programs in which the client learns the chosen token alone."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest
import torch

from mergec import Program
from mergec.compiler.answer import Answer
from mergec.compiler.backend.cost import cost_report
from mergec.runtime.core.errors import PromptError
from mergec.runtime.core.spec import CLIENT, Vis
from mergec.runtime.program.manifest import Manifest
from mergec.runtime.roles.inprocess import InProcessSession
from mergec.runtime.roles.local import run_local
from mergec.runtime.session.requests import Plan
from mergec.runtime.session.sampling import Sampling, draw_for
from mergec.runtime.session.stores.reader import Store
from mergec.runtime.transport.authority import make_certificates
from mergec.runtime.transport.connect import Security
from tests.families import VOCAB, tokens
from tests.services import deployment
from tests.session import compiled

STEPS = ([int(t) for t in tokens(6)[0]], [7], [1, 2])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Program:
    path = tmp_path_factory.mktemp("token") / "bundles"
    compiled("llama", reveal="token")[1].save(path)
    return Program.load(path)


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("gemma2", {"network": "wan"}), ("gpt2", {"weights": "shared"})],
)
def test_steps_give_the_models_token_at_the_predicted_price(
    family: str, options: dict[str, str]
) -> None:
    """gemma2 caps its logits at the end; here the parties compute that cap."""
    model, program = compiled(family, reveal="token", **options)
    targets = [item.target for item in program.any_role.instructions]
    assert [target for target in targets if "reveal" in target] == ["mpc.reveal_token"]
    past, seen = 0, []
    with InProcessSession(program.roles) as session:
        for ids in STEPS:
            token = session.step(ids, past)
            predicted = cost_report(program.any_role, len(ids), past).total
            assert session.record.total == predicted
            seen += ids
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([seen])).logits[0, -1]
            assert logits[int(token)] > logits.max() - 0.02
            past += len(ids)


def test_sampled_tokens_follow_the_model(saved: Program) -> None:
    """The same step again and again: the share of each token is its probability."""
    model, _ = compiled("llama")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[7]])).logits[0, -1].double()
    temperature, count = 0.05, 30
    wanted = torch.softmax(logits / temperature, -1)
    manifest = Manifest(reveal="token", vocab_size=VOCAB)
    draw = draw_for(Sampling(temperature=temperature), manifest)
    with InProcessSession(saved.roles) as session:
        drawn = [int(session.step([7], 0, draw)) for _ in range(count)]
    counts = collections.Counter(drawn)
    for token, probability in enumerate(wanted.tolist()):
        spread = (count * probability * (1 - probability)) ** 0.5
        assert abs(counts[token] - count * probability) < 5 * spread + 1


@pytest.mark.slow
def test_three_processes(saved: Program) -> None:
    """Greedy like plaintext, at the predicted cost."""
    assert saved.path is not None
    greedy = run_local(saved.path, STEPS[0], max_tokens=2, ignore_stop=True)
    plain = saved.plaintext(Answer("", STEPS[0], greedy.tokens))
    assert greedy.tokens == plain.tokens
    for record in greedy.records:
        predicted = cost_report(saved.any_role, record.new, record.past).total
        assert record.rounds == predicted.rounds
        assert record.sent + record.received == predicted.online
        assert record.offline_bytes == predicted.offline


def test_services_draw_as_the_client_asks(saved: Program, tmp_path: Path) -> None:
    """Over TLS: greedy, from the best two, and a request that is refused, in one session."""
    assert saved.path is not None
    model, _ = compiled("llama")
    make_certificates(tmp_path, ("ann",))
    certs = ("--certs", str(tmp_path))
    with (
        deployment(saved.path, serve=certs, deal=certs) as made,
        made.connection(security=Security("client", tmp_path / "ann")) as connection,
    ):
        for sampling in (Sampling(), Sampling(temperature=0.7, top_k=2)):
            text = list(STEPS[0])
            answer = connection.generate(text, max_tokens=2, sampling=sampling, stop=())
            for token in answer:
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([text])).logits[0, -1]
                least = logits.topk(2).values[1] if sampling.top_k else logits.max()
                assert logits[token.token] > least - 0.02
                assert token.logits is None
                text.append(token.token)
        with pytest.raises(PromptError, match="top-p needs the logits"):
            next(connection.generate([1], sampling=Sampling(temperature=1.0, top_p=0.5)))
        assert connection.is_open


def test_stored_randomness_draws_among_all_tokens(tmp_path: Path) -> None:
    """With shared weights as well; their static masks come from the store, too."""
    _, program = compiled("gpt2", reveal="token", weights="shared")
    bundles, key = program.save(tmp_path / "bundles"), tmp_path / "key"
    key.write_text("ab" * 32)
    plan = Plan(answers=2, prompt=2, tokens=1)
    options = ("--stores", str(tmp_path / "server"), "--store-key", str(key))
    with deployment(bundles, serve=options) as made:
        place, _ = made.connection().prepare(plan, tmp_path / "client", bytes.fromhex("ab" * 32))
        made.dealer.end()
        store = Store.open(place, bytes.fromhex("ab" * 32))
        with made.connection(dealer=None, store=store) as connection:
            greedy = [t.token for t in connection.generate([3, 5], max_tokens=2, stop=())]
            plain = program.plaintext(Answer("", [3, 5], greedy))
            assert greedy == plain.tokens
            with pytest.raises(PromptError, match="does not support top-k; set it to 0"):
                next(connection.generate([3, 5], sampling=Sampling(temperature=1.0, top_k=2)))
            drawn = connection.generate([3, 5], max_tokens=1, sampling=Sampling(temperature=1.0))
            assert 0 <= next(drawn).token < VOCAB


@pytest.mark.slow
def test_stock_protocols(saved: Program) -> None:
    assert saved.path is not None
    stock = run_local(saved.path, STEPS[0], max_tokens=1, mode="crypten", ignore_stop=True)
    assert 0 <= stock.tokens[0] < VOCAB


def test_requests_that_need_the_logits_are_refused(saved: Program) -> None:
    assert saved.path is not None
    for options, words in (
        ({"temperature": 1.0, "top_p": 0.5}, "top-p needs the logits"),
        ({"temperature": 1.0, "top_k": 50}, "top-k is 50"),
        ({"temperature": 1.0, "mode": "crypten"}, "only greedy choice"),
    ):
        with pytest.raises(PromptError, match=words):
            run_local(saved.path, STEPS[0], **options)  # type: ignore[arg-type]


def test_the_client_gets_four_bytes(saved: Program) -> None:
    """The only message that is not masked goes to the client, and is not the size of the logits."""
    (reveal,) = [row for row in cost_report(saved.any_role, 1, 5).rows if "token" in row.target]
    assert reveal.vis is Vis.CLIENT
    assert reveal.shape == (1, 1)
    assert saved.manifest.reveal == "token"
    assert saved.roles["client"].outputs[CLIENT].startswith("reveal_token")
