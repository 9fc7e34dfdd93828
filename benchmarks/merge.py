"""MERGE's tables: seconds and bytes of a text, by CrypTen's stock protocols and by mergec's.

GPT-2-base and a T5 of the paper's size, random weights, with the replacements of MPCFormer, THE-X
and MERGE and without. Measures prompt and decode steps after a few numbers of cached tokens in
three processes, takes bytes and rounds of all others from the cost model, and writes docs/merge.md.
Rows are kept in benchmarks/results/merge.json as they are measured; `--resume` goes on with those
that are missing or failed, `--page` only writes the page from them.

Usage: python benchmarks/merge.py [--models gpt2-124m t5-138m] [--resume | --page] [--output FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from bench import OBSERVED, RESULTS, ROOT, gpt2, machine
from harness import Share, Step, Taken, run
from merge_tables import (
    BASELINE,
    SYSTEMS,
    Kind,
    Point,
    Row,
    Spent,
    System,
    achieved,
    key,
    page,
)
from rich.console import Console
from torch import nn

from mergec import CompileConfig, Program, compile_decoder
from mergec.compiler.backend.cost import cost_report
from mergec.compiler.frontend.capture import Captured, capture
from mergec.runtime.core.errors import MergecError
from mergec.runtime.core.op import Kind as OpKind
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.engine.plan import Plan, Planned
from mergec.runtime.program.program import BEGUN, DECODE, FINISH, PROMPT, RoleProgram

STORED = "merge.json"
TARGET = ROOT / "docs" / "merge.md"
ACHIEVED = ROOT / "docs" / "speculation.md"

REPEATS = 5
"""Runs of a step by mergec's protocols; the median counts. One of CrypTen's takes seconds, and runs
once."""

LENGTH = 128
"""Tokens of the texts of tables 1 and 2."""

KINDS: Mapping[str, Kind] = {
    "gpt2-124m": Kind(
        "GPT-2, 124M",
        "12 layers of width 768, 50,257 tokens.",
        source=False,
        prompt=4,
        lengths=(64, 128, 256, 512),
        pasts=(4, 64, 126, 254, 510),
        few=(4, 510),
    ),
    "t5-138m": Kind(
        "T5, 138M",
        "The paper tells the size alone. Its scripts run 6 layers of an encoder and 6 of a decoder "
        "of width 768, with 12 heads, MLPs of width 3,072 with GELU, and one table of 50,257 "
        "tokens: 138 million weights. This is a T5 of that shape. The scripts run the encoder, and "
        "the keys and values of cross-attention, anew in every step; here they run once, as in T5, "
        "so CrypTen's protocols take fewer bytes than in the paper.",
        source=True,
        prompt=4,
        lengths=(128,),
        pasts=(4, 64, 129),
        few=(4, 129),
    ),
}


@cache
def t5() -> tuple[nn.Module, list[int]]:
    """T5 of the paper's size, random weights."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=50257,
        d_model=768,
        d_kv=64,
        d_ff=3072,
        num_layers=6,
        num_decoder_layers=6,
        num_heads=12,
        feed_forward_proj="gelu_new",
        decoder_start_token_id=0,
    )
    model: nn.Module = T5ForConditionalGeneration(config).eval()
    return model, [(7919 * i + 13) % config.vocab_size for i in range(1024)]


LOADERS = {"gpt2-124m": gpt2, "t5-138m": t5}

_EMBEDDING = {"embedding"}
_LINEAR = {
    "linear", "matmul", "rms_norm_linear", "layer_norm_linear", "constant_attention",
}  # fmt: skip
_SOFTMAX = {"attention", "ratio_attention", "softmax"}
_AFTER = {"truncate", "part"}
"""Ops that belong to what makes their operand."""

_HEAD = {"reveal", "reveal_token"}


def categories(program: RoleProgram) -> dict[str, str]:
    """The category of `merge_tables.CATEGORIES` that each instruction is booked in, by name."""
    steps = {planned.name: planned for planned in Plan(program).steps}
    readers: dict[str, Planned] = {}
    for planned in reversed(steps.values()):
        readers.update(dict.fromkeys(planned.refs, planned))
    head: set[str] = set()
    asked = [p.name for p in steps.values() if p.op is not None and p.op.name in _HEAD]
    while asked:
        planned = steps.get(asked.pop())
        if planned is not None and planned.name not in head:
            head.add(planned.name)
            if planned.op is None or planned.op.name not in _LINEAR:
                asked += planned.refs
    found: dict[str, str] = {}

    def category(planned: Planned) -> str:
        if planned.name not in found:
            found[planned.name] = "rest"  # for values that lead to themselves: none do
            found[planned.name] = decide(planned)
        return found[planned.name]

    def decide(planned: Planned) -> str:
        name = planned.op.name if planned.op is not None else ""
        if planned.name in head:
            return "head"
        for category_of, ops in (
            ("embedding", _EMBEDDING), ("linear", _LINEAR), ("softmax", _SOFTMAX),
        ):  # fmt: skip
            if name in ops:
                return category_of
        if name in _AFTER:
            made = [steps[ref] for ref in planned.refs if ref in steps]
            return category(made[0]) if made else "rest"
        moves = planned.op is None or planned.op.kind in (OpKind.OPENING, OpKind.MOVEMENT)
        reader = readers.get(planned.name)
        return category(reader) if moves and reader is not None else "rest"

    for planned in steps.values():
        category(planned)
    return found


def steps_of(
    program: Program,
    kind: Kind,
    tokens: Sequence[int],
    pasts: Sequence[int],
    drafts: int,
    repeats: int,
) -> list[tuple[int, int, Step]]:
    """New tokens, past ones and inputs of each step to measure, small ones first.

    pasts: of the decode steps. drafts: most of a step that checks them; 0 without. The caches are
    those of the longest text, in the clear, cut to each step's past.
    """
    server = program.roles["server"]
    plain, longest = PlainExecutor(server), max(pasts)
    prompt, decode = server.phase(PROMPT), server.phase(DECODE)
    kept = {spec.name: spec for spec in decode.inputs if spec.cache_output}
    fed, empty = torch.tensor([list(tokens)]), plain.start()
    first = {prompt.inputs[0].name: fed[:, : kind.prompt], **empty}
    full = {}
    if server.encodes:
        first[prompt.inputs[1].name] = torch.full((1, BEGUN), program.manifest.answer_start)
        values = plain.step(first, prompt.outputs)
        full = {name: values[spec.cache_output] for name, spec in kept.items()}
        count = longest - kind.prompt
        hidden = values[prompt.outputs[0]] if server.resends else None
        rest = fed[:, :count] if hidden is None else hidden.expand(1, count, -1)
        last = decode
        values = plain.step({decode.inputs[0].name: rest, **full}, last.outputs)
    else:
        last = prompt
        whole = {prompt.inputs[0].name: fed[:, :longest], **empty}
        values = plain.step(whole, last.outputs)
    # What cross-attention reads does not grow: a decode step does not return it.
    full |= {n: values[s.cache_output] for n, s in kept.items() if s.cache_output in values}
    hidden = values[last.outputs[0]][:, -1:] if server.resends else None
    found = [(kind.prompt, 0, Step(first, repeats, prompt.name, whole=False))]
    for past in pasts:
        cached = server.sizes(1, past, kind.prompt if server.encodes else None)[1]
        cut = {
            name: full[name].narrow(spec.shape.index("past"), 0, cached)
            if "past" in spec.shape
            else full[name]
            for name, spec in kept.items()
        }
        for new in (1, 1 + drafts) if drafts else (1,):
            rows = fed[:, past : past + new] if hidden is None else hidden
            inputs = {decode.inputs[0].name: rows, **cut}
            found.append((new, past, Step(inputs, repeats, decode.name, whole=False)))
    if hidden is not None:
        finish = server.phase(FINISH)
        counts = [len(kind.decoded(length)) + 1 for length in kind.lengths if length <= LENGTH]
        for count in dict.fromkeys((1, *counts)):
            rows = hidden.expand(1, count, hidden.shape[-1])
            found.append((0, count, Step({finish.inputs[0].name: rows}, repeats, finish.name)))
    return found


def counted(program: Program, kind: Kind, drafts: int) -> dict[str, Spent]:
    """Rounds and bytes of all decode steps of the tables' text, by the cost model."""
    booked = categories(program.any_role)
    return {
        key(new, LENGTH): sum(
            (_predicted(program, kind, new, past, booked) for past in kind.decoded(LENGTH)),
            Spent(),
        )
        for new in ((1, 1 + drafts) if drafts else (1,))
    }


def _predicted(
    program: Program, kind: Kind, new: int, past: int, booked: Mapping[str, str]
) -> Spent:
    """Rounds and bytes of a step, by the cost model."""
    source = kind.prompt if program.any_role.encodes and past else None
    report = cost_report(program.any_role, new, past, source=source)
    shares: dict[str, Share] = {}
    for row in report.rows:
        name = booked[row.name]
        spent = Share(0.0, row.cost.online, row.cost.offline)
        shares[name] = shares.get(name, Share()) + spent
    return Spent(report.total.rounds, shares)


def points_of(
    program: Program, steps: Iterable[tuple[int, int, Step]], taken: Iterable[Taken]
) -> list[Point]:
    """The steps as measured, with what each instruction took added up by category."""
    booked = categories(program.any_role)
    found = []
    for (new, past, _), step in zip(steps, taken, strict=True):
        shares: dict[str, Share] = {}
        for name, spent in step.shares.items():
            shares[booked[name]] = shares.get(booked[name], Share()) + spent
        seconds = step.seconds, step.processor_seconds
        found.append(Point(new, past, *seconds, step.rounds, shares))
    return found


def check(program: Program, kind: Kind, points: Iterable[Point]) -> None:
    """Raise ValueError unless the cost model's bytes and rounds are those that were counted."""
    booked = categories(program.any_role)
    for point in points:
        told = _predicted(program, kind, point.new, point.past, booked)
        sums = [(s.total.online, s.total.offline) for s in (told, Spent(0, point.shares))]
        if (told.rounds, *sums[0]) != (point.rounds, *sums[1]):
            raise ValueError(
                f"a step of {point.new} tokens after {point.past} took {point.rounds} rounds and "
                f"{sums[1]} bytes; the cost model says {told.rounds} and {sums[0]}"
            )


class Measurement:
    """The rows of a run, kept in `folder` as they are measured."""

    def __init__(
        self, kinds: Mapping[str, Kind], folder: Path, resume: bool, repeats: int = REPEATS
    ) -> None:
        """repeats: of a step by mergec's protocols."""
        self.kinds, self.repeats = kinds, repeats
        self.rows: list[Row] = []
        self._place = folder / STORED
        self._captured: dict[str, Captured] = {}
        self._console = Console(stderr=True)
        folder.mkdir(parents=True, exist_ok=True)
        if resume and self._place.exists():
            stored = json.loads(self._place.read_text())
            if stored["machine"] != machine():
                raise SystemExit(f"{self._place}: rows of another machine; run without --resume")
            self.rows = [Row.read(row) for row in stored["rows"]]

    def run(self, models: Sequence[str], systems: Sequence[System] = SYSTEMS) -> None:
        """Measure every row that is missing or failed; what all are compared with first."""
        known = {(row.model, row.system) for row in self.rows if not row.failed}
        slow = [s for s in systems if s.mode == "crypten" and s is not BASELINE]
        for name in models:
            for system in (*[s for s in systems if s not in slow], *slow):
                if (name, system.label) in known:
                    continue
                began = time.monotonic()
                self._console.print(f"{name}: {system.label}")
                row = self._row(name, system)
                if row.failed:
                    self._console.print(f"  not run: {row.failed}", markup=False)
                self._console.print(f"  {time.monotonic() - began:.0f} s")
                self._keep(row)
            self._captured.clear()

    def _row(self, name: str, system: System) -> Row:
        load = os.getloadavg()[0]
        try:
            points, counts = self._measure(name, system)
        except Exception as error:  # noqa: BLE001  (the rest of the table still holds)
            said = (str(error).splitlines() or [""])[0]
            if not isinstance(error, MergecError):
                said = f"{type(error).__name__}: {said}"
            return Row(name, system.label, load=load, failed=said)
        finally:
            gc.collect()
        return Row(name, system.label, points, counts, load)

    def _measure(self, name: str, system: System) -> tuple[list[Point], dict[str, Spent]]:
        kind, stock = self.kinds[name], system.mode == "crypten"
        model, tokens = LOADERS[name]()
        if name not in self._captured:
            self._captured[name] = capture(model)
        # For a lossy pass to observe: tokens of the same kind, but not fed to any step.
        observed = (tuple(tokens[-OBSERVED:]),) if system.preset != "exact" else ()
        config = CompileConfig(
            preset=system.preset,
            weights="shared" if stock else "server",
            speculate_up_to=system.drafts,
            calibration=observed,
        )
        program = compile_decoder(model, config=config, captured=self._captured[name])
        pasts, repeats = (kind.few, 1) if stock else (kind.pasts, self.repeats)
        steps = steps_of(program, kind, tokens, pasts, system.drafts, repeats)
        taken = run(program.roles, [step for _, _, step in steps], system.mode, split=True)
        points = points_of(program, steps, taken)
        if stock:
            return points, {}
        check(program, kind, points)
        return points, counted(program, kind, system.drafts)

    def _keep(self, row: Row) -> None:
        """Add a row, in place of the same one if there is one, and write all."""
        key_of = {(r.model, r.system): r for r in (*self.rows, row)}
        self.rows = list(key_of.values())
        text = json.dumps({"machine": machine(), "rows": [r.json() for r in self.rows]}, indent=1)
        fresh = self._place.with_suffix(".new")
        fresh.write_text(text + "\n")
        fresh.replace(self._place)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--page", action="store_true", help="write the page from the kept rows")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of a step by mergec")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the kept rows")
    parser.add_argument("--output", type=Path, default=TARGET)
    options = parser.parse_args(arguments)
    measurement = Measurement(
        KINDS, options.results, options.resume or options.page, options.repeats
    )
    if not options.page:
        measurement.run(options.models)
    drafts = achieved(ACHIEVED.read_text(encoding="utf-8"), 3)
    text = page(KINDS, measurement.rows, drafts, machine(), LENGTH)
    options.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
