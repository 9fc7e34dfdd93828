"""A compiled program: save it, load it, look into it, run it here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text as RichText

from mergec.compiler.config import PAST
from mergec.compiler.report.graph_view import GraphView
from mergec.compiler.report.inspect import Inspection, PassRow, inspect_costs, readable
from mergec.runtime.core.errors import BundleError, PromptError
from mergec.runtime.core.network import NETWORKS
from mergec.runtime.core.spec import ROLES
from mergec.runtime.program.bundle import (
    DESCRIPTION,
    GRAPH,
    MANIFEST,
    TOKENIZER,
    load_bundle,
    role_path,
)
from mergec.runtime.program.encoding import program_hash
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.session.generation import check_prompt
from mergec.runtime.session.sampling import Sampling, choose
from mergec.runtime.session.steps import StepReport
from mergec.runtime.session.text import VOCABULARY, Stream, Text

if TYPE_CHECKING:
    from mergec.compiler.backend.cost import CostReport
    from mergec.compiler.backend.onnx_export import ValueType
    from mergec.compiler.report.history import History
    from mergec.runtime.roles.local import LocalResult

Progress = Callable[[str], object]

CLOSE_CALL = 0.05
"""Where plaintext's two best logits are closer than this, either token is right."""


def _quiet(_: object) -> None:
    """No progress."""


@dataclass(frozen=True)
class Phase:
    """What a part of a session took in all, counted at the transport.

    Online bytes are those of both directions, offline ones what the server used of the dealer's.
    """

    tokens: int
    seconds: float
    rounds: int
    online: int
    offline: int


@dataclass(frozen=True)
class Answer:
    """What the client got, and what it took. `tokens` are without the prompt."""

    text: str
    prompt: list[int]
    tokens: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    phases: dict[str, Phase] = field(default_factory=dict)
    peak_memory: dict[str, int] = field(default_factory=dict)

    def table(self) -> RenderableType:
        """Per token: seconds, bytes and rounds, prompt and decode apart; memory by process."""
        table = Table(header_style="bold", box=SIMPLE)
        table.add_column("")
        for name in ("tokens", "s/token", "online/token", "rounds/token", "offline/token"):
            table.add_column(name, justify="right")
        for name, phase in self.phases.items():
            per = max(phase.tokens, 1)
            table.add_row(
                name,
                f"{phase.tokens}" if phase.tokens else "",
                f"{phase.seconds / per:.2f}",
                readable(phase.online / per),
                f"{phase.rounds / per:,.0f}",
                readable(phase.offline / per),
            )
        peaks = ", ".join(f"{role} {readable(n)}" for role, n in self.peak_memory.items())
        return Group(table, RichText(f"peak memory: {peaks}")) if peaks else table


@dataclass(frozen=True)
class PlainAnswer:
    """What the program says in the clear. margins: how far the best logit leads the second."""

    text: str
    tokens: list[int]
    margins: list[float]

    def comparison(self, answer: Answer) -> RenderableType:
        """Plaintext's text, and where the two part."""
        verdict = RichText(self.verdict(answer))
        return Group(RichText.assemble(("plaintext: ", "bold"), self.text), verdict)

    def verdict(self, answer: Answer) -> str:
        """One line: whether the tokens are the same, and if not, how close the call was."""
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
        """Position of the first token that differs, None if all are the same."""
        pairs = zip(self.tokens, answer.tokens, strict=False)
        for place, (mine, theirs) in enumerate(pairs):
            if mine != theirs:
                return place
        shorter = min(len(self.tokens), len(answer.tokens))
        return None if len(self.tokens) == len(answer.tokens) else shorter


class Program:
    """The three roles' programs and the client's tokenizer."""

    def __init__(
        self,
        roles: Mapping[str, RoleProgram],
        types: Mapping[str, ValueType] | None = None,
        tokenizer_files: Mapping[str, bytes] | None = None,
        path: Path | None = None,
        history: History | None = None,
    ) -> None:
        """`types` are those of results (`backend.onnx_export`); `path` is where it is saved.

        `history` tells how it was compiled; a program that was loaded has none.
        """
        self.roles = dict(roles)
        self.path = path
        self.history = history
        self._types = dict(types or {})
        self._files = dict(tokenizer_files or {})
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    @property
    def any_role(self) -> RoleProgram:
        """A role's program that is at hand: the instructions are the same in all."""
        return next(iter(self.roles.values()))

    @property
    def manifest(self) -> dict[str, Any]:
        """What is said of the program; complete, whether it was saved before or not."""
        said = self.any_role.manifest
        if "program_hash" not in said:
            said["program_hash"] = program_hash(self.any_role)
        return {key: default for key, (_, default) in DESCRIPTION.items()} | said

    @staticmethod
    def stands_at(path: str | Path) -> bool:
        """Whether `path` is a folder of bundles."""
        return any((role_path(path, role) / MANIFEST).is_file() for role in ROLES)

    @classmethod
    def load(cls, path: str | Path, roles: Sequence[str] = ROLES) -> Program:
        """Read a folder of bundles; those of `roles` must be there and belong together."""
        place = Path(path)
        check_whole(place)
        programs = {role: load_bundle(role_path(place, role), role) for role in roles}
        hashes = {role: p.manifest["program_hash"] for role, p in programs.items()}
        if len(set(hashes.values())) > 1:
            listed = ", ".join(f"{role} {value[:12]}" for role, value in hashes.items())
            raise BundleError(
                f"{place}: the bundles are of different programs ({listed}); compile again"
            )
        folder = role_path(place, "client") / TOKENIZER
        files = {
            file.relative_to(folder).as_posix(): file.read_bytes()
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        return cls(programs, None, files, place)

    def save(self, path: str | Path, progress: Progress = _quiet) -> Path:
        """Write the three bundles to `path`: all, or none."""
        from mergec.compiler.backend.emit import emit

        missing = [role for role in ROLES if role not in self.roles]
        if missing:
            raise BundleError(f"the {missing[0]}'s program was not loaded; load all roles to save")
        self.path = emit(self.roles, self._value_types(), path, self._files, progress)
        return self.path

    def describe(self) -> str:
        """One line."""
        manifest = self.manifest
        lossy = ", lossy" if manifest["lossy"] else ""
        return (
            f"{manifest['model'] or 'program'}, "
            f"{len(self.any_role.instructions)} instructions, "
            f"{manifest['fractional_bits']} fractional bits{lossy}, "
            f"program {manifest['program_hash'][:12]}"
        )

    @property
    def deviation(self) -> str:
        """One sentence: how far a lossy program was from its model when it was compiled."""
        said = self.manifest["deviation"]
        if not said:
            return ""
        return (
            f"on the calibration prompts the next token is the model's at {said['agreed']} of "
            f"{said['places']} places, and logits are {said['mean']:.2g} apart in the mean and "
            f"{said['worst']:.2g} at most, where the model's own vary by {said['spread']:.2g}"
        )

    def inspect(
        self, new: int = 1, past: int | None = None, *, savings: bool = False
    ) -> Inspection:
        """Rounds and bytes of one step, by op and by layer, and what each pass did.

        new, past: tokens of the step and before it; by default 128, or as many as are allowed. A
        program that resends its hidden state ends with a step of no new tokens.

        `savings` adds what each pass saves. That takes as long as some more compilations, and only
        a program that was compiled here can tell.
        """
        return self._inspect(self._costs(new, past), savings)

    def to_html(self, new: int = 1, past: int | None = None, *, savings: bool = False) -> str:
        """The same as a page, with the graph before and after, and the changes of each pass.

        A program that was loaded shows only the graph that the parties run.
        """
        from mergec.compiler.report.html import page

        report = self._costs(new, past)
        inspection = self._inspect(report, savings)
        if self.history is None:
            return page(inspection, report, self.graph)
        return page(inspection, report, self.graph, self.history.before, self.history.changes)

    def _costs(self, new: int, past: int | None) -> CostReport:
        from mergec.compiler.backend.cost import cost_report

        limit = self.manifest["max_length"]
        resends = self.any_role.resends
        if past is None:
            # Of a program that resends its hidden state, only the prompt has several tokens.
            past = 0 if resends and new > 1 else min(PAST, max(limit - new, 0)) if limit else PAST
        if new == 0 and not (resends and past):
            raise PromptError("a step needs a token; only merge-er ends with a step of none")
        if resends and new > 1 and past:
            raise PromptError(
                f"this program takes one token after the prompt, not {new}; "
                "ask for new=1, or for past=0"
            )
        if limit and new + past > limit:
            raise PromptError(
                f"{new} new tokens after {past} are more than the {limit} of this program; "
                "ask for fewer"
            )
        return cost_report(self.any_role, new, past, self.manifest["fractional_bits"])

    def _inspect(self, report: CostReport, savings: bool) -> Inspection:
        manifest = self.manifest
        shown = [
            *("fractional_bits", "max_length", "vocab_size", "lossy", "program_hash"),
            *("weights", "reveal", "network"),
        ]
        seconds = NETWORKS[manifest["network"]].seconds(report.total)
        return inspect_costs(
            report,
            manifest["model"] or "program",
            manifest["cost"],
            self._passes(report.new, report.past, savings),
            manifest["left_out"],
            {key: manifest[key] for key in shown}
            | ({"deviation": self.deviation} if self.deviation else {})
            | {"estimated_network_seconds": round(seconds, 4)},
        )

    def _passes(self, new: int, past: int, savings: bool) -> list[PassRow]:
        saved = {}
        if savings:
            saved = {saving.name: saving for saving in self._history().savings(new, past)}
        return [PassRow.of(entry, saved.get(entry["pass"])) for entry in self.manifest["passes"]]

    def _history(self) -> History:
        if self.history is None:
            raise BundleError(
                "bundles do not hold the graph that they were compiled from; "
                "inspect the model itself"
            )
        return self.history

    @property
    def graph(self) -> GraphView:
        """The instructions: print it, or see its `to_dot` and `to_onnx`."""
        return GraphView(self.any_role, self._value_types())

    @property
    def captured_graph(self) -> GraphView:
        """The graph as captured, before any pass."""
        return self._history().before

    def _value_types(self) -> dict[str, ValueType]:
        if not self._types and self.path is not None:
            from mergec.compiler.backend.onnx_export import read_types

            self._types = read_types(role_path(self.path, self.any_role.role) / GRAPH)
        return self._types

    def text(self) -> Text:
        """The client's tokenizer."""
        return Text.from_files(self._files, str(self.path or "the program"))

    def generate_local(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 32,
        mode: str = "mergec",
        device: str = "cpu",
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        chat: bool | None = None,
        on_text: Callable[[str], object] = _quiet,
    ) -> Answer:
        """Run client, server and dealer as processes on this machine, and give the answer.

        `prompt` is text or token numbers. `chat` puts text into the model's chat template; None
        does so where there is one. `on_text` gets the answer's text as it comes.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        ids, text = self._tokens(prompt, chat, max_tokens)
        from mergec.runtime.roles.local import run_local

        stream = Stream(text, on_text) if text is not None else None
        result = run_local(
            self._place(),
            ids,
            max_tokens=max_tokens,
            mode=mode,
            device=device,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            on_token=stream.token if stream is not None else None,
        )
        return Answer(
            text=stream.end() if stream is not None else "",
            prompt=ids,
            tokens=list(result.tokens),
            sampling=sampling,
            phases=_phases(result),
            peak_memory=dict(result.peak_memory),
        )

    def plaintext(self, answer: Answer) -> PlainAnswer:
        """The prompt's continuation in the clear, chosen as the answer was and as long.

        Sampled tokens can be compared only if the answer was drawn from a given seed.
        """
        from mergec.runtime.engine.plain import PlainExecutor

        if "server" not in self.roles:
            raise BundleError("plaintext needs the server's program; load it")
        plain = PlainExecutor(self.roles["server"])
        stop = self.manifest["stop_tokens"]
        tokens, margins = [], []
        sampling, generator = answer.sampling, answer.sampling.generator()

        def pick(logits: torch.Tensor) -> int:
            return choose(logits, sampling, generator)

        for token, logits in plain.generate(answer.prompt, len(answer.tokens), pick, stop):
            best = logits.topk(2).values
            tokens.append(token)
            margins.append(float(best[0] - best[1]))
        text = self.text().decode(tokens) if self._has_text() else ""
        return PlainAnswer(text, tokens, margins)

    def _has_text(self) -> bool:
        return VOCABULARY in self._files

    def _tokens(
        self, prompt: str | Sequence[int], chat: bool | None, max_tokens: int
    ) -> tuple[list[int], Text | None]:
        """The prompt's tokens, checked against the program's limits; and the tokenizer, if any."""
        text = self.text() if self._has_text() or isinstance(prompt, str) else None
        if isinstance(prompt, str) and text is not None:
            if not prompt.strip():
                raise PromptError("the prompt is empty; say something")
            ids = text.encode(prompt, text.has_chat if chat is None else chat)
        else:
            ids = [int(token) for token in prompt]
        check_prompt(ids, max_tokens, self.manifest)
        return ids, text

    def _place(self) -> Path:
        """Where the bundles are; a program that was never saved goes to a temporary folder."""
        if self.path is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="mergec-")
            self.save(Path(self._temporary.name) / "program")
        if self.path is None:
            raise BundleError("the program could not be saved; save it yourself")
        return self.path


def check_whole(path: Path) -> None:
    """BundleError if `path` is the bundle of one role."""
    if (path / MANIFEST).is_file():
        raise BundleError(f"{path}: is the bundle of one role; give the folder that it is in")


def _phases(result: LocalResult) -> dict[str, Phase]:
    """The steps' reports summed: what came before the first, the prompt, and the decode steps."""
    steps: dict[str, list[StepReport]] = {}
    if result.setup is not None:
        steps["setup"] = [result.setup]
    for report in result.records:
        steps.setdefault(report.phase, []).append(report)
    return {
        name: Phase(
            tokens=sum(r.new for r in reports),
            seconds=sum(r.seconds for r in reports),
            rounds=sum(r.rounds for r in reports),
            online=sum(r.sent + r.received for r in reports),
            offline=sum(r.offline_bytes for r in reports),
        )
        for name, reports in steps.items()
    }
