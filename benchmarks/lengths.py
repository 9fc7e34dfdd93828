"""What lengths of steps with drafts tell, and what it costs that they tell less.

Writes three sections of docs/speculation.md, between marks that `make speculation` leaves alone:
steps that look alike on the three tasks; how often an observer of lengths tells answers apart; and
drafts by the model's own first layers. Answers are generated in the clear, and the client's loop
runs on them (`Replay`), so that lengths are those that it would announce.
Usage: python benchmarks/lengths.py [--program FOLDER] [--only SECTION …] [--layers N,N]
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import replace_between
from speculation import MOST, TARGET, TASKS, Replay, Steps, costs

from mergec import CompileConfig, compile_decoder
from mergec.compiler.frontend.load import load_model
from mergec.compiler.program import Program
from mergec.runtime.core.memory import keep_freed_memory
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.kernels.matmul import set_threads
from mergec.runtime.session.drafting import Drafter, Speculation
from mergec.runtime.session.drafting.draft_model import DraftModel
from mergec.runtime.session.drafting.drafter import Target
from mergec.runtime.session.drafting.lookup import Lookup
from mergec.runtime.session.drafting.steady import Steady
from mergec.runtime.session.generation import answer

COUNT = 48
"""Tokens of each answer; those for the observer have no end, so that their number says nothing."""

Way = tuple[int, float | None, int | None]
"""Most drafts of a step; tokens that it keeps, a fixed number, or None for as many as are right;
most extra steps, or None for any number."""

WAYS: tuple[Way, ...] = (
    *((3, None, None), (MOST, None, None), (3, 1, None), (3, 1.5, None), (3, 2, None)),
    *((3, 2, 1), (MOST, 1.5, None), (MOST, 2, None), (MOST, 2, 1), (MOST, 3, None)),
)

KNOWN = 3
"""Answers to each prompt whose lengths the observer has seen; it tells the others apart."""

HEAT = 0.3
"""Temperature of the answers that the observer tells apart."""

QUOTES = (
    "The ferry leaves the island at six in the morning and comes back before the tide turns.",
    "Every reader may borrow four books for three weeks; magazines stay in the reading room.",
    "Rain filled the old quarry within a year, and the village began to swim there in summer.",
    "The committee met twice in March. It approved the budget and postponed the election.",
    "Store the medicine below twenty degrees, away from light, and out of the reach of children.",
    "Two bridges cross the river: the older one carries trains, the newer one cars and cyclists.",
    "He tuned the violin by ear, played one long note, and put it back into its case.",
    "Payment is due within thirty days. After that, interest of five percent a year is charged.",
)
EDITS = (
    ("def area(w, h):\n    r = w * h\n    return r", "r", "result"),
    ("def mean(xs):\n    t = sum(xs)\n    n = len(xs)\n    return t / n", "t", "total"),
    ("for i in range(10):\n    if i % 2 == 0:\n        print(i)", "i", "number"),
    ("def greet(name):\n    text = 'Hello, ' + name\n    print(text)", "text", "message"),
    ("x = 0\nwhile x < 5:\n    x = x + 1\nprint(x)", "x", "count"),
    ("def is_even(n):\n    if n % 2 == 0:\n        return True\n    return False", "n", "value"),
    ("with open(path) as f:\n    lines = f.readlines()\nprint(len(lines))", "f", "file"),
    ("def low(a, b):\n    m = a\n    if b < m:\n        m = b\n    return m", "m", "least"),
)
CHATS = (
    "Why is the sky blue?",
    "How do I keep a basil plant alive in winter?",
    "Give me three ideas for a birthday present for my grandfather.",
    "What is the difference between weather and climate?",
    "Write two sentences about a lighthouse.",
    "How can I fall asleep more easily?",
    "Explain what interest on a loan is.",
    "Which stretches help after a long day at a desk?",
)
PROMPTS = (
    *(f"Repeat this text word for word: {text}" for text in QUOTES),
    *(f"Rename `{old}` to `{new}` in this code:\n\n{code}" for code, old, new in EDITS),
    *CHATS,
)

Trace = tuple[tuple[int, int], ...]
"""Of each step after the prompt's: its new tokens, and by how many its past is above the last."""

ALIKE = """## Steps that look alike

`--speculate-fixed N`: all steps have as many drafts, and the caches keep N tokens of each in the \
mean, whatever drafts are right ([how](guides/speculation.md#steps-that-look-alike)). Extra steps \
come first where fewer are known. The same tasks, {count} tokens of answer at most, with `lookup`; \
costs for each token of the answer, computed in the same way as above. The last column is what a \
store holds for it, with all extra steps that could come. Where extra steps are bounded \
(`--speculate-extra`), the answer goes on with one token a step. Made by `make lengths`.

| task | drafts | a step keeps | tokens a step | steps | extra | rounds | online | dealt | wan \
| stored |
| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""

TOLD = """## What lengths tell

{prompts} prompts (a third each of quotes, edits of code and questions), {runs} sampled answers to \
each at temperature {heat}, of {count} tokens without an end. The observer has seen the lengths of \
the steps of {known} answers to each prompt, gets those of another answer, and names a prompt: the \
one with the most similar lengths, by edit distance or by how far the caches grow with the steps, \
whichever finds more. Drafts by `lookup`. In how many cases of 100 it names the right one (where a \
step keeps 1, only the number of steps tells, which `--fixed-length` makes the same):

| drafts | a step keeps | steps of an answer | extra | named right |
| ---: | --- | ---: | ---: | ---: |"""

OWN = """## Drafts by a model's own layers

No small public model has SmolLM2's tokenizer, so `draft:DIR` is measured with what can be had \
without one: SmolLM2's own first layers, with its final norm and head, untrained. A client has \
these of a public model only, and then needs no server.

```python
draft = copy.deepcopy(model)
draft.model.layers = draft.model.layers[:20]
draft.config.num_hidden_layers = 20
draft.save_pretrained("draft")
tokenizer.save_pretrained("draft")
```

| task | drafts | tokens a step | right | rounds | online | dealt | wan |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"""


class Answers:
    """Answers of a model in the clear, and the client's loop on them."""

    def __init__(self, program: Program, kept: Path | None) -> None:
        """kept: file of answers of an earlier run, where there are some; others are added."""
        self.program = program
        self._text = program.text()
        self._kept = kept
        self._known = json.loads(kept.read_text()) if kept is not None and kept.is_file() else {}
        self._plain = PlainExecutor(program.roles["server"])

    @cached_property
    def model(self) -> tuple[Any, Any]:
        """The model in the clear, and its tokenizer."""
        return load_model("smollm2")

    @cached_property
    def by(self) -> dict[str, dict[int, float]]:
        """Costs of a step by its new tokens."""
        return costs(self.program)

    def prompt(self, text: str) -> list[int]:
        return self._text.encode(text, chat=True)

    def generated(self, prompt: Sequence[int], runs: int, heat: float) -> list[list[int]]:
        """Sampled answers without an end; the best one, with an end, at temperature 0."""
        key = f"{runs} {heat} {list(prompt)}"
        if key not in self._known:
            self._known[key] = sampled(self.model[0], prompt, runs, heat)
            if self._kept is not None:
                self._kept.write_text(json.dumps(self._known))
        return [list(tokens) for tokens in self._known[key]]

    def played(
        self,
        prompt: Sequence[int],
        tokens: Sequence[int],
        drafter: Drafter,
        most: int = MOST,
        fixed: float | None = None,
        bound: int | None = None,
    ) -> Steps:
        """The steps after the prompt's of an answer with drafts."""
        made = Speculation(drafter, most, fixed=fixed, extra=bound)
        if isinstance(drafter, Lookup):
            # It only compares tokens, and rows of few logits are read sooner.
            places = {token: n for n, token in enumerate(dict.fromkeys([*prompt, *tokens]))}
            prompt, tokens = ([places[token] for token in part] for part in (prompt, tokens))
        replay = Replay(self._plain, [*prompt, *tokens])
        if isinstance(drafter, Lookup):
            manifest = replace(replay.program.manifest, vocab_size=len(places))
            replay.program = replace(replay.program, manifest=manifest)
        found = list(answer(replay, prompt, max_tokens=len(tokens), speculation=made))
        if [token.token for token in found] != list(tokens):
            raise SystemExit("drafts changed an answer")
        reports = [report for token in found for report in token.reports]
        return Steps(len(found) - 1, reports[1:])


@torch.inference_mode()
def sampled(model: Any, prompt: Sequence[int], runs: int, heat: float) -> list[list[int]]:
    """`Answers.generated`, anew; the same again for the same prompt."""
    how: dict[str, Any] = {"do_sample": False}
    if heat:
        how = {"do_sample": True, "temperature": heat, "top_k": 0, "min_new_tokens": COUNT}
        how["num_return_sequences"] = runs
    ids = torch.tensor([list(prompt)])
    torch.manual_seed(sum(prompt))
    mask = torch.ones_like(ids)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=COUNT, **how)
    return [row[len(prompt) :] for row in found.tolist()]


def trace(steps: Steps) -> Trace:
    reports = steps.reports
    return tuple((b.new, b.past - a.past) for a, b in pairwise([reports[0], *reports]))


def extra(steps: Steps) -> int:
    """Steps of which nothing stays: the next one has the same past."""
    return sum(a.past == b.past for a, b in pairwise(steps.reports))


def cells_of(way: Way) -> list[str]:
    most, fixed, bound = way
    told = "what is right" if fixed is None else f"{fixed:g}"
    return [str(most), told if bound is None else f"{told}, at most {bound} extra"]


# ------------------------------------------------------------------------------- the observer


def edits(mine: Trace, theirs: Trace) -> float:
    """Steps to change, to add or to leave out to get from one answer's lengths to the other's."""
    row = np.arange(len(theirs) + 1)
    for i, one in enumerate(mine, 1):
        change = row[:-1] + [one != other for other in theirs]
        following = np.empty_like(row)
        following[0] = i
        for j in range(1, len(row)):
            following[j] = min(change[j - 1], row[j] + 1, following[j - 1] + 1)
        row = following
    return float(row[-1])


def growth(mine: Trace, theirs: Trace) -> float:
    """How far apart the caches are after as many steps, in the sum over the steps."""
    curves = [np.cumsum([moved for _, moved in one]) for one in (mine, theirs)]
    most = max(map(len, curves))
    padded = [np.pad(curve, (0, most - len(curve)), mode="edge") for curve in curves]
    return float(np.abs(padded[0] - padded[1]).sum())


def named(
    known: Sequence[Sequence[Trace]], seen: Sequence[Sequence[Trace]], far: Callable[..., float]
) -> float:
    """The share of seen traces whose prompt has the nearest known one; a tie counts its share."""
    hits = 0.0
    for right, traces in enumerate(seen):
        for one in traces:
            nearest = [min(far(one, other) for other in others) for others in known]
            best = min(nearest)
            hits += (nearest[right] == best) / nearest.count(best)
    return hits / sum(map(len, seen))


def told(answers: Answers, runs: int) -> Iterator[str]:
    prompts = [answers.prompt(text) for text in PROMPTS]
    found = [answers.generated(prompt, runs, HEAT) for prompt in prompts]
    yield f"| 0 |  | {COUNT - 1} | 0 | {100 / len(prompts):.0f} |"
    for way in WAYS:
        steps, extras, traces = [], [], []
        for prompt, several in zip(prompts, found, strict=True):
            played = [answers.played(prompt, one, Lookup(), *way) for one in several]
            steps += [len(one.reports) for one in played]
            extras += [extra(one) for one in played]
            traces.append([trace(one) for one in played])
        known, seen = [one[:KNOWN] for one in traces], [one[KNOWN:] for one in traces]
        share = max(named(known, seen, far) for far in (edits, growth))
        cells = [*cells_of(way), f"{np.mean(steps):.1f}", f"{np.mean(extras):.1f}"]
        yield f"| {' | '.join(cells)} | {100 * share:.0f} |"


# ------------------------------------------------------------------------------------ costs


def alike(answers: Answers) -> Iterator[str]:
    for task, text in TASKS.items():
        prompt = answers.prompt(text)
        (tokens,) = answers.generated(prompt, 1, 0)
        for way in WAYS:
            steps = answers.played(prompt, tokens, Lookup(), *way)
            most, fixed, bound = way
            stored = ""
            if fixed is not None and bound is None:
                strides = Steady.of(fixed, most).strides(0, len(tokens) - 1)
                dealt = sum(answers.by["dealt"][new] for s in strides for new, _ in s.steps)
                stored = f"{dealt / (len(tokens) - 1) / 1e6:.0f} MB"
            cells = [f"{steps.a_step:.2f}", f"{len(steps.reports)}", f"{extra(steps)}"]
            cells += [*spent(answers, steps), stored]
            yield f"| {' | '.join([task, *cells_of(way), *cells])} |"


def spent(answers: Answers, steps: Steps) -> list[str]:
    """Rounds, online and dealt bytes, and seconds on `wan` for each token."""
    return [
        f"{steps.each(answers.by['rounds']):.0f}",
        f"{steps.each(answers.by['online']) / 1e6:.1f} MB",
        f"{steps.each(answers.by['dealt']) / 1e6:.0f} MB",
        f"{steps.each(answers.by['wan']):.1f} s",
    ]


def own(answers: Answers, layers: Sequence[int]) -> Iterator[str]:
    program, (model, tokenizer) = answers.program, answers.model
    target = Target(program.manifest.vocab_size, program.text())
    whole = len(model.model.layers)
    for count in layers:
        with tempfile.TemporaryDirectory(prefix="mergec-draft-") as folder:
            draft = copy.deepcopy(model)
            draft.model.layers = draft.model.layers[:count]
            draft.config.num_hidden_layers = count
            draft.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            drafter = DraftModel.open(folder, target)
        for task, text in TASKS.items():
            prompt = answers.prompt(text)
            (tokens,) = answers.generated(prompt, 1, 0)
            steps = answers.played(prompt, tokens, drafter)
            right = sum(report.accepted for report in steps.reports)
            drafted = sum(report.drafted for report in steps.reports)
            cells = [task, f"{count} of {whole} layers, up to {MOST}", f"{steps.a_step:.2f}"]
            cells += [f"{right} of {drafted}", *spent(answers, steps)]
            yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--program", type=Path, help="bundles of SmolLM2, compiled as for the page")
    parser.add_argument("--answers", type=Path, help="file that keeps the model's answers")
    parser.add_argument("--runs", type=int, default=6, help="answers to each of the prompts")
    parser.add_argument("--layers", default="10,20,27", help="of the models that draft")
    parser.add_argument("--only", nargs="+", choices=("alike", "told", "own"), help="sections")
    options = parser.parse_args()
    keep_freed_memory()
    set_threads(1)
    if options.program:
        program = Program.load(options.program)
    else:
        config = CompileConfig(network="wan", max_length=512, speculate_up_to=MOST)
        program = compile_decoder(*load_model("smollm2"), config, print)
    answers = Answers(program, options.answers)
    layers = [int(count) for count in options.layers.split(",")]
    sections = {
        "alike": (ALIKE.format(count=COUNT), lambda: alike(answers)),
        "told": (
            TOLD.format(
                prompts=len(PROMPTS),
                runs=options.runs,
                heat=HEAT,
                count=COUNT,
                known=KNOWN,
            ),
            lambda: told(answers, options.runs),
        ),
        "own": (OWN, lambda: own(answers, layers)),
    }
    for mark, (head, rows) in sections.items():
        if mark in (options.only or sections):
            lines = [head]
            for line in rows():
                print(line, flush=True)
                lines.append(line)
            replace_between(TARGET, mark, "\n".join(lines))


if __name__ == "__main__":
    main()
