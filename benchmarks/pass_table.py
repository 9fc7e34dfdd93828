"""What each pass saves: GPT-2-base (random weights) and SmolLM2, a prompt of 64 and a decode step.

The first row is the program with only those passes that the model needs to compile; each further
row adds one pass, in the order in which they run. Rounds and bytes are predicted for every row, and
measured according to `--measure`: in the first and the last row, in all, or in none. Writes
docs/passes.md. Usage: python benchmarks/pass_table.py [--measure ends|all|none]
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench import steps_of
from harness import run

from mergec import CompileConfig, Program, compile_decoder
from mergec.compiler.frontend.load import load_model
from mergec.runtime.core.spec import Cost

PROMPT, PAST = 64, 128
STEPS = {"prompt": (PROMPT, 0), "decode": (1, PAST)}
TARGET = Path(__file__).resolve().parent.parent / "docs" / "passes.md"

INTRODUCTION = f"""# What each pass saves

A prompt of {PROMPT} tokens, and one decode step after {PAST} cached ones. The first row is the
program with only those passes that the model needs to compile. Each further row adds one pass, in
the order in which they run, and shows the program of all passes so far. Passes that change nothing
in a model are left out, and so are lossy ones. `nodes` is the number of instructions. Rounds and
online bytes (both directions) are predicted by the ops' formulas. `measured` says what the
transport's counters showed when client, server and dealer ran that program in three processes. Made
by `make pass-table`."""

Costs = dict[str, Cost]
"""Costs by name of the step."""


@dataclass
class Row:
    """A program with one pass more than the row before."""

    name: str
    nodes: int
    predicted: Costs
    disabled: tuple[str, ...]
    measured: Costs = field(default_factory=dict)


def gpt2() -> tuple[Any, Any]:
    """GPT-2-base with random weights: 12 layers of width 768, 50,257 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config()).eval(), None


def predict(program: Program) -> tuple[list[Row], list[str], int]:
    """The rows, the names of needed passes, and the number of nodes as captured."""
    history = program.history
    if history is None:
        raise RuntimeError("a program that was compiled here must have a history")
    savings = {step: history.savings(*lengths) for step, lengths in STEPS.items()}
    needed = [saving.name for saving in savings["decode"] if saving.needed]
    names = [saving.name for saving in savings["decode"] if not saving.needed]
    compared = {step: [s for s in found if not s.needed] for step, found in savings.items()}
    rows = []
    for position, name in enumerate(["needed passes alone", *names]):
        # Row 0 is the program without the first pass; row n is the program with the nth.
        place = max(position - 1, 0)
        pairs = {step: found[place] for step, found in compared.items()}
        costs = {step: s.with_it if position else s.without for step, s in pairs.items()}
        nodes = pairs["decode"].instructions
        rows.append(
            Row(name, nodes[1 if position else 0], costs, tuple(names[position:]))  # type: ignore[index, arg-type]
        )
    return rows, needed, len(history.before.program.instructions)


def measure(program: Program, row: Row) -> None:
    """Run the steps of the row's program, and record what the server counted."""
    ids = [(17 * i + 5) % program.manifest.vocab_size for i in range(PAST + 1)]
    taken = run(program.roles, steps_of(program, ids, list(STEPS.values()), 1), "mergec")
    for name, step in zip(STEPS, taken, strict=True):
        row.measured[name] = Cost(step.rounds, step.online, step.offline)


def table(rows: Sequence[Row]) -> str:
    """Markdown: rounds and online bytes of both steps, and how the measurement compares."""
    lines = [
        "| with | nodes | rounds, prompt | online | rounds, decode | online | measured |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        cells = [f"{row.nodes:,}"]
        for step in STEPS:
            cost = row.predicted[step]
            cells += [f"{cost.rounds:,}", f"{cost.online / 1e6:,.2f} MB"]
        lines.append(f"| {row.name} | {' | '.join(cells)} | {verdict(row)} |")
    return "\n".join(lines)


def verdict(row: Row) -> str:
    """How the counters compare with the prediction."""
    if not row.measured:
        return ""
    if all((m.rounds, m.online) == (row.predicted[s].rounds, row.predicted[s].online)
           for s, m in row.measured.items()):  # fmt: skip
        return "the same"
    return "; ".join(
        f"{step} {m.rounds:,} rounds, {m.online / 1e6:,.2f} MB" for step, m in row.measured.items()
    )


def section(title: str, wanted: str) -> str:
    """Heading and table of one model."""
    model, tokenizer = MODELS[title]()
    whole = compile_decoder(model, tokenizer)
    rows, needed, captured = predict(whole)
    whole.history = None
    for row in {"all": rows, "ends": [rows[-1], rows[0]], "none": []}[wanted]:
        gc.collect()
        config = CompileConfig(disable=row.disabled)
        measure(compile_decoder(model, tokenizer, config) if row.disabled else whole, row)
    return f"""## {title}

As captured: {captured:,} nodes of ATen. Needed: {", ".join(needed)}.

{table(rows)}"""


def smollm2() -> tuple[Any, Any]:
    """The model and its tokenizer, from the package that ships them."""
    return load_model("smollm2")


MODELS = {"GPT-2-base, random weights": gpt2, "SmolLM2-135M-Instruct": smollm2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", choices=("ends", "all", "none"), default="ends")
    wanted = parser.parse_args().measure
    # One process per model: passes run on one core, and its memory is freed when it ends.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(MODELS), spawn, max_tasks_per_child=1) as pool:
        parts = [INTRODUCTION, *pool.map(section, MODELS, [wanted] * len(MODELS))]
    text = "\n\n".join(parts)
    TARGET.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
