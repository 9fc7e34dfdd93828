"""For every setting of a compile, traffic is as predicted and hides the prompt."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from mergec.compiler.backend.cost import cost_report
from mergec.compiler.config import PRESETS
from mergec.runtime.core.spec import CHOICES, Cost
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.roles.inprocess import InProcessSession
from mergec.runtime.transport.loopback import LoopbackLink
from tests.session import compiled

PROMPTS = ([3, 14, 15, 92, 65], [7, 7, 7, 7, 7])
DECODED = ([9], [26])

SETTINGS = [
    setting
    for setting in itertools.product(
        PRESETS, CHOICES["weights"], CHOICES["reveal"], ("loopback",), CHOICES["rounding"]
    )
    # Embedding resending is refused where the token alone is revealed.
    if "resend_hidden" not in PRESETS[setting[0]] or setting[2] == "logits"
]
SETTINGS += [
    ("exact", "server", *rest)
    for rest in itertools.product(CHOICES["reveal"], ("lan", "wan"), ("public",))
]
FAST = {
    ("exact", "server", "logits", "loopback", "public"),
    ("exact", "server", "logits", "loopback", "exact"),
    ("exact", "shared", "token", "loopback", "public"),
    ("exact", "server", "token", "wan", "public"),
    ("merge", "shared", "logits", "loopback", "public"),
    ("thex", "server", "token", "loopback", "exact"),
}
NAMES = ("preset", "weights", "reveal", "network", "rounding")


@pytest.mark.parametrize(
    "setting", [pytest.param(s, marks=() if s in FAST else pytest.mark.slow) for s in SETTINGS]
)
def test_the_wire_is_as_predicted_and_the_same_for_any_prompt(
    setting: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, program = compiled("llama", **dict(zip(NAMES, setting, strict=True)))
    transcripts = [_transcript(program.roles, prompt, monkeypatch) for prompt in PROMPTS]
    assert transcripts[0] == transcripts[1]
    assert sum(map(len, transcripts[0].values())) > 100


def test_exact_rounding_gives_the_model_s_logits() -> None:
    model, program = compiled("llama", rounding="exact")
    assert program.manifest.rounding == "exact"
    with InProcessSession(program.roles) as session, torch.no_grad():
        found = session.step(PROMPTS[0], 0).reshape(-1)
        wanted = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    assert (found - wanted).abs().max() < 1e-3


@pytest.mark.parametrize("network", ["wan", "wan3"])
def test_rows_long_enough_for_histograms_give_the_model_s_logits(
    network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of 50 tokens, and a decode step, of programs for slow networks.

    One deals to the server alone, the other keys to both parties.
    """
    model, program = compiled("llama", network=network)
    prompt = [(7 * i + 3) % 50 for i in range(50)]
    with InProcessSession(program.roles) as session, torch.no_grad():
        found = [session.step(prompt, 0).reshape(-1), session.step([5], 50).reshape(-1)]
        wanted = model(torch.tensor([[*prompt, 5]])).logits[0, -2:]
    assert (torch.stack(found) - wanted).abs().max() < 1e-3
    transcripts = [_transcript(program.roles, ids, monkeypatch) for ids in (prompt, prompt[::-1])]
    assert transcripts[0] == transcripts[1]


def test_rounding_is_part_of_the_program_hash() -> None:
    hashes = {compiled("llama", rounding=r)[1].manifest.program_hash for r in CHOICES["rounding"]}
    assert len(hashes) == 2


def _transcript(
    roles: Mapping[str, RoleProgram], prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[tuple[int, int]]]:
    """Bytes sent and received in every round, by peer; each step costs what was predicted."""
    seen: dict[str, list[tuple[int, int]]] = {"client": [], "server": []}
    exchange = LoopbackLink.exchange

    def recorded(link: LoopbackLink, outgoing: torch.Tensor | None, incoming: int) -> Any:
        seen[link._peer].append((0 if outgoing is None else outgoing.numel(), incoming))
        return exchange(link, outgoing, incoming)

    program = roles["client"]
    steps = [(prompt, 0), *(([*ids], len(prompt) + i) for i, ids in enumerate(DECODED))]
    if program.resends:
        steps.append(([], len(steps)))
    with monkeypatch.context() as patch:
        patch.setattr(LoopbackLink, "exchange", recorded)
        with InProcessSession(roles) as session:
            for ids, past in steps:
                before = {peer: len(rounds) for peer, rounds in seen.items()}
                session.step(ids, past)
                report = cost_report(program, len(ids), past)
                costs = {row.name: row.cost for row in report.rows if row.cost != Cost()}
                assert session.record.by_instruction == costs
                assert session.record.total == report.total
                for peer, rounds in seen.items():
                    step = rounds[before[peer] :]
                    assert len(step) == report.total.rounds
                    assert sum(out + back for out, back in step) == report.total.online
    return seen
