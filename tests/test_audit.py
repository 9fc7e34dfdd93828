"""The audit: what it shows is what is sent, and what is sent without a mask is shown as that."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mergec.runtime.cli import run
from mergec.runtime.core.cases import Case
from mergec.runtime.core.messages import Swap, ToClient, ToServer
from mergec.runtime.core.op import REGISTRY, Op, unregister
from mergec.runtime.core.spec import CLIENT, ROLES, SERVER, Cost, Vis
from mergec.runtime.core.values import Shared
from mergec.runtime.engine.audit import Watch, audit
from mergec.runtime.engine.audit_report import FRESH, HIGH, NONE, OWN, Audit
from mergec.runtime.engine.rehearsal import drive, form
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.program.bundle import save_bundle
from mergec.runtime.program.program import Instruction, Ref, RoleProgram
from mergec.runtime.protocols.opening import open_masked
from mergec.runtime.roles.inprocess import InProcessSession
from tests import decoder
from tests.conftest import Golden
from tests.decoder import VOCAB, WIDTH
from tests.fixtures import tiny
from tests.ops.test_every_op import CASES, FIXED, arguments
from tests.roles import environment
from tests.session import compiled


@pytest.fixture
def toys() -> Iterator[None]:
    """Ops that open in ways of their own; forgotten afterwards."""

    class Toy(Op, abstract=True):
        schema = "(Tensor x) -> Tensor"
        operands = {"x": "share"}
        no_stock = "this op is a test of mergec"

        @staticmethod
        def reference(x: Any) -> Any:
            return x.clone()

        @classmethod
        def scale(cls, x: int, *, fixed: int) -> int:
            return x

        @classmethod
        def cost(cls, x: Any, *, fixed: int) -> Cost:
            return Cost()

    class Careless(Toy):
        """Opens its share as it is."""

        name = "careless"

        @classmethod
        def protocol(cls, ctx: Any, x: Shared) -> Any:
            yield Swap(x.share)
            return x

    class Careful(Toy):
        """Opens its operand under a mask, as three halves of it."""

        name = "careful"

        @classmethod
        def protocol(cls, ctx: Any, x: Shared) -> Any:
            yield from open_masked(ctx, x)
            return x

    class Unspent(Toy):
        """Draws a mask, and tells the server something else."""

        name = "unspent"

        @classmethod
        def protocol(cls, ctx: Any, x: Shared) -> Any:
            ctx.client_mask(x.shape)
            yield ToServer(x.share)
            return x

    class Twice(Toy):
        """Spends one mask, and sends two messages."""

        name = "twice"

        @classmethod
        def protocol(cls, ctx: Any, x: Shared) -> Any:
            mask = ctx.mask(x.shape)
            ctx.spend(mask)
            yield Swap(x.share), ToClient(x.share)
            return x

    class Narrow(Toy):
        """Spends a mask of another ring than the message's."""

        name = "narrow"

        @classmethod
        def protocol(cls, ctx: Any, x: Shared) -> Any:
            mask = ctx.mask(x.shape, torch.int8)
            ctx.spend(mask)
            yield Swap(x.share)
            return x

    names = ("careless", "careful", "unspent", "twice", "narrow")
    yield
    for name in names:
        unregister(name)


def with_op(name: str) -> RoleProgram:
    """The decoder with an op on the embeddings."""
    program = decoder.program("client")
    place = next(i for i, item in enumerate(program.instructions) if item.name == "norm")
    program.instructions.insert(
        place, Instruction("toy", f"mpc.{name}", (Ref("embed"),), {}, Vis.SHARED, 16)
    )
    norm = program.instructions[place + 1]
    args = (Ref("toy"), *norm.args[1:])
    program.instructions[place + 1] = Instruction(
        norm.name, norm.target, args, {}, norm.vis, norm.frac
    )
    return program


@pytest.mark.parametrize(
    ("name", "role", "mask"),
    [
        ("careless", "both", NONE),
        ("careful", "both", FRESH),
        ("unspent", "server", NONE),
        ("twice", "client", NONE),
        ("narrow", "both", NONE),
    ],
)
@pytest.mark.usefixtures("toys")
def test_a_new_op_shows_up_by_itself(name: str, role: str, mask: str) -> None:
    found = audit(with_op(name))
    rows = [seen for seen in found.seen if seen.op == f"mpc.{name}" and seen.role == role]
    (row,) = rows
    assert (row.mask, row.ring, row.revealed) == (mask, 64, False)
    assert row.words["prompt"].formula == f"{WIDTH} n"
    assert row.words["decode"].formula == f"{WIDTH}"
    assert (row in found.unmasked) == (mask == NONE)
    warned = f"WARNING: sent without a mask, and not meant for the client: mpc.{name}"
    assert (warned in found.to_text()) == (mask == NONE)


@pytest.mark.parametrize("exact", [False, True], ids=["public", "exact"])
@pytest.mark.parametrize(("op", "case"), CASES)
def test_every_message_of_every_op_is_under_a_mask(op: type[Op], case: Case, exact: bool) -> None:
    """But for those of ops that reveal, of which the last one goes to the client."""
    simulation = Simulation(fixed=FIXED, exact=exact)
    views = arguments(simulation, op, case, case.args)
    watch = Watch(fixed=FIXED, exact=exact)
    drive(watch, op.protocol(watch, *(view[2] for view in views)))
    messages = watch.take()
    bare = [message for message, mask in messages if mask == NONE]
    if op.result == "revealed":
        assert bare == [messages[-1][0]]
        assert isinstance(bare[0], ToClient)
    else:
        assert not bare
    to_server = {mask for m, mask in messages if isinstance(m, ToServer)}
    to_client = {mask for m, mask in messages if isinstance(m, ToClient) and mask != NONE}
    assert to_server <= ({OWN, FRESH} if exact else {OWN})
    assert to_client <= ({HIGH} if exact else set())
    assert {mask for m, mask in messages if isinstance(m, Swap)} <= {FRESH}
    before, simulation.record = simulation.cost, True
    simulation.run(lambda ctx, p: op.protocol(ctx, *(view[p] for view in views)))
    received = [(str(words.dtype), tuple(words.shape)) for words in simulation.transcript]
    rehearsed = [form(m) for m, _ in messages for _ in range(1 + isinstance(m, Swap))]
    assert sorted(received) == sorted((str(dtype), shape) for _, dtype, shape in rehearsed)
    online = sum(m.payload.nbytes * (1 + isinstance(m, Swap)) for m, _ in messages)
    assert simulation.cost.online - before.online == online
    assert simulation.cost.offline - before.offline == sum(watch.dealt.values())


def test_the_counts_are_those_of_a_session() -> None:
    found = audit(decoder.program("client"))
    with InProcessSession({role: decoder.program(role) for role in ROLES}) as session:
        setup = session._links[SERVER].traffic.sent
        for name, steps in (("prompt", [(5, 0)]), ("decode", [(1, 5)])):
            for new, past in steps:
                before = session._links[CLIENT].traffic.snapshot()
                session.step([1] * new, past)
                spent = session._links[CLIENT].traffic - before
                assert spent.online == found.sent[name].at[5]
                assert spent.rounds == found.rounds[name].at[5]
                dealt = sum(found.dealt[role][name].at[5] for role in found.dealt)
                assert session.record.total.offline == dealt
    (weights,) = [seen for seen in found.seen if "setup" in seen.words]
    assert weights.words["setup"].at[0] * 8 == setup
    for name in ("prompt", "decode"):
        total = sum(
            seen.words[name].at[5] * seen.ring // 8 * (2 if seen.role == "both" else 1)
            for seen in found.seen
            if name in seen.words
        )
        assert total == found.sent[name].at[5]


def test_every_role_finds_the_same() -> None:
    texts = {audit(decoder.program(role)).to_json() for role in ROLES}
    assert len(texts) == 1


def test_the_text_is_golden(golden: Golden) -> None:
    golden("audit.txt", audit(decoder.program("client")).to_text())


KEYS = {
    "schema", "model", "program_hash", "seen", "rounds", "sent", "dealt", "calibrated",
    "extraction", "facts",
}  # fmt: skip
"""Of the JSON, in schema 1. A key may be added; the number is raised if one goes."""


def test_the_json_keeps_its_keys() -> None:
    data = json.loads(audit(decoder.program("client")).to_json())
    assert set(data) == KEYS
    assert data["schema"] == 1
    assert set(data["seen"][0]) == {
        "role", "op", "ring", "bits", "mask", "revealed", "words", "form",
    }  # fmt: skip
    assert set(data["rounds"]) == {"prompt", "decode"}
    assert set(data["rounds"]["prompt"]) == {"formula", "at"}
    assert set(data["extraction"]) == {
        "queries", "weights", "vocabulary", "width", "honest", "deviating", "bits", "everything",
    }  # fmt: skip
    assert data["calibrated"] == {"mpc.rms_norm bound": [decoder.BOUND]}


@pytest.mark.parametrize(("queries", "rank"), [(1, 1), (5, 5), (WIDTH, WIDTH), (999, WIDTH)])
def test_what_logits_determine(queries: int, rank: int) -> None:
    found = audit(decoder.program("client"), queries).extraction
    assert (found.vocabulary, found.width) == (VOCAB, WIDTH)
    assert found.honest == rank * (VOCAB - rank)
    assert found.deviating == min(queries * VOCAB, found.weights)
    assert found.weights == sum(weight.numel() for weight in decoder.weights().values())
    assert (found.everything - 1) * VOCAB < found.weights <= found.everything * VOCAB


@pytest.mark.slow
def test_other_ways_to_reveal_and_to_hold_weights() -> None:
    kinds = [{"reveal": "token"}, {"weights": "shared"}, {"preset": "merge-er"}]
    for options in kinds:
        _, program = compiled("llama", **options)
        found = audit(program.any_role)
        assert not found.unmasked, options
        if options.get("reveal") == "token":
            assert found.extraction.honest is None
            (told,) = [seen for seen in found.seen if seen.revealed]
            assert (told.op, told.words["decode"].formula) == ("mpc.reveal_token", "1")
            assert "no number, but the choices" in found.to_text()
        if options.get("weights") == "shared":
            assert any(seen.op == "the seed of shared weights" for seen in found.seen)
        assert ("finish" in found.rounds) == (options.get("preset") == "merge-er")
        again: Audit = audit(program.roles["server"])
        assert again.to_text() == found.to_text()


# -------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder.save(tmp_path_factory.mktemp("audit") / "bundles")


def test_the_command(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for place in (bundles, *(bundles / role for role in ROLES)):
        assert run(["audit", str(place)]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1
    assert texts[0].startswith("handmade: program ")
    assert run(["audit", str(bundles), "--json", "--queries", "7"]) == 0
    assert json.loads(capsys.readouterr().out)["extraction"]["queries"] == 7
    assert run(["audit", str(bundles / "nothing")]) == 1
    assert "no such bundle" in " ".join(capsys.readouterr().err.split())


def test_the_command_refuses_a_folder_of_two_programs(
    bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(bundles, tmp_path / "mixed")
    save_bundle(tiny("dealer"), tmp_path / "mixed" / "dealer")
    assert run(["audit", str(tmp_path / "mixed")]) == 1
    shown = capsys.readouterr()
    assert "are of different programs" in " ".join(shown.err.split())
    assert not shown.out


@pytest.mark.slow
def test_the_command_needs_no_compiler(bundles: Path) -> None:
    code = (
        "import sys; from mergec.runtime.cli import run; "
        f"run(['audit', {str(bundles / 'dealer')!r}]); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not loaded & {"mergec.compiler", "mergec.passes", "transformers", "onnx"}


def test_the_registry_is_as_before() -> None:
    assert not {"careless", "careful", "unspent", "twice", "narrow"} & set(REGISTRY)
