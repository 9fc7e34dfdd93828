"""Padded prompts: answers, costs, what server and dealer see, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mergec.compiler.backend.padding import check_padding
from mergec.compiler.config import CompileConfig
from mergec.compiler.driver import compile_decoder
from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.calibration import calibration
from mergec.compiler.frontend.capture import capture
from mergec.compiler.pipeline import rewrite
from mergec.compiler.program import Program
from mergec.compiler.selection import left_out
from mergec.runtime.core.errors import BundleError, MergecError, PromptError
from mergec.runtime.core.spec import Vis
from mergec.runtime.engine.audit import audit
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.program.program import PADS
from mergec.runtime.program.validate import validate
from mergec.runtime.roles.client import Connection
from mergec.runtime.roles.inprocess import InProcessSession
from mergec.runtime.roles.local import run_local
from mergec.runtime.session.ahead import AheadPlan
from mergec.runtime.session.drafting import Speculation
from mergec.runtime.session.generation import answer, generate
from mergec.runtime.session.padding import check_padding as check_multiple
from mergec.runtime.session.padding import padded_length
from mergec.runtime.session.plain import PlainSession
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.channel import Channel, Kind
from mergec.runtime.transport.connect import Security
from tests.families import float_decoder, random_decoder, slow, tokens
from tests.services import START, Deployment, deployment, role, wait_until
from tests.session import compiled

ERROR = 2e-2
"""Error of the tiny decoders' logits under MPC, with a reserve; as without padding."""

ROUNDED = 2e-5
"""Error of float32 logits in the clear, relative to the largest."""

PROMPT, AFTER = tokens(9, seed=3)[0].tolist(), [41, 7]

FAMILIES = ("llama", "gpt2", "bloom", "gemma2")
"""Rotary and learned positions, ALiBi, and windows of four tokens."""
every_family = pytest.mark.parametrize("family", [*FAMILIES, *slow("opt", "gpt_neo", "falcon")])


def padded(family: str, **options: Any) -> tuple[Any, Program]:
    return compiled(family, pad_prompt=True, **options)


def expected(model: nn.Module, text: Sequence[int]) -> torch.Tensor:
    """The model's own logits of the last token."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([list(text)])).logits[0, -1]
    return logits.double()


# ------------------------------------------------------------------------------- the computation


@every_family
@pytest.mark.parametrize("pads", [0, 1, 6, 40])
def test_padding_changes_no_logits_in_the_clear(family: str, pads: int) -> None:
    model, program = padded(family)
    plain = PlainExecutor(program.roles["server"])
    given = {PADS: torch.tensor([pads])}
    names = [spec for spec in plain.program.inputs if spec.cache_output]
    caches, text = plain.start(), list[int]()
    filler = [program.manifest.pad_token] * pads
    for fed in ([*filler, *PROMPT], AFTER[:1], AFTER[1:]):
        text += fed[pads:] if not text else fed
        found = plain.step({"input_ids": torch.tensor([fed]), **caches, **given})
        caches = {spec.name: found[spec.cache_output or ""] for spec in names}
        logits = found[program.any_role.outputs[0]].reshape(-1).double()
        wanted = expected(model, text)
        assert (logits - wanted).abs().max() <= ROUNDED * wanted.abs().max().clamp(min=1.0)


def test_another_number_of_pads_gives_other_logits() -> None:
    """So the comparison above sees whether padding is hidden."""
    model, program = padded("llama")
    plain = PlainExecutor(program.roles["server"])
    filler = [program.manifest.pad_token] * 6
    for wrong in (0, 5, 7):
        given = {"input_ids": torch.tensor([[*filler, *PROMPT]]), PADS: torch.tensor([wrong])}
        found = plain.step({**given, **plain.start()})
        logits = found[program.any_role.outputs[0]].reshape(-1).double()
        assert (logits - expected(model, PROMPT)).abs().max() > ERROR


OPTIONS: dict[str, Any] = {"exact": {"rounding": "exact"}, "shared": {"weights": "shared"}}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, "") for family in ("llama", "gpt2")),
        *(
            pytest.param(family, options, marks=pytest.mark.slow)
            for family, options in (
                ("bloom", ""),
                ("gemma2", ""),
                ("opt", ""),
                ("llama", "exact"),
                ("gpt2", "exact"),
                ("gpt2", "shared"),
                ("bloom", "exact"),
            )
        ),
    ],
)
def test_answers_under_mpc_are_those_of_the_prompt(family: str, options: str) -> None:
    """Logits of prompts, later tokens and rolled-back ones; and every step costs the same."""
    model, program = padded(family, **OPTIONS.get(options, {}))
    costs = []
    with InProcessSession(program.roles) as session:
        for pads in (6, 2, 0):
            session.pads = pads
            text = [*PROMPT, 23][: 10 - pads]
            fed = [*[program.manifest.pad_token] * pads, *text]
            spent = []
            for new, past in ((fed, 0), (AFTER[:1], 10), (AFTER, 10)):
                logits = session.step(new, past)
                whole = [*fed, *new] if past else fed
                wanted = expected(model, whole[pads:])
                assert (logits.double() - wanted).abs().max() < ERROR
                spent.append(session.record)
            costs.append(spent)
    assert costs[0] == costs[1] == costs[2]


def test_a_prompt_in_overlapping_halves() -> None:
    model, program = padded("gpt2")
    with InProcessSession(program.roles) as session:
        session.pads = 7
        logits = session.step([*[0] * 7, *PROMPT], 0, split=8)
        assert (logits.double() - expected(model, PROMPT)).abs().max() < ERROR


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_the_mask_costs(family: str) -> None:
    """Nothing at the transport; rows of learned positions are looked up, at 8 bytes each."""
    records, lengths = [], (16, 1)
    for program in (compiled(family)[1], padded(family)[1]):
        with InProcessSession(program.roles) as session:
            found = []
            for new, past in ((lengths[0], 0), (1, lengths[0])):
                session.step([5] * new, past)
                found.append(session.record.total)
            records.append(found)
    rows = 64 if family == "gpt2" else 0
    for without, with_it, new in zip(*records, lengths, strict=True):
        assert with_it.rounds == without.rounds
        assert with_it.online - without.online == 8 * rows * new


def test_the_reach_leaves_room_for_hidden_scores() -> None:
    """ALiBi spreads rows the further the more keys there are, so the chosen way is another one."""
    reaches = []
    for program in (compiled("bloom")[1], padded("bloom")[1]):
        calls = [i for i in program.any_role.instructions if i.target == "mpc.attention"]
        reaches.append({item.args[8] for item in calls})
    (without,), (with_it,) = reaches
    assert with_it > without


# ----------------------------------------------------------------------------- the client's loop


class Told:
    """A session in the clear, and the lengths of its steps as the other roles are told them."""

    def __init__(self, program: Program) -> None:
        self.session = PlainSession(PlainExecutor(program.roles["server"]))
        self.steps: list[tuple[int, int]] = []

    def answer(self, prompt: Sequence[int], **options: Any) -> list[int]:
        self.steps = []
        return generate(
            self.session, prompt, announce=lambda *step: self.steps.append(step), **options
        )


LOOPS: dict[str, dict[str, Any]] = {
    "whole": {},
    "pieces": {"piece": 5},
    "stored": {"first": 8},
    "fixed": {"fixed_length": True, "stop": [0]},
}


@pytest.mark.parametrize("name", LOOPS)
def test_steps_are_those_of_a_longer_prompt(name: str) -> None:
    options = {"max_tokens": 5, **LOOPS[name]}
    told = Told(padded("gpt2")[1])
    lengths = []
    for pads in (0, 1, 8):
        prompt = PROMPT[pads:]
        found = told.answer(prompt, pads=pads, **options)
        lengths.append(told.steps)
        assert found == told.answer(prompt, **{**options, "first": 0})
    assert lengths[0] == lengths[1] == lengths[2]


@pytest.mark.parametrize("options", [{}, {"fixed": 2.0}, {"tree": True}], ids=str)
def test_drafts_behind_a_padded_prompt(options: dict[str, Any]) -> None:
    """What drafts sees the prompt alone, so it drafts the same, and the answer is the same."""
    prompt, answers, accepted = [5, 9, 5, 9, 5], [], []
    for pads in (0, 3):
        told = Told(padded("gpt2", speculate_up_to=4)[1])
        drafts = Speculation.open("lookup", 3, told.session.program.manifest, None, **options)
        assert drafts is not None
        reports: list[Any] = []
        found = told.answer(
            prompt, max_tokens=12, pads=pads, speculation=drafts, on_step=reports.append
        )
        answers.append(found)
        accepted.append([(report.drafted, report.accepted) for report in reports])
    assert answers[0] == answers[1] == told.answer(prompt, max_tokens=12)
    assert accepted[0] == accepted[1] and sum(right for _, right in accepted[0])


def test_a_penalty_for_repetition_does_not_see_padding() -> None:
    from mergec.runtime.session.sampling import Sampling

    told = Told(padded("gpt2")[1])
    pad = told.session.program.manifest.pad_token
    options = {"max_tokens": 6, "sampling": Sampling(repetition_penalty=1e6)}
    for prompt in (PROMPT, [pad + 1, *PROMPT]):
        assert told.answer(prompt, pads=5, **options) == told.answer(prompt, **options)


def test_padded_lengths() -> None:
    for length in range(1, 40):
        assert padded_length(length, 0, 64) == length
        for multiple in (1, 3, 8, 50):
            free, held = (padded_length(length, multiple, room) for room in (0, 40))
            assert free % multiple == 0 and free - multiple < length <= free
            assert held == min(free, 40)
    # All lengths between two multiples become the same one.
    assert {padded_length(n, 8, 30) for n in range(25, 31)} == {30}


def test_what_cannot_be_padded() -> None:
    manifest = padded("llama")[1].manifest
    check_multiple(0, manifest)
    check_multiple(63, manifest)
    with pytest.raises(PromptError, match="-1; give a number of tokens above 0"):
        check_multiple(-1, manifest)
    with pytest.raises(PromptError, match="64 tokens leaves no room in this program's 64"):
        check_multiple(64, manifest)
    plain = compiled("llama")[1]
    with pytest.raises(PromptError, match="takes no padding; compile it with pad_prompt"):
        check_multiple(8, plain.manifest)
    session = PlainSession(PlainExecutor(plain.roles["server"]))
    with pytest.raises(PromptError, match="takes no padding"):
        next(answer(session, PROMPT, max_tokens=2, pads=3))
    session = PlainSession(PlainExecutor(padded("llama")[1].roles["server"]))
    with pytest.raises(PromptError, match="the prompt has 60 tokens, which with 5"):
        next(answer(session, PROMPT, max_tokens=5, pads=51))


# ------------------------------------------------------------------------------------- the roles


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return padded("gpt2")[1].save(tmp_path_factory.mktemp("padded"))


def test_three_processes(bundles: Path) -> None:
    program = padded("gpt2")[1]
    for count in (3, 9):
        prompt = tokens(count, seed=count)[0].tolist()
        found = run_local(bundles, prompt, max_tokens=4, pad_prompt=8)
        plain = PlainExecutor(program.roles["server"]).generate(prompt, 4)
        assert found.tokens == [token for token, _ in plain]
        length = 8 if count <= 8 else 16
        assert [(r.new, r.past) for r in found.records] == [
            (length, 0), *((1, length + n) for n in range(3))
        ]  # fmt: skip


OWN = {"token", "salt", "seed", "session", "timestamp", "client", "name"}
"""Fields of messages and logs that are fresh in each session."""


def watch_frames() -> None:
    """Let a role log what it receives: kind and size of each frame, and what is not masked."""
    accept, receive, read = Channel._accept, Channel.receive_any, Channel.object

    def log(**fields: Any) -> None:
        os.write(2, (json.dumps(fields) + "\n").encode())

    def accepted(
        channel: Any, kinds: Any, least: int, most: int, header: Any, into: Any = None
    ) -> Any:
        if header[0] != Kind.ALIVE:
            log(event="frame", peer=channel.peer, kind=header[0], size=header[2])
        return accept(channel, kinds, least, most, header, into)

    def received(channel: Any, *kinds: Any, **options: Any) -> Any:
        kind, payload = receive(channel, *kinds, **options)
        if kind in (Kind.STEP, Kind.AHEAD):
            log(event="request", peer=channel.peer, request=bytes(payload).hex())
        return kind, payload

    def told(channel: Any, payload: Any) -> Any:
        fields = read(channel, payload)
        log(event="told", peer=channel.peer, fields=fields)
        return fields

    channel: Any = Channel
    channel._accept, channel.receive_any, channel.object = accepted, received, told


@pytest.fixture(scope="module")
def watched(bundles: Path) -> Iterator[Deployment]:
    """Services whose logs and metrics tell all that they see."""
    given = ("--plaintext", "--metrics", "127.0.0.1:0")
    with role("deal", bundles, *given, patch=watch_frames) as dealer:
        at = ("--dealer", str(dealer.address), "--rate", "0")
        with role("serve", bundles, *given, *at, patch=watch_frames) as server:
            yield Deployment(bundles, server, dealer)


def counted(watched: Deployment) -> dict[str, dict[str, float]]:
    """The metrics of both roles, without times and memory."""
    found: dict[str, dict[str, float]] = {}
    for name, service in watched.roles.items():
        page = urllib.request.urlopen(f"http://{service.metrics}/metrics", timeout=START)
        lines = [line.rsplit(" ", 1) for line in page.read().decode().splitlines()]
        found[name] = {
            key: float(value)
            for key, value in lines
            if key.startswith("mergec") and "seconds" not in key and "_created" not in key
        }
    return found


UNORDERED = (
    ("frame", Kind.HELLO), ("told", None), ("session joined", None), ("session ended", None),
)  # fmt: skip
"""What is noted while both parties come to the dealer, or leave it, one of them first."""


def seen(watched: Deployment, prompt: list[int], **options: Any) -> tuple[list[int], Any]:
    """An answer in a session of its own, and all that server and dealer see of that session."""
    before, since = counted(watched), {k: len(r.log) for k, r in watched.roles.items()}
    ended = {k: sum(x["event"] == "session ended" for x in r.log) for k, r in watched.roles.items()}
    with watched.connection(pad_prompt=8, **options) as connection:
        found = [token.token for token in connection.generate(prompt, max_tokens=4)]
    # A session is counted until its process is gone, which is after it has said that it ended.
    wait_until(
        lambda: (
            not any(
                value
                for numbers in counted(watched).values()
                for key, value in numbers.items()
                if key.endswith("_sessions")
            )
        )
    )
    views: dict[str, Any] = {}
    for name, service in watched.roles.items():
        # The dealer says so for each party.
        joined = [x["event"] for x in service.log[since[name] :]].count("session joined")
        service.wait_for("session ended", ended[name] + max(1, joined))
        view: dict[Any, Any] = {"dealt": 0}
        for line in service.log[since[name] :]:
            fields = line.get("fields", {})
            line = {key: value for key, value in line.items() if key not in OWN}
            if fields:
                line["fields"] = {key: v for key, v in fields.items() if key not in OWN}
            if line.get("kind") == Kind.BLOCK:
                view["dealt"] += line["size"]  # how a stream is cut into blocks depends on times
            elif line.get("kind") not in (Kind.DONE, Kind.END):  # a session may end before these
                # When a frame that has arrived is read, and so what is noted first, is chance.
                key = line["event"], line.get("kind"), line.get("peer")
                view.setdefault(key[:2] if key[:2] in UNORDERED else key, []).append(line)
        for key in UNORDERED:
            view.get(key, []).sort(key=json.dumps)
        views[name] = view
    after = counted(watched)
    views["metrics"] = {
        name: {key: value - before[name].get(key, 0.0) for key, value in numbers.items()}
        for name, numbers in after.items()
    }
    return found, views


def test_server_and_dealer_see_the_padded_length_alone(watched: Deployment) -> None:
    """All frames, requests, logs and metrics of prompts in one bucket are the same; and those of
    another bucket are others, so that the comparison can fail."""
    program = padded("gpt2")[1]
    seen(watched, [1, 2, 3])  # metrics begin with their first use
    views = []
    for count in (1, 3, 8, 9):
        prompt = tokens(count, seed=count)[0].tolist()
        found, view = seen(watched, prompt)
        plain = PlainExecutor(program.roles["server"]).generate(prompt, 4)
        assert found == [token for token, _ in plain]
        views.append(view)
    for view in views[1:3]:
        for name, parts in view.items():
            for part in parts | views[0][name]:
                assert parts.get(part) == views[0][name].get(part), (name, part)
    assert views[0] != views[3]
    for name in ("server", "dealer"):
        assert len(views[0][name]["frame", Kind.STEP, "client"]) == 4
        assert len(views[0][name]["request", None, "client"]) == 4
    told = [line["fields"] for line in views[1]["server"]["told", None]]
    asked = [fields for fields in told if "length" in fields]
    assert [fields["length"] for fields in asked] == [8]


def test_prompts_of_one_session_are_computed_as_a_whole(watched: Deployment) -> None:
    """How much of a prompt an earlier one has in common would tell lengths."""
    with watched.connection(pad_prompt=8) as connection:
        reports = []
        for prompt in (PROMPT, PROMPT, [*PROMPT, 3, 1]):
            assert connection.cached(prompt) == 0
            found = list(connection.generate(prompt, max_tokens=2))
            reports.append([(r.new, r.past) for token in found for r in token.reports])
        assert reports == [[(16, 0), (1, 16)]] * 3


def test_a_prompt_that_does_not_fit_is_not_sent(watched: Deployment) -> None:
    """The server would refuse it, and learn its length."""
    with watched.connection(pad_prompt=8) as connection:
        since = len(watched.server.log)
        with pytest.raises(PromptError, match="the prompt has 60 tokens, which with 5"):
            next(connection.generate([1] * 60, max_tokens=5))
        assert not [line for line in watched.server.log[since:] if line["event"] == "told"]
        # Between the last multiple that fits and the limit all lengths are the limit's.
        assert {connection.padded(length, 5) for length in range(57, 60)} == {59}


def test_a_proxy_asks_for_no_more_than_fits_behind_padding(watched: Deployment) -> None:
    """What a request may ask for is told to the server, so it follows from the padded length."""
    from mergec.runtime.proxy.sessions import Sessions

    sessions = Sessions.__new__(Sessions)
    sessions._first = watched.connection(pad_prompt=8)
    assert {sessions.padded(length) for length in range(9, 17)} == {16}
    assert {sessions.padded(length) for length in range(57, 64)} == {63}
    assert sessions.padded(64) == 64  # refused with that length, by the endpoint itself


def test_padding_goes_with_stored_randomness(bundles: Path, tmp_path: Path) -> None:
    from mergec.runtime.session.requests import Plan
    from mergec.runtime.session.stores.reader import Store

    key, place = os.urandom(32), tmp_path / "key"
    place.write_bytes(key.hex().encode())
    serve = ("--stores", str(tmp_path / "server"), "--store-key", str(place))
    with deployment(bundles, serve=serve) as deployed:
        folder, _ = deployed.connection().prepare(Plan(2, 8, 4), tmp_path / "client", key)
        store = Store.open(folder, key)
        options = {"store": store, "dealer": None, "pad_prompt": 8}
        for prompt in (PROMPT[:3], PROMPT[:8]):
            with deployed.connection(**options) as connection:
                found = list(connection.generate(prompt, max_tokens=4))
            plain = PlainExecutor(padded("gpt2")[1].roles["server"]).generate(prompt, 4)
            assert [t.token for t in found] == [token for token, _ in plain]
            assert [r.new for t in found for r in t.reports] == [8, 1, 1, 1]


def test_what_a_connection_refuses(bundles: Path, tmp_path: Path) -> None:
    def connection(place: Path = bundles, **options: Any) -> Connection:
        return Connection(
            place / "client",
            server=Address("127.0.0.1", 1),
            dealer=Address("127.0.0.1", 2),
            security=Security("client", None, plaintext=True),
            **options,
        )

    with pytest.raises(PromptError, match="padding would stand between the public text and"):
        connection(pad_prompt=8, public_prefixes=[[1, 2]])
    with pytest.raises(PromptError, match="padding would stand between the public text and"):
        connection(pad_prompt=8, public_blocks=[[1, 2]])
    for name, value, words in (
        ("pad_prompt", -8, "pad_prompt is -8; it can be 0 or more"),
        ("prompt_piece", -3, "prompt_piece is -3; it can be 0 or more"),
        ("prompt_piece", 2.5, "prompt_piece is 2.5; it must be a whole number, 0 or more"),
        ("ranks", 0, "ranks is 0; it can be 1 or more"),
    ):
        with pytest.raises(PromptError, match=words):
            connection(**{name: value})
    with pytest.raises(MergecError, match="with pad_prompt none does"):
        connection(pad_prompt=8, ahead=AheadPlan(4, 0, 10**9))
    with pytest.raises(PromptError, match="64 tokens leaves no room"):
        connection(pad_prompt=64)
    plain = compiled("llama")[1].save(tmp_path)
    with pytest.raises(PromptError, match="takes no padding; compile it with pad_prompt"):
        connection(plain, pad_prompt=8)
    with pytest.raises(PromptError, match="padding would stand between the public text and"):
        run_local(bundles, PROMPT, max_tokens=2, pad_prompt=8, public=PROMPT[:2])
    with pytest.raises(PromptError, match="CrypTen's stock protocols take no padding"):
        run_local(bundles, PROMPT, max_tokens=2, mode="crypten")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--pad-prompt", "0"), 2, "greater than or equal to 1"),
        (("--pad-prompt", "64"), 1, "leaves no room in this program's 64"),
        (("--pad-prompt", "8", "--public-prompt", "FILE"), 1, "padding would stand between"),
    ],
)
def test_the_command_line_refuses(
    bundles: Path, tmp_path: Path, options: tuple[str, ...], code: int, words: str
) -> None:
    public = tmp_path / "public.txt"
    public.write_text("1 2")
    given = [str(public) if option == "FILE" else option for option in options]
    asked = ("generate", str(bundles), "--plaintext", "--ids", "--prompt", "1 2 3 4")
    result = subprocess.run(
        [sys.executable, "-m", "mergec", *asked, *given], capture_output=True, text=True
    )
    assert result.returncode == code
    assert words in " ".join(result.stderr.split())


# ------------------------------------------------------------------------------------ the compile


def test_programs_without_padding_are_as_before() -> None:
    program = compiled("llama")[1].any_role
    assert not program.pads and program.manifest.pad_token == -1
    assert "pad_token" not in program.manifest.to_dict()
    assert program.manifest.left_out["pad_prompt"] == "the option `pad_prompt` does not ask for it"
    assert "pads" not in audit(program).facts
    found = audit(padded("llama")[1].any_role)
    assert found.facts["pads"] and "the padded length; how much of it" in found.to_text()
    assert not found.unmasked


def test_a_step_with_padding_is_what_one_without_it_is() -> None:
    """To everybody but the client, the number changes nothing that the audit counts."""
    found, other = (audit(make("llama")[1].any_role) for make in (padded, compiled))
    assert found.sent == other.sent and found.rounds == other.rounds
    assert found.seen == other.seen and found.dealt == other.dealt


def test_a_bundle_that_hides_what_its_padding_is() -> None:
    program = padded("llama")[1].roles["client"]
    validate(program, "here")
    with pytest.raises(BundleError, match="pad_token is -1"):
        validate(replace(program, manifest=replace(program.manifest, pad_token=-1)), "here")
    with pytest.raises(BundleError, match="pad_token is 97"):
        replace(program.manifest, pad_token=97)
    for change in (
        {"vis": Vis.SERVER},
        {"vis": Vis.PUBLIC},
        {"shape": (1, "new")},
        {"dtype": "torch.float32"},
        {"cache_output": program.outputs[1]},
    ):
        inputs = [replace(s, **change) if s.name == PADS else s for s in program.inputs]
        with pytest.raises(BundleError, match="'pads'"):
            validate(replace(program, inputs=inputs), "here")


def test_a_program_cannot_make_the_number_public() -> None:
    """As it must not any other secret: the validation of bundles sees it as one."""
    program = padded("gpt2")[1].roles["client"]
    place = next(n for n, i in enumerate(program.instructions) if i.target == "mpc.sub")
    for vis, words in ((Vis.PUBLIC, "makes a secret public"), (Vis.SERVER, "but is client")):
        items = list(program.instructions)
        items[place] = replace(items[place], vis=vis)
        with pytest.raises(BundleError, match=words):
            validate(replace(program, instructions=items), "here")


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(CompileError, match="pad_prompt is 8; it must be True or False"):
        CompileConfig(pad_prompt=8)  # type: ignore[arg-type]
    with pytest.raises(CompileError, match="resends its hidden state cannot be padded"):
        CompileConfig(pad_prompt=True, preset="merge-er")
    with pytest.raises(CompileError, match="'pad_prompt' runs by the option pad_prompt"):
        left_out(CompileConfig(enable=("pad_prompt",)))
    with pytest.raises(CompileError, match="no attention of this model takes padding"):
        compile_decoder(*_compile_llama(disable=("pad_prompt",)))


def _compile_llama(**options: Any) -> tuple[Any, None, CompileConfig]:
    config = CompileConfig(max_length=32, pad_prompt=True, **options)
    return float_decoder("llama")[0], None, config


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        ("merge-mm", "its weights follow from positions, and not from scores"),
        ("mpcformer-2quad", "it gives weight to each key that is there"),
    ],
)
def test_attention_that_takes_no_padding(preset: str, words: str) -> None:
    with pytest.raises(CompileError, match=f"cannot be padded for this model(.*\n)*.*{words}"):
        compile_decoder(*_compile_llama(preset=preset))


class Unusual(nn.Module):
    """A decoder without a cache whose attention depends on where the text begins."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.kind = kind
        self.embed = nn.Embedding(32, 8)
        self.place = nn.Embedding(64, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 32)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        count = input_ids.shape[1]
        at = torch.arange(count)
        x = self.embed(input_ids)
        if self.kind == "kinds":
            x = x + self.place(at // 2)
        seen = at[None, :] <= at[:, None]
        if self.kind == "chunks":
            seen = seen & (at[None, :] // 20 == at[:, None] // 20)
        mask = torch.where(seen, 0.0, -1e9)
        q = self.mix(x)
        if self.kind == "scaled":
            q = q * (1 + at.float()[None, :, None])
        weights = torch.softmax(q @ x.transpose(-1, -2) / 2 + mask, -1)
        return self.head(x + weights @ x)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("chunks", "a token after 20 others sees not what one after 19 sees"),
        ("scaled", "behind padding it computes something else"),
        ("kinds", "behind padding it computes something else"),
    ],
)
def test_models_that_count_from_the_beginning_are_refused(kind: str, words: str) -> None:
    model = Unusual(kind).eval()
    config = CompileConfig(max_length=32, pad_prompt=True)
    with pytest.raises(CompileError, match=f"cannot be padded for this model(.*\n)*.*{words}"):
        compile_decoder(model, config=config)
    assert compile_decoder(model, config=replace(config, pad_prompt=False))


def test_a_model_without_a_cache_takes_padding() -> None:
    model = Unusual("plain").eval()
    config = CompileConfig(max_length=32, pad_prompt=True, logit_noise=0.0)
    told = Told(compile_decoder(model, config=config))
    prompt = [3, 30, 7]
    found = told.answer(prompt, max_tokens=3, pads=5)
    assert told.steps == [(8, 0), (9, 0), (10, 0)]
    assert found == told.answer(prompt, max_tokens=3)


def test_wrong_padding_is_found_by_running_it() -> None:
    """A graph in which positions still count the padding differs behind it."""
    config = CompileConfig(pad_prompt=True)
    step = capture(random_decoder("gpt2"))
    rewrite(step, config)
    graph = step.graph_module.graph
    sequences = calibration(config, step)
    check_padding(step.graph_module, step.inputs, sequences, 0, 40)
    for node in list(graph.nodes):
        if node.target is torch.ops.mpc.sub.default:
            node.replace_all_uses_with(node.args[0])
    with pytest.raises(CompileError, match="behind padding it computes something else"):
        check_padding(step.graph_module, step.inputs, sequences, 0, 40)
