"""Tokens, bytes and rounds of SmolLM2 with drafts, on three tasks. Writes docs/speculation.md.

Greedy answers do not depend on drafts, nor acceptance on the parties' computation. So each answer
is computed once in the clear, and the client's loop runs on it again with every drafter. Bytes and
rounds come from the cost model for the lengths of the steps, and seconds of waiting from the
network profiles. Whole seconds are those that network.py last measured for steps of these lengths.
One answer is also computed by the three roles, with drafts and without. With a folder of heads, as
`mergec adapt smollm2 --medusa 3` writes it, a row of each task is for these.
Usage: python benchmarks/speculation.py [--program DIR] [--tokens N] [--private N] [--heads FOLDER]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

import torch
from bench import RESULTS, ROOT
from network import STORED, Row, stored
from report import between, marked

from mergec import CompileConfig, compile_decoder
from mergec.compiler.driver import compile_source
from mergec.compiler.frontend.load import load_model
from mergec.compiler.program import Program
from mergec.runtime.core.memory import keep_freed_memory
from mergec.runtime.core.network import NETWORKS
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.engine.rehearsal import Rehearsal, step_cost
from mergec.runtime.engine.trees import depths
from mergec.runtime.kernels.matmul import set_threads
from mergec.runtime.program.program import Phase
from mergec.runtime.session.drafting import Drafter, Speculation
from mergec.runtime.session.drafting.datastore import Datastore
from mergec.runtime.session.drafting.lookup import Lookup
from mergec.runtime.session.drafting.medusa import Medusa
from mergec.runtime.session.drafting.recycle import Recycle
from mergec.runtime.session.drafting.retrieve import Retrieve
from mergec.runtime.session.generation import answer
from mergec.runtime.session.plain import PlainSession
from mergec.runtime.session.steps import StepReport

MEASURED = {"loopback, measured": "local", "wan, measured": "measured"}
"""Columns, and the seconds of a step that `network.Row` has for them."""

HEAD = (
    "| task | drafts | tokens a step | right | rounds | online | dealt | waited, loopback | "
    "waited, wan | loopback, measured | wan, measured |"
)

NEAR = 0.05
"""Bytes of a measured step may differ by so much: bounds of gates follow from calibration text."""

TARGET = ROOT / "docs" / "speculation.md"

MOST = 7
"""Drafts of a step at most: up to 8 tokens, attention finds its maxima in the fewest rounds."""

WAYS = (
    *((3, False), (MOST, False), (None, False)),
    *((3, True), (MOST, True), (None, True)),
)
"""Drafts of a step, where the drafter has as many, or None for as many as pay; and whether they may
form a tree."""

PAST = 128
"""Cached tokens for which the cost of a step is computed, as in the other tables."""

ROLES = """The client owns the prompt and reads the answer. The server owns the weights. Neither \
learns the other's secret. A dealer supplies both with correlated randomness; it sees message \
sizes and token counts, never data."""

CODE = """def total_price(items, tax):
    result = 0
    for item in items:
        result += item.price * item.count
    if tax is not None:
        result *= 1 + tax
    return result"""

LENGTHS = ("alike", "told", "own")
"""Marks of the sections that `make lengths` writes, which stay as they are."""

BY_ROLES = "roles"
"""The mark of the section of the three roles, which stays if they do not run."""

TASKS = {
    "quote from a text": f"Repeat this text word for word:\n\n{ROLES}",
    "edit code": f"Rename the variable `result` to `price` in this function:\n\n```python\n{CODE}"
    "\n```",
    "free chat": "What should I think about before I get a dog?",
}


INTRODUCTION = """SmolLM2-135M-Instruct, unchanged, greedy, {count} tokens of answer at most, \
compiled for `wan` with `speculate_up_to={most}`. Tokens a step, and what each token of the answer \
costs after the first one. Acceptance does not depend on the parties' computation, so each answer \
is computed once in the clear, and the client's loop runs on it with each drafter; with `recycle`, \
which learns from the model's logits behind each draft, the model runs again each time. Rounds and \
bytes are those of a step after {past} tokens, by its messages on shapes, with which each party \
compares what it sends; a tree of drafts is counted as a line of as many, which costs no less. \
With *as many as pay*, the default, the client chooses the number of each step for `wan`, by the \
cost model and what was right so far; elsewhere it is fixed, where the drafter has as many. \
Seconds *waited* are predictions of the network profiles, without anybody's \
computation.{measured} `retrieve` drafts from a datastore of {size:,} tokens, this repository's \
pages and sources. Made by `make speculation`; [the guide](guides/speculation.md) explains the \
drafters."""

OF_MEASURED = """ *Measured* are whole steps, as `make bench-wan` last ran each length, by a \
program that was calibrated on other text and takes the same rounds, and bytes within {near:.0%}: \
client, server, dealer and their work on one machine, over loopback and on emulated links like \
those of `wan`. They are weighed by how many steps of each length the answer takes."""

OF_HEADS = """ `medusa` drafts by {count} heads, trained beside the model as it is; its program \
reveals what they say, too, so its steps cost more."""


class Replay(PlainSession):
    """Gives back a known answer: at each position the token that follows there."""

    def __init__(self, executor: PlainExecutor, tokens: Sequence[int]) -> None:
        super().__init__(executor)
        self._tokens = list(tokens)

    def _start(self) -> dict[str, Any]:
        return {spec.name: torch.zeros(1, 1, 0, 1) for spec in self.cache_specs}

    def _compute(
        self,
        phase: Phase,
        new: int,
        past: int,
        ids: Sequence[int] | None,
        parents: tuple[int, ...] = (),
    ) -> dict[str, Any]:
        places = torch.tensor(depths(parents) if parents else range(new)) + past + 1
        following = torch.tensor([*self._tokens, 0])[places]
        logits = torch.nn.functional.one_hot(following, self.program.manifest.vocab_size).float()
        cache = torch.zeros(1, 1, past + new, 1)
        return dict.fromkeys(phase.outputs, cache) | {phase.outputs[0]: logits[None]}


@dataclass(frozen=True)
class Steps:
    """The decode steps of an answer: cost by network, and their number of tokens."""

    tokens: int
    reports: list[StepReport]

    @property
    def a_step(self) -> float:
        return self.tokens / len(self.reports)

    def each(self, costs: dict[int, float]) -> float:
        """A cost of steps, by their new tokens, for each token of the answer."""
        return sum(costs[report.new] for report in self.reports) / self.tokens


class Waiting(Speculation):
    """Speculation as on `wan`: its steps take the seconds that the cost model says."""

    def __init__(self, drafters: Sequence[Drafter], by: Mapping[int, float], tree: bool) -> None:
        """by: seconds of a step by its number of tokens."""
        super().__init__(drafters, None, tree=tree)
        self._by = by

    def learn(self, new: int, seconds: float, tokens: Sequence[int]) -> None:
        super().learn(new, self._by[new], tokens)


def played(
    session: PlainSession,
    prompt: Sequence[int],
    count: int,
    made: Speculation | None,
) -> tuple[list[int], Steps]:
    """An answer, and its steps after the prompt's."""
    found = list(answer(session, prompt, max_tokens=count, speculation=made))
    reports = [report for token in found for report in token.reports]
    return [token.token for token in found], Steps(len(found) - 1, reports[1:])


def made_of(
    drafters: Sequence[Drafter], most: int | None, tree: bool, by: Mapping[str, Mapping[int, float]]
) -> Speculation:
    """Drafts in one of `WAYS`. by: costs of steps, as of `costs`."""
    if most is None:
        return Waiting(drafters, by["wan"], tree)
    return Speculation(drafters, most, tree=tree)


def shape_of(most: int | None, tree: bool) -> str:
    if most is None:
        return "a tree of as many as pay" if tree else "as many as pay"
    return f"tree of {most}" if tree else f"up to {most}"


def costs(program: Program) -> dict[str, dict[int, float]]:
    """Of a step by its new tokens: rounds, online and dealt bytes, and seconds by network.

    Those of `MEASURED` are empty unless network.py measured all these steps of a program like this.
    """
    names = ("rounds", "online", "dealt", "loopback", "wan", *MEASURED)
    found: dict[str, dict[int, float]] = {name: {} for name in names}
    rehearsal = Rehearsal(program.any_role)
    for new in range(1, MOST + 2):
        step = step_cost(rehearsal, new, PAST)
        total = step.cost
        found["rounds"][new], found["online"][new] = total.rounds, total.online
        found["dealt"][new] = total.offline
        for name in ("loopback", "wan"):
            found[name][new] = step.waiting(NETWORKS[name]).total
    rows = {row.new: row for row in stored(RESULTS / STORED) if known(row)}
    if rows.keys() == found["rounds"].keys() and all(alike(row, found) for row in rows.values()):
        for name, of in MEASURED.items():
            found[name] = {new: getattr(row, of) for new, row in rows.items()}
    return found


def alike(row: Row, found: Mapping[str, Mapping[int, float]]) -> bool:
    """Whether a measured step takes the rounds that were found for its length, and such bytes."""
    dealt = row.to_client_bytes + row.to_server_bytes
    return (
        row.rounds == found["rounds"][row.new]
        and isclose(row.online_bytes, found["online"][row.new], rel_tol=NEAR)
        and isclose(dealt, found["dealt"][row.new], rel_tol=NEAR)
    )


def known(row: Row) -> bool:
    """Whether network.py measured a step with drafts of SmolLM2 after as many tokens as here."""
    return (row.part, row.model, row.past) == ("drafts", "smollm2-135m", PAST)


def datastore(program: Program) -> Datastore:
    """Of this repository's pages and sources, without the tasks, which this file holds."""
    files = [*sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("runtime/**/*.py"))]
    texts = [file.read_text(encoding="utf-8") for file in files if file != TARGET]
    text = program.text()
    return Datastore.of(
        [text.encode(t) for t in texts if ROLES[:60] not in t], text.vocabulary_hash
    )


def rows_of_heads(
    program: Program, prompts: Mapping[str, Sequence[int]], answers: Mapping[str, Sequence[int]]
) -> dict[str, list[str]]:
    """The rows of each task for a program with heads, which must give the same answers."""
    by, count = costs(program), program.manifest.medusa
    plain = PlainExecutor(program.roles["server"])
    found: dict[str, list[str]] = {task: [] for task in prompts}
    for task, prompt in prompts.items():
        length = len(answers[task])
        for name, most, tree in ((f"{count} heads", count, False), (f"tree of {MOST}", MOST, True)):
            session = PlainSession(plain)
            made = Speculation(Medusa(), most, tree=tree)
            tokens, steps = played(session, prompt, length, made)
            if tokens != answers[task]:
                raise SystemExit(f"{task}: heads changed the answer")
            found[task].append(row(task, f"medusa, {name}", steps, by))
    return found


def page(
    rows: Sequence[str],
    private: Sequence[str],
    count: int,
    size: int,
    heads: int,
    measured: bool,
) -> str:
    more = OF_HEADS.format(count=heads) if heads else ""
    told = OF_MEASURED.format(near=NEAR) if measured else ""
    return "\n".join(
        [
            "# Several tokens a step",
            "",
            INTRODUCTION.format(count=count, most=MOST, past=PAST, size=size, measured=told) + more,
            "",
            HEAD,
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            *rows,
            "",
            marked(BY_ROLES, "\n".join(private)) if private else between(TARGET, BY_ROLES),
            "\n".join(between(TARGET, mark) for mark in LENGTHS),
        ]
    )


def row(task: str, name: str, steps: Steps, by: dict[str, dict[int, float]]) -> str:
    drafted = sum(report.drafted for report in steps.reports)
    right = sum(report.accepted for report in steps.reports)
    cells = [
        task,
        name,
        f"{steps.a_step:.2f}",
        f"{right} of {drafted}" if drafted else "",
        f"{steps.each(by['rounds']):.0f}",
        f"{steps.each(by['online']) / 1e6:.1f} MB",
        f"{steps.each(by['dealt']) / 1e6:.0f} MB",
        f"{steps.each(by['loopback']):.3f} s",
        f"{steps.each(by['wan']):.1f} s",
        *(f"{steps.each(by[name]):.2f} s" if by[name] else "" for name in MEASURED),
    ]
    return f"| {' | '.join(cells)} |"


def private_lines(program: Program, prompt: Sequence[int], count: int) -> list[str]:
    """One answer by client, server and dealer as processes of this machine, in both ways."""
    lines = ["| drafts | tokens | steps | seconds | online | rounds |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    tokens: list[list[int]] = []
    for speculate, most in (("none", None), ("lookup", MOST)):
        found = program.generate_local(
            prompt, max_tokens=count, speculate=speculate, speculate_tokens=most
        )
        decode = found.phases["decode"]
        tokens.append(found.tokens)
        lines.append(
            f"| {speculate} | {decode.tokens} | {decode.steps} | {decode.seconds:.1f} | "
            f"{decode.online / 1e6:.0f} MB | {decode.rounds:,} |"
        )
    same = "the same" if tokens[0] == tokens[1] else "DIFFERENT"
    lines += ["", f"The tokens of both runs are {same}. The prompt's step is left out."]
    return [
        "## By the three roles",
        "",
        "The first task on this machine, three processes over loopback, all decode steps together.",
        "",
        *lines,
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument(
        "--private", type=int, default=24, help="of the answer by the three roles; 0: none"
    )
    parser.add_argument("--program", type=Path, help="bundles of SmolLM2, compiled as here")
    parser.add_argument("--heads", type=Path, help="folder of `mergec adapt --medusa`")
    parser.add_argument("--output", type=Path, default=TARGET)
    options = parser.parse_args()
    keep_freed_memory()
    set_threads(1)
    if options.program:
        program = Program.load(options.program)
    else:
        config = CompileConfig(network="wan", max_length=512, speculate_up_to=MOST)
        program = compile_decoder(*load_model("smollm2"), config, print)
        program.history = None  # its weights are not needed any more
    plain = PlainExecutor(program.roles["server"])
    by, store, rehearsal = costs(program), datastore(program), Rehearsal(program.any_role)
    ways: dict[str, list[Drafter]] = {
        "lookup": [Lookup()],
        "retrieve": [Retrieve(store)],
        "recycle": [Recycle()],
        "lookup+retrieve": [Lookup(), Retrieve(store)],
        "lookup+recycle": [Lookup(), Recycle()],
        "lookup+retrieve+recycle": [Lookup(), Retrieve(store), Recycle()],
    }
    rows: list[str] = []
    answers: dict[str, list[int]] = {}
    prompts = {task: program.text().encode(text, chat=True) for task, text in TASKS.items()}
    for task, prompt in prompts.items():
        tokens, single = played(PlainSession(plain), prompt, options.tokens, None)
        print(f"{task}: {program.text().decode(tokens)!r}")
        rows.append(row(task, "none", single, by))
        answers[task] = tokens
        whole = [*prompt, *tokens]
        for name, drafters in ways.items():
            # Who recycles reads the model's own logits, also behind wrong drafts.
            recycles = any(isinstance(drafter, Recycle) for drafter in drafters)
            for most, tree in WAYS:
                session = PlainSession(plain) if recycles else Replay(plain, whole)
                session.rehearsal = rehearsal
                made = made_of(drafters, most, tree, by)
                again, steps = played(session, prompt, len(tokens), made)
                if again != tokens:
                    raise SystemExit(f"{task}, {name}: drafts changed the answer")
                rows.append(row(task, f"{name}, {shape_of(most, tree)}", steps, by))
        if task == next(iter(prompts)):
            for tree in (False, True):
                made = Speculation(Lookup(), MOST, tree=tree)
                checked, _ = played(PlainSession(plain), prompt, len(tokens), made)
                if checked != tokens:
                    raise SystemExit(f"{task}: drafts changed the answer of the model")
    heads = 0
    if options.heads is not None:
        told = {"network": "wan", "max_length": 512, "speculate_up_to": MOST}
        guessing = compile_source(options.heads, told, print)
        heads = guessing.manifest.medusa
        for task, lines in rows_of_heads(guessing, prompts, answers).items():
            last = max(i for i, r in enumerate(rows) if r.startswith(f"| {task} |"))
            rows[last + 1 : last + 1] = lines
    print("\n".join(rows))

    def write(private: Sequence[str]) -> None:
        measured = all(by[name] for name in MEASURED)
        text = page(rows, private, options.tokens, store.size, heads, measured)
        options.output.write_text(text, encoding="utf-8")

    write(())
    if options.private:
        with tempfile.TemporaryDirectory(prefix="mergec-") as folder:
            program.save(Path(folder) / "program")
            write(private_lines(program, prompts[next(iter(prompts))], options.private))


if __name__ == "__main__":
    main()
