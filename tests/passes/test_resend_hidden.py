from __future__ import annotations

import pytest
import torch
from torch import nn

from mergec import CompileConfig, compile_decoder
from mergec.compiler.backend.cost import cost_report
from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.capture import capture
from mergec.compiler.pipeline import rewrite
from mergec.compiler.program import Program
from mergec.compiler.text import dump
from mergec.runtime.core.errors import BundleError
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.program.encoding import decode_program, encode_program
from mergec.runtime.program.program import DECODE, FINISH, PROMPT
from mergec.runtime.program.validate import validate
from mergec.runtime.roles.inprocess import InProcessSession
from tests.families import captured, every_family, outputs
from tests.merge_models import POSITIONS, says_its_next_row

ASKED = CompileConfig(enable=("resend_hidden",), max_length=POSITIONS, logit_noise=0)
START = [4, 9, 2]


@pytest.fixture(scope="module")
def program() -> Program:
    return compile_decoder(says_its_next_row(), config=ASKED)


def test_exact_where_the_hidden_state_is_the_next_row(program: Program) -> None:
    """In plaintext and between the parties; each token follows from the one before."""
    model = says_its_next_row()
    wanted = [(START[-1] + 1 + i) % POSITIONS for i in range(6)]
    with torch.no_grad():
        ids = torch.tensor([START + wanted[:-1]])
        logits = model(input_ids=ids).logits[0, len(START) - 1 :]
    assert logits.argmax(-1).tolist() == wanted
    plain = list(PlainExecutor(program.roles["server"]).generate(START, 6))
    assert [token for token, _ in plain] == wanted
    assert float((torch.stack([row for _, row in plain]) - logits).abs().max()) < 1e-3
    with InProcessSession(program.roles) as session:
        session.step(START, 0)
        for i in range(5):
            session.step([0], len(START) + i)
        assert float((session.step([], 6) - logits).abs().max()) < 2e-2


def test_phases(program: Program) -> None:
    assert [phase.name for phase in program.any_role.phases] == [PROMPT, DECODE, FINISH]
    prompt, decode, finish = program.any_role.phases
    assert prompt.inputs[0].name == "input_ids"
    assert decode.inputs[0].shape == (1, "new", 48)
    assert prompt.outputs == decode.outputs
    assert finish.inputs[0].name == decode.outputs[0]
    inside = {row.name: row.target for row in cost_report(program.any_role, 1, 4).rows}
    assert "transformer.h.0.attn.attention" in inside
    assert "transformer.wte.embedding" not in inside
    assert "lm_head.linear" not in inside
    assert "mpc.reveal" not in inside.values()


def test_a_stop_token_ends_the_answer_and_not_the_loop(program: Program) -> None:
    plain = PlainExecutor(program.roles["server"])
    steps = 0
    step = plain.step

    def counted(*args):
        nonlocal steps
        steps += 1
        return step(*args)

    plain.step = counted
    assert [token for token, _ in plain.generate(START, 5, stop=(4,))] == [3, 4]
    assert steps == 6, "five steps and the head"


# Embeddings may get a learned position, a projection, a scale, or a norm.
@every_family(("opt", "gemma2", "bloom"))
def test_the_graph_computes_what_it_did(family: str) -> None:
    step, plain = captured(family), captured(family)
    reports = {report.name: report for report in rewrite(step, ASKED)}
    rewrite(plain, CompileConfig())
    assert reports["resend_hidden"].sites == 1
    for a, b in zip(outputs(step, 3, 4), outputs(plain, 3, 4), strict=True):
        assert float((a - b).abs().max()) < 1e-12
    text = dump(step.graph_module)
    again = {report.name: report for report in rewrite(step, ASKED)}
    assert again["resend_hidden"].sites == 0
    assert dump(step.graph_module) == text


def test_a_program_of_parts_is_stored_and_checked(program: Program) -> None:
    role = program.roles["client"]
    data = encode_program(role)
    again = decode_program(data, "client", "here")
    assert again.phases == role.phases
    again.tensors = role.tensors
    validate(again, "here")
    for change, said in (
        (lambda p: p.pop(), "the phases are not prompt and decode, and the finish"),
        (lambda p: p[1]["inputs"].pop(0), "the phase decode lacks 'input_ids'"),
        (lambda p: p[2]["outputs"].append("answer"), "the phase finish lacks 'answer'"),
        (lambda p: p[0].update(name="start"), "'name' is 'start'"),
    ):
        data = encode_program(role)
        change(data["phases"])
        with pytest.raises(BundleError, match=said):
            broken = decode_program(data, "client", "here")
            broken.tensors = role.tensors
            validate(broken, "here")


class Bag(nn.Module):
    """No cache, or a second use of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


def test_the_token_alone_cannot_be_revealed() -> None:
    config = CompileConfig(enable=("resend_hidden",), reveal="token")
    with pytest.raises(CompileError, match='compile it with reveal="logits"'):
        rewrite(captured("gpt2"), config)


def test_near_misses() -> None:
    with pytest.raises(CompileError, match="needs a model with a cache"):
        rewrite(capture(Bag()), ASKED)
    step = captured("gpt2")
    graph = step.graph_module.graph
    (logits, *caches) = next(n for n in graph.nodes if n.op == "output").args[0]
    ids = next(n for n in graph.nodes if n.op == "placeholder")
    with graph.inserting_before(next(n for n in graph.nodes if n.op == "output")):
        twice = graph.call_function(torch.ops.aten.mul.Tensor, (logits, ids))
    twice.meta = dict(logits.meta)
    next(n for n in graph.nodes if n.op == "output").args = ([twice, *caches],)
    with pytest.raises(CompileError, match=r"mul.* reads the tokens besides"):
        rewrite(step, ASKED)
