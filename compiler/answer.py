"""Answers of a program, their cost, and how they compare with the program in the clear."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mergec.compiler.report.text import readable
from mergec.runtime.session.generation import StepReport
from mergec.runtime.session.sampling import Sampling

if TYPE_CHECKING:
    from mergec.runtime.roles.local import LocalResult

CLOSE_CALL = 0.05
"""If the two best logits in the clear are closer than this, either token is right."""


@dataclass(frozen=True)
class Phase:
    """The total of one part of a session, counted at the transport.

    tokens: how many tokens it processed; 0 for the setup.
    seconds: wall clock time.
    rounds: messages that had to follow one another.
    online: bytes between client and server, both directions together.
    offline: bytes from the dealer that the server used.
    drafted, accepted: drafted tokens that steps checked, and how many of them were right.
    steps: how many there were.
    """

    tokens: int
    seconds: float
    rounds: int
    online: int
    offline: int
    drafted: int = 0
    accepted: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Answer:
    """A program's answer, and its cost.

    text: empty if the program has no tokenizer.
    prompt, tokens: token numbers of the prompt and of the answer alone.
    sampling: what was asked about the choice of tokens.
    max_tokens: most tokens that were asked for; 0 if unknown.
    continues: whether the text continues the prompt's, as it does without a chat template.
    blocks: tokens of the beginning that public blocks see, and of each; empty if there are none.
    phases: the totals of "setup", "prompt" and "decode", where there are any.
    peak_memory: in bytes, by process.
    """

    text: str
    prompt: list[int]
    tokens: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    phases: dict[str, Phase] = field(default_factory=dict)
    peak_memory: dict[str, int] = field(default_factory=dict)
    max_tokens: int = 0
    continues: bool = False
    blocks: tuple[int, ...] = ()

    def table(self) -> RenderableType:
        """Seconds, bytes and rounds per token, by phase; totals of the setup; peak memory."""
        shown = Table(header_style="bold", box=SIMPLE)
        shown.add_column("")
        for name in ("tokens", "s/token", "online/token", "rounds/token", "offline/token"):
            shown.add_column(name, justify="right")
        lines = []
        for name, phase in self.phases.items():
            if not phase.tokens:
                lines.append(
                    f"{name}, once per session: {phase.seconds:.2f} s, "
                    f"{readable(phase.online)} online, {phase.rounds:,} rounds, "
                    f"{readable(phase.offline)} offline"
                )
                continue
            shown.add_row(
                name,
                f"{phase.tokens}",
                f"{phase.seconds / phase.tokens:.2f}",
                readable(phase.online / phase.tokens),
                f"{phase.rounds / phase.tokens:,.0f}",
                readable(phase.offline / phase.tokens),
            )
            if phase.drafted:
                lines.append(
                    f"{name}: {phase.tokens / phase.steps:.2f} tokens a step; {phase.accepted} of "
                    f"{phase.drafted} drafts were right"
                )
        if self.peak_memory:
            peaks = ", ".join(f"{role} {readable(n)}" for role, n in self.peak_memory.items())
            lines.append(f"peak memory: {peaks}")
        return Group(shown, *map(Text, lines))


@dataclass(frozen=True)
class PlainAnswer:
    """The program's answer in the clear.

    margins: for each token, by how much the best logit exceeds the second.
    """

    text: str
    tokens: list[int]
    margins: list[float]

    def comparison(self, answer: Answer) -> RenderableType:
        """The text in the clear, and the verdict, for a terminal."""
        verdict = Text(self.verdict(answer))
        return Group(Text.assemble(("plaintext: ", "bold"), self.text), verdict)

    def verdict(self, answer: Answer) -> str:
        """One line: whether the tokens are the same; if not, where, and how close it was."""
        place = self.first_difference(answer)
        if place is None:
            return f"all {len(self.tokens)} tokens are the same"
        margin = self.margins[place] if place < len(self.margins) else 0.0
        close = "a close call" if margin < CLOSE_CALL else "no close call"
        return (
            f"the answers part at token {place + 1}, where plaintext's two best logits are "
            f"{margin:.3f} apart ({close})"
        )

    def first_difference(self, answer: Answer) -> int | None:
        """Position of the first token that differs; None if all are the same."""
        pairs = zip(self.tokens, answer.tokens, strict=False)
        for place, (mine, theirs) in enumerate(pairs):
            if mine != theirs:
                return place
        shorter = min(len(self.tokens), len(answer.tokens))
        return None if len(self.tokens) == len(answer.tokens) else shorter


def phases_of(result: LocalResult) -> dict[str, Phase]:
    """The steps' reports, summed by phase: setup, prompt and decode."""
    steps: dict[str, list[StepReport]] = {}
    if result.setup is not None:
        steps["setup"] = [result.setup]
    for report in result.records:
        steps.setdefault(report.phase, []).append(report)
    return {
        name: Phase(
            tokens=sum(r.tokens for r in reports),
            seconds=sum(r.seconds for r in reports),
            rounds=sum(r.rounds for r in reports),
            online=sum(r.sent + r.received for r in reports),
            offline=sum(r.offline_bytes for r in reports),
            drafted=sum(r.drafted for r in reports),
            accepted=sum(r.accepted for r in reports),
            steps=len(reports),
        )
        for name, reports in steps.items()
    }
