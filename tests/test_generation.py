"""The client's loop on its own, and three roles of it in threads."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from mergec.runtime.core.context import (
    ClientContext,
    Context,
    DealerContext,
    ServerContext,
    ShapeContext,
)
from mergec.runtime.core.errors import BundleError, PromptError
from mergec.runtime.core.spec import ROLES, Vis
from mergec.runtime.core.values import Held
from mergec.runtime.correlations.prg import new_seed
from mergec.runtime.engine.executor import Executor
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.program.manifest import Manifest
from mergec.runtime.program.program import InputSpec, RoleProgram
from mergec.runtime.session.generation import answer, check_prompt, generate
from mergec.runtime.session.own_steps import MergecSession
from mergec.runtime.session.sampling import Sampling
from mergec.runtime.session.steps import Session, StepReport
from mergec.runtime.transport.loopback import dealer_pair, link_pair
from mergec.runtime.transport.traffic import Traffic
from tests import decoder

MANIFEST = Manifest(vocab_size=10, max_length=8)


class Counting(Session):
    """Predicts token n + 1 after token n, and records its calls."""

    def __init__(self, *, cached: bool = True, **manifest: Any) -> None:
        cache = [InputSpec("c", Vis.SHARED, "float32", (1, 1, "past", 1), 16, "c.next")]
        super().__init__(
            RoleProgram(
                "client",
                [],
                [InputSpec("ids", Vis.CLIENT, "int64", (1, "new")), *(cache if cached else [])],
                ["logits", *(["c.next"] if cached else [])],
                [],
                manifest=replace(MANIFEST, **manifest),
            )
        )
        self.counted = Traffic()

    def setup(self) -> None: ...

    def traffic(self) -> Traffic:
        return self.counted.snapshot()

    def _start(self) -> dict[str, Any]:
        return {"c": 0} if self.cached else {}

    def _cut(self, cache: Any, dim: int, length: int) -> Any:
        return length

    def _join(self, values: Sequence[Any]) -> Any:
        raise NotImplementedError

    def _execute(self, inputs: dict[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        self.counted.rounds += 2
        self.counted.sent += 5
        self.counted.received += 7
        ids = inputs["ids"].value
        logits = torch.nn.functional.one_hot((ids + 1) % 10, 10).to(torch.float64)
        return {"logits": Held(Vis.CLIENT, logits), "c.next": inputs.get("c", 0) + ids.shape[1]}


def run(session: Session, prompt: list[int], **options: Any) -> tuple[list[int], list[StepReport]]:
    reports: list[StepReport] = []
    tokens = generate(session, prompt, on_step=reports.append, **options)
    return tokens, reports


def test_prompt_then_one_token_at_a_time() -> None:
    asked: list[tuple[int, int]] = []
    streamed: list[int] = []
    tokens, reports = run(
        Counting(),
        [4, 2, 1],
        max_tokens=3,
        announce=lambda new, past: asked.append((new, past)),
        on_token=streamed.append,
    )
    assert tokens == streamed == [2, 3, 4]
    assert asked == [(3, 0), (1, 3), (1, 4)]
    assert [(r.phase, r.new, r.past) for r in reports] == [
        ("prompt", 3, 0),
        ("decode", 1, 3),
        ("decode", 1, 4),
    ]
    assert {(r.rounds, r.sent, r.received) for r in reports} == {(2, 5, 7)}


def test_a_prompt_can_be_fed_in_parts() -> None:
    asked: list[tuple[int, int]] = []
    tokens, reports = run(
        Counting(), [4, 2, 1], max_tokens=2, first=1, announce=lambda *step: asked.append(step)
    )
    assert tokens == [2, 3]
    assert asked == [(1, 0), (1, 1), (1, 2), (1, 3)]
    assert [report.phase for report in reports] == ["prompt"] * 3 + ["decode"]


def test_the_loop_can_be_left_at_any_token() -> None:
    session = Counting()
    for token in answer(session, [4], max_tokens=5):
        if token.token == 6:
            break
    assert int(token.logits.argmax()) == 6
    assert session.counted.rounds == 4


def test_without_a_cache_every_step_takes_all_tokens() -> None:
    tokens, reports = run(Counting(cached=False), [4, 2, 1], max_tokens=3)
    assert tokens == [2, 3, 4]
    assert [(r.phase, r.new, r.past) for r in reports] == [
        ("prompt", 3, 0),
        ("decode", 4, 0),
        ("decode", 5, 0),
    ]


def test_a_stop_token_ends_the_answer_and_is_part_of_it() -> None:
    tokens, reports = run(Counting(), [1], max_tokens=7, stop=(4, 9))
    assert tokens == [2, 3, 4]
    assert len(reports) == 3


def test_sampling_is_applied_and_repeatable() -> None:
    options = {"max_tokens": 7, "sampling": Sampling(temperature=5.0, seed=4)}
    first, _ = run(Counting(), [1], **options)
    again, _ = run(Counting(), [1], **options)
    assert first == again != [2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 1, "the prompt is empty"),
        ([1, 10], 1, "token 10 is not in the vocabulary of 10"),
        ([-1], 1, "token 0 of the prompt is -1; it can be 0 or more"),
        ([1] * 6, 3, "has 6 tokens, which with 3 to generate is more than this program's 8"),
        ([1], 0, "max_tokens is 0; it can be 1 or more"),
        ([1], "8", "max_tokens is '8'; "),
        ([1, "2"], 1, "token 1 of the prompt is '2'; "),
        ([1, 2.5], 1, "token 1 of the prompt is 2.5; "),
    ],
)
def test_bad_prompts_are_refused_before_any_step(
    prompt: list[Any], max_tokens: Any, message: str
) -> None:
    session = Counting()
    with pytest.raises(PromptError, match=message):
        generate(session, prompt, max_tokens=max_tokens)
    assert session.counted == Traffic()
    with pytest.raises(PromptError, match=message):
        check_prompt(prompt, max_tokens, MANIFEST)


def test_a_program_without_limits_takes_any_prompt() -> None:
    check_prompt([99] * 100, 100, Manifest())


def test_a_program_of_another_kind_is_refused() -> None:
    program = decoder.program("client")
    program.outputs.append("embed")
    with pytest.raises(BundleError, match="not a decoder step"):
        MergecSession(Executor(program, ShapeContext(), None), Traffic)


def test_three_roles_in_threads_say_what_plaintext_says() -> None:
    # Long enough for the kernels to be compiled on a busy machine.
    client_link, server_link = link_pair(timeout=300.0)
    (to_client, at_client), (to_server, at_server) = (
        dealer_pair(timeout=300.0),
        dealer_pair(timeout=300.0),
    )
    seeds = new_seed(), new_seed()
    contexts: tuple[Context, ...] = (
        ClientContext(seeds[0], at_client),
        ServerContext(seeds[1], at_server),
        DealerContext(*seeds, to_client, to_server),
    )
    links = (client_link, server_link, None)
    sessions = [
        MergecSession(
            Executor(decoder.program(role), context, link),
            (lambda link=link: link.traffic) if link else Traffic,
        )
        for role, context, link in zip(ROLES, contexts, links, strict=True)
    ]
    controls: tuple[queue.SimpleQueue[Any], ...] = queue.SimpleQueue(), queue.SimpleQueue()
    offline: list[int] = []

    def serve(session: MergecSession, control: queue.SimpleQueue[Any]) -> None:
        session.setup()
        while (lengths := control.get()) is not None:
            before = session.traffic()
            session.step(*lengths)
            if session.party == 2:
                for sender in (to_client, to_server):
                    sender.flush()
            else:
                offline.append((session.traffic() - before).offline)

    threads = [
        threading.Thread(target=serve, args=(session, control), daemon=True)
        for session, control in zip(sessions[1:], controls, strict=True)
    ]
    for thread in threads:
        thread.start()
    sessions[0].setup()
    prompt = [5, 1, 7]
    tokens, reports = run(
        sessions[0],
        prompt,
        max_tokens=4,
        announce=lambda *lengths: [control.put(lengths) for control in controls],
    )
    for control in controls:
        control.put(None)
    for thread in threads:
        thread.join()
    plain = PlainExecutor(decoder.program())
    assert tokens == [token for token, _ in plain.generate(prompt, 4)]
    assert all(report.rounds > 0 and report.sent > 0 for report in reports)
    assert len(offline) == 4
    assert all(offline)
