"""Public text: computed in the clear at the server, and continued as if it had been secret."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Whitespace

from mergec.runtime.core.context import ClientContext
from mergec.runtime.core.draw import Draw
from mergec.runtime.core.errors import MergecError, PartyError, PromptError
from mergec.runtime.core.spec import CLIENT, DEALER, ROLES, SERVER
from mergec.runtime.core.values import Sent, decode, encode
from mergec.runtime.engine.audit import audit
from mergec.runtime.engine.audit_report import SERVERS
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.roles.inprocess import InProcessSession
from mergec.runtime.roles.local import run_local
from mergec.runtime.session.conversations import Place, public_source
from mergec.runtime.session.public_blocks import compute_all
from mergec.runtime.session.public_text import (
    PublicText,
    check_public,
    digest_of_tokens,
    prompt_tokens,
    public_tokens,
    read_digests,
    read_lengths,
    tokens_of_file,
)
from mergec.runtime.session.requests import write_step
from mergec.runtime.session.text import Text
from mergec.runtime.transport.frames import Kind
from tests import decoder
from tests.services import Deployment, answered, deployment
from tests.session import compiled

PUBLIC, SECRET = [5, 1, 7, 2, 9], [3, 12]
FIRST = Place(0, public_source(0))


def programs() -> dict[str, Any]:
    return {role: decoder.program(role) for role in ROLES}


def elements(program: Any, length: int) -> int:
    """Numbers that the caches hold of so many tokens."""
    specs = [spec for spec in program.inputs if spec.cache_output]
    return sum(length * prod(n for n in spec.shape if isinstance(n, int)) for spec in specs)


# ------------------------------------------------------------------------------- the computation


CHOICES: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {}),  # learned positions
    ("llama", {}),  # rotary ones
]
SLOW: list[tuple[str, dict[str, Any]]] = [
    ("bloom", {}),
    ("gemma2", {}),
    ("llama", {"weights": "shared"}),
    ("llama", {"rounding": "exact"}),
    ("llama", {"network": "wan"}),
    ("gpt2", {"preset": "mpcformer-2quad"}),
    ("gpt2", {"preset": "merge-mm"}),  # constant attention: values are sent, not opened
]


def compare(family: str, options: dict[str, Any]) -> None:
    """Logits of three steps after a public text, against those after the same text in secret."""
    _, program = compiled(family, **options)
    generator = torch.Generator().manual_seed(1)
    limit = min(program.manifest.vocab_size or 32, 32)
    ids = torch.randint(0, limit, (20,), generator=generator).tolist()
    public, steps = ids[:12], [ids[12:17], ids[17:18], ids[18:20]]
    plain = PlainExecutor(program.roles["server"])
    with InProcessSession(program.roles, public=[ids[:3], public]) as session:
        past = len(public)
        session.step(public, 0)
        secret = [session.step(new, past + sum(map(len, steps[:n]))) for n, new in enumerate(steps)]
        costs = []
        session.turn_to(Place(1, public_source(1)))
        for n, new in enumerate(steps):
            found = session.step(new, past)
            costs.append(session.record.total)
            past += len(new)
            caches, fed = plain.start(), torch.tensor([ids[:past]])
            (logits,) = set(plain.program.outputs) - {
                spec.cache_output for spec in plain.program.inputs
            }
            name = plain.program.inputs[0].name
            clear = plain.step({name: fed, **caches}, [logits])[logits].reshape(-1, found.numel())
            error = float((found - clear[-1]).abs().max())
            usual = float((secret[n] - clear[-1]).abs().max())
            # Public rows are rounded once; secret ones have an error of the protocols' besides.
            assert error <= 2 * usual + 2**-9, (family, options, n, error, usual)
    assert all(cost.rounds == costs[0].rounds for cost in costs)


@pytest.mark.parametrize(("family", "options"), CHOICES)
def test_logits_are_those_of_a_secret_prompt(family: str, options: dict[str, Any]) -> None:
    compare(family, options)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "options"), SLOW)
def test_logits_are_those_of_a_secret_prompt_in_other_programs(
    family: str, options: dict[str, Any]
) -> None:
    compare(family, options)


def computed(program: RoleProgram, tokens: list[int]) -> PublicText:
    (found,) = compute_all(program, [PublicText(len(tokens), tokens=tokens)])
    return found


def test_rows_are_what_the_program_computes_rounded_once() -> None:
    program = decoder.program("server")
    plain = PlainExecutor(program)
    expected = plain.step({"ids": torch.tensor([PUBLIC]), **plain.start()})
    found = computed(program, PUBLIC)
    assert found.length == len(PUBLIC)
    for name in ("cache.k", "cache.v"):
        assert torch.equal(found.rows[name], encode(expected[f"{name}.next"], 16))
        apart = (decode(found.rows[name], 16) - expected[f"{name}.next"]).abs().max()
        assert 0 < apart <= 2**-17


def test_bytes_and_masks() -> None:
    """8 bytes for each number of the caches, one way, once; nothing is dealt."""
    with InProcessSession(programs()) as usual:
        before = usual._links[CLIENT].traffic.snapshot()
    with InProcessSession(programs(), public=[PUBLIC, SECRET]) as session:
        spent = session._links[CLIENT].traffic - before
        count = elements(decoder.program(), len(PUBLIC) + len(SECRET))
        assert (spent.received, spent.sent, spent.rounds) == (8 * count, 0, 2)
        held = [session._sessions[party]._others for party in (CLIENT, SERVER, DEALER)]
        assert all(executor.context.offline_bytes == 0 for executor in session.executors.values())
        words = []
        for number, tokens in enumerate((PUBLIC, SECRET)):
            rows = computed(decoder.program(), tokens).rows
            for name, expected in rows.items():
                client, server, dealer = (h[public_source(number)].caches[name] for h in held)
                assert torch.equal(client.opened, server.opened)
                assert torch.equal(server.opened - server.mask, expected)
                assert not client.mask.any()
                assert dealer.opened.is_meta
                assert torch.equal(dealer.mask, server.mask)
                words.append(server.mask.flatten())
        every = torch.cat(words)
        assert every.unique().numel() == every.numel() == count
        # Using a text sends nothing more, however often, and no role's rows change.
        masks = every.clone()
        link = session._links[CLIENT].traffic
        for conversation in (0, 1, 2):
            before = link.snapshot()
            session.turn_to(Place(conversation, public_source(0)))
            assert (link - before).online == 0
            session.step(SECRET, len(PUBLIC))
        kept = [
            held[SERVER][public_source(n)].caches[name].mask.flatten()
            for n in (0, 1)
            for name in ("cache.k", "cache.v")
        ]
        assert torch.equal(torch.cat(kept), masks)


def test_masks_are_fresh_in_each_session_and_never_those_of_steps() -> None:
    seeds = (b"c" * 32, b"s" * 32)
    with InProcessSession(programs(), seeds=seeds, public=[PUBLIC]) as first:
        one = first._sessions[SERVER]._others[-1].caches["cache.k"].mask
        first.turn_to(FIRST)
        first.step(SECRET, len(PUBLIC))
        later = first._sessions[SERVER]._caches["cache.k"].mask
    assert torch.equal(later[..., : len(PUBLIC), :], one)
    assert not set(later[..., len(PUBLIC) :, :].flatten().tolist()) & set(one.flatten().tolist())
    with InProcessSession(programs(), public=[PUBLIC]) as second:
        other = second._sessions[SERVER]._others[-1].caches["cache.k"].mask
    assert not set(other.flatten().tolist()) & set(one.flatten().tolist())


def test_a_step_after_public_text_costs_what_it_does_after_secret_text() -> None:
    with InProcessSession(programs(), public=[PUBLIC]) as session:
        session.step(PUBLIC, 0)
        session.step(SECRET, len(PUBLIC))
        usual = session.record.total
        session.turn_to(FIRST)
        session.step(SECRET, len(PUBLIC))
        assert session.record.total == usual


def test_a_form_that_is_sent_has_no_message() -> None:
    _, program = compiled("gpt2", preset="merge-mm")
    forms = {spec.form for spec in program.any_role.inputs if spec.cache_output}
    assert forms == {"sent"}
    with InProcessSession(program.roles) as usual:
        before = usual._links[CLIENT].traffic.snapshot()
    with InProcessSession(program.roles, public=[PUBLIC]) as session:
        assert (session._links[CLIENT].traffic - before).online == 0
        cache = next(iter(session._sessions[SERVER]._others[-1].caches.values()))
        assert isinstance(cache, Sent)


def test_the_audit_shows_the_rows() -> None:
    found = audit(decoder.program("client"))
    (row,) = [seen for seen in found.seen if seen.mask == SERVERS]
    assert (row.role, row.ring, row.revealed) == ("client", 64, False)
    assert row.words["public text"].formula == f"{elements(decoder.program(), 1)} m"
    assert not found.unmasked


# --------------------------------------------------------------------------------- what is refused


def test_what_a_program_cannot_begin_with() -> None:
    program = decoder.program("server")
    limit = decoder.LENGTH
    for tokens, words in (
        ([], "is empty"),
        ([1, decoder.VOCAB], "not in the vocabulary"),
        ([-1], "not in the vocabulary"),
        ([1] * limit, f"leaves no room in this program's {limit}"),
    ):
        with pytest.raises(PromptError, match=words):
            check_public(program, len(tokens), tokens)
    check_public(program, limit - 1, [1] * (limit - 1))
    uncached = decoder.program("server")
    uncached.inputs = uncached.inputs[:1]
    with pytest.raises(PromptError, match="has no caches"):
        check_public(uncached, 1, [1])
    with pytest.raises(PromptError, match="needs the weights"):
        computed(decoder.program("client"), PUBLIC)


@pytest.mark.slow
def test_a_program_that_resends_refuses() -> None:
    _, program = compiled("gpt2", preset="merge-er")
    with pytest.raises(PromptError, match="resends its hidden state"):
        program.generate_local([1, 2], max_tokens=1, public_prefix=[3])


@pytest.mark.parametrize(
    "found", [1, "a", [1], ["a"], [["a" * 64]], ["a" * 64] * 33, ["a" * 64] * 2, {"a": 1}]
)
def test_names_of_another_form(found: Any) -> None:
    with pytest.raises(PartyError, match="names no public text"):
        read_digests({"public": found}, "client")


@pytest.mark.parametrize("found", [1, "a", [0], [-1], [17], [True], [1.0], [1] * 33])
def test_lengths_of_another_form(found: Any) -> None:
    with pytest.raises(PartyError, match="cannot run"):
        read_lengths({"public": found}, 16, "server")


# ------------------------------------------------------------------------------------------- texts


def characters() -> Tokenizer:
    """Tokens that merge across what may follow: `ab`, `.` and line breaks."""
    letters = {letter: n for n, letter in enumerate("ab .\nc1(<>us")}
    merged = {**letters, "ab": 20, "..": 21, "\n\n": 22, ". ": 23, " b": 24}
    pairs = [("a", "b"), (".", "."), ("\n", "\n"), (".", " "), (" ", "b")]
    return Tokenizer(BPE(merged, pairs))


TEMPLATE = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("content", ["ca", "c a.", "cab a", "caa\n", "cb. "])
def test_tokens_begin_every_prompt(content: str, chat: bool) -> None:
    text = Text(characters(), {}, TEMPLATE)
    begins = public_tokens(text, content, chat)
    assert begins
    for rest in ("a", "b", ".", "..", "\n", " b", "(a", "1", "\n\n\nc"):
        whole = prompt_tokens(text, rest, chat, content)
        assert whole[: len(begins)] == begins
        assert len(whole) > len(begins)


def test_no_settled_token_is_refused() -> None:
    with pytest.raises(PromptError, match="no token"):
        public_tokens(Text(characters(), {}, None), ".", False)
    with pytest.raises(PromptError, match="is empty"):
        public_tokens(Text(characters(), {}, None), " \n", False)


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "public.txt"
    file.write_text("cab a\n\n")
    text = Text(characters(), {}, TEMPLATE)
    assert tokens_of_file(file, text) == [
        public_tokens(text, "cab a", True),
        public_tokens(text, "cab a", False),
    ]
    assert len(tokens_of_file(file, Text(characters(), {}, None))) == 1
    with pytest.raises(PromptError, match="needs the model's tokenizer"):
        tokens_of_file(file, None)
    file.write_text(" [3, 1, 2]\n")
    assert tokens_of_file(file, None) == [[3, 1, 2]]
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(PromptError, match="cannot be read"):
        tokens_of_file(file, None)
    with pytest.raises(PromptError, match="cannot be read"):
        tokens_of_file(tmp_path / "nothing", None)


def test_digests_differ() -> None:
    found = [[], [1], [2], [1, 2], [12], [0, 1], [256], [1, 0]]
    assert len({digest_of_tokens(tokens) for tokens in found}) == len(found)


# --------------------------------------------------------------------------------- three processes


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder.save(tmp_path_factory.mktemp("public"), model="tiny")


@pytest.fixture(scope="module")
def deployed(bundles: Path) -> Iterator[Deployment]:
    files = []
    for number, tokens in enumerate((PUBLIC, [4, 4])):
        file = bundles / f"public{number}"
        file.write_text(json.dumps(tokens))
        files += ["--public-prompt", str(file)]
    with deployment(bundles, serve=(*files, "--timeout", "8", "--grace", "5")) as made:
        yield made


def test_a_connection_begins_with_public_text(deployed: Deployment, bundles: Path) -> None:
    prompt = [*PUBLIC, *SECRET]
    expected = decoder.plaintext(bundles, prompt, 3)
    with deployed.connection() as connection:
        usual = connection.setup
        assert answered(connection, prompt, 3) == (expected, [len(prompt), 1, 1])
    options = {"public_prefixes": [PUBLIC, [4, 4]], "reuse": False}
    with deployed.connection(**options) as connection:
        count = elements(connection.program, len(PUBLIC) + 2)
        assert connection.setup.received - usual.received == 8 * count
        assert connection.setup.sent == usual.sent
        assert answered(connection, prompt, 3) == (expected, [len(SECRET), 1, 1])
        for other in ([4, 4, 1], [2, 6], PUBLIC, PUBLIC[:2], [*PUBLIC, 6]):
            new = {(4, 4, 1): 1, (*PUBLIC, 6): 1}.get(tuple(other), len(other))
            found = answered(connection, other, 3)
            assert found == (decoder.plaintext(bundles, other, 3), [new, 1, 1])


def test_a_text_that_the_server_does_not_agree_to(deployed: Deployment, bundles: Path) -> None:
    connection = deployed.connection(public_prefixes=[PUBLIC[:-1]])
    with pytest.raises(PartyError, match="is none that the server agrees to") as refused:
        connection.open()
    assert "\n" not in str(refused.value)
    assert not connection.is_open
    with deployed.connection(public_prefixes=[PUBLIC]) as other:
        assert answered(other, [*PUBLIC, 3], 3)[0] == decoder.plaintext(bundles, [*PUBLIC, 3], 3)


def test_stored_randomness_refuses(deployed: Deployment) -> None:
    with pytest.raises(MergecError, match="stored randomness does not support public text"):
        deployed.connection(public_prefixes=[PUBLIC], dealer=None, store=object())


def test_a_text_that_does_not_fit_ends_nothing_but_the_call(deployed: Deployment) -> None:
    with pytest.raises(PromptError, match="leaves no room"):
        deployed.connection(public_prefixes=[[1] * decoder.LENGTH])


def test_a_client_names_caches_that_are_not_there(deployed: Deployment) -> None:
    with deployed.connection(public_prefixes=[PUBLIC]) as connection:
        channel = connection._peers.channels[0]
        connection._session.begin(connection._session.steps, channel, 2, 1)
        channel.send(Kind.STEP, write_step(2, 0, Draw(), Place(0, public_source(2))))
        with pytest.raises(PartyError, match="there are no caches -3"):
            channel.receive(Kind.ROUND, limit=1 << 20)


@pytest.mark.slow
def test_local_roles_begin_with_public_text(bundles: Path) -> None:
    prompt = [*PUBLIC, *SECRET]
    found = run_local(bundles, prompt, max_tokens=3, public=PUBLIC)
    assert found.tokens == decoder.plaintext(bundles, prompt, 3)
    assert [record.new for record in found.records] == [len(SECRET), 1, 1]
    assert found.setup is not None
    (weights,) = [seen for seen in audit(decoder.program()).seen if "setup" in seen.words]
    count = weights.words["setup"].at[0] + elements(decoder.program(), len(PUBLIC))
    assert found.setup.received == 8 * count
    with pytest.raises(PromptError, match="begins the prompt"):
        run_local(bundles, prompt, max_tokens=1, public=SECRET)
    with pytest.raises(PromptError, match="begins the prompt"):
        run_local(bundles, prompt, max_tokens=1, public=PUBLIC, mode="crypten")
    with pytest.raises(PromptError, match="all of the prompt is public"):
        run_local(bundles, PUBLIC, max_tokens=1, public=PUBLIC)


def test_text_in_a_word_level_vocabulary() -> None:
    words = Tokenizer(WordLevel({"be": 0, "short": 1, "why": 2, "[UNK]": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    text = Text(words, {}, None)
    assert public_tokens(text, "be short", False) == [0]
    assert prompt_tokens(text, " why", False, "be short") == [0, 1, 2]


def test_the_client_has_no_server_mask() -> None:
    mask = ClientContext(b"c" * 32, None).server_mask((2, 3))  # type: ignore[arg-type]
    assert mask.is_meta
    assert PublicText(3).rows == {}
