"""Single faults that cosmic-ray puts into the code, and which of them the tests notice.

The checkout stays as it is: each worker changes a copy of its own, one place at a time, and runs
the tests that `SUITES` lists for the changed module. Places are drawn by a seed, and for each place
one of cosmic-ray's changes. A run ends when the sample or the time is used up, so a shorter one
runs the first part of the same list.
"""

from __future__ import annotations

import argparse
import ast
import multiprocessing
import os
import queue
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.commands.init import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.testing import run_tests
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome

ROOT = Path(__file__).resolve().parents[1]
_P, _O = "tests/protocols/test_", "tests/ops/test_"
_EVIDENCE = f"{_P}evidence.py {_P}exhaustive.py"


def _ops(names: str) -> str:
    """The tests of every op, for ops of these names."""
    return f"{_O}every_op.py -k 'not test_every_op or {names}'"


SUITES = {
    "runtime/protocols/argmax.py": f"{_P}argmax.py {_EVIDENCE}",
    "runtime/protocols/compare.py": f"{_P}compare.py {_EVIDENCE}",
    "runtime/protocols/deferred.py": f"{_P}deferred.py {_EVIDENCE} {_P}rounding.py",
    "runtime/protocols/digits.py": f"{_P}formula.py {_P}compare.py",
    "runtime/protocols/formula.py": f"{_P}formula.py {_P}selection.py",
    "runtime/protocols/gain.py": _ops("norm"),
    "runtime/protocols/gumbel.py": f"{_O}reveal_token.py",
    "runtime/protocols/halves.py": f"{_P}formula.py {_O}domains.py",
    "runtime/protocols/histogram.py": f"{_P}histogram.py",
    "runtime/protocols/interval.py": f"{_P}interval.py {_O}domains.py {_P}rounding.py",
    "runtime/protocols/local.py": f"{_P}multiply.py {_ops('mul or scale or embedding')}",
    "runtime/protocols/multiply.py": f"{_P}multiply.py {_EVIDENCE}",
    "runtime/protocols/normalize.py": f"{_P}normalize.py {_EVIDENCE} {_P}rounding.py",
    "runtime/protocols/octave.py": f"{_P}octave.py {_O}domains.py {_P}rounding.py",
    "runtime/protocols/opening.py": f"{_P}compare.py {_P}rounding.py {_P}secrecy.py",
    "runtime/protocols/peak.py": f"{_P}peak.py {_P}formula.py {_EVIDENCE}",
    "runtime/protocols/power.py": f"{_P}power.py {_EVIDENCE} {_O}domains.py {_P}rounding.py",
    "runtime/protocols/ranks.py": f"{_P}ranks.py {_P}argmax.py {_P}peak.py",
    "runtime/protocols/rectify.py": f"{_EVIDENCE} {_P}rounding.py {_ops('relu or glu')}",
    "runtime/protocols/rows.py": f"{_P}rows.py {_O}domains.py {_P}rounding.py {_ops('softmax')}",
    "runtime/protocols/saturate.py": f"{_O}domains.py {_P}rounding.py {_ops('silu or glu')}",
    "runtime/protocols/selection.py": f"{_P}selection.py {_O}domains.py",
    "runtime/protocols/shared_weights.py": f"{_P}multiply.py {_ops('linear or embedding')}",
    "runtime/protocols/squares.py": f"{_P}truncate.py {_P}normalize.py {_EVIDENCE}",
    "runtime/protocols/truncate.py": f"{_P}truncate.py {_EVIDENCE} {_P}rounding.py",
    "runtime/protocols/weights.py": f"{_P}multiply.py {_EVIDENCE} {_ops('linear or embedding')}",
    "runtime/correlations/counters.py": "tests/test_counters.py",
    "runtime/correlations/dpf.py": "tests/test_dpf.py",
    "runtime/correlations/prg.py": f"tests/test_dpf.py {_P}secrecy.py",
    "runtime/program/validate.py": "tests/test_bundle.py tests/test_stranger.py",
    "compiler/backend/legalize.py": (
        "tests/test_legalize.py tests/passes/test_fix_attention.py -k 'not no_wire_is_opened_twice'"
    ),
    "runtime/session/sampling.py": (
        "tests/test_sampling.py tests/test_generation_settings.py "
        "-k 'not test_generation_settings or honour or follows or sample_alone or no_token'"
    ),
    "runtime/transport/channel.py": "tests/test_channel.py tests/test_certificates.py",
}
"""The tests that cover a module, quickest first, as arguments of pytest."""

_NOT_BEHAVIOUR = {"core/RemoveDecorator"}
"""A kernel without its decorator is slower, and a cache only saves time."""


@dataclass
class Outcome:
    """One change: where, which, and what became of it."""

    place: str
    operator: str
    diff: str
    result: str


def places(seed: int, modules: Collection[str]) -> list[MutationSpec]:
    """One change for each place of the modules, in an order drawn by the seed."""
    with (
        tempfile.TemporaryDirectory() as folder,
        use_db(f"{folder}/work", WorkDB.Mode.create) as db,
    ):
        init([Path(module) for module in modules], db, {})
        found = [item.mutations[0] for item in db.work_items]
    by_place: dict[tuple[str, tuple[int, int]], list[MutationSpec]] = defaultdict(list)
    hints = {module: _annotations(ROOT / module) for module in modules}
    for spec in found:
        line, column = spec.start_pos
        inside = any(a <= (line, column) < b for a, b in hints[str(spec.module_path)])
        if spec.operator_name not in _NOT_BEHAVIOUR and not inside:
            by_place[str(spec.module_path), tuple(spec.start_pos)].append(spec)
    draw = random.Random(seed)
    order = sorted(by_place)
    draw.shuffle(order)
    key = lambda spec: (spec.operator_name, spec.occurrence)  # noqa: E731
    return [draw.choice(sorted(by_place[place], key=key)) for place in order]


def _annotations(file: Path) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Spans of annotations, which nothing evaluates."""
    nodes: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            nodes.append(node.returns)
        elif isinstance(node, (ast.arg, ast.AnnAssign)):
            nodes.append(node.annotation)
    return [
        ((n.lineno, n.col_offset), (n.end_lineno or 0, n.end_col_offset or 0)) for n in nodes if n
    ]


def copy(folder: Path) -> None:
    """A copy of the tracked files, as they are now, and of compiled kernels."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if os.path.lexists(ROOT / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    # numba takes them for current, because the time of the file that they are of is copied as well.
    for kernel in (ROOT / "runtime").rglob("*.nb[ic]"):
        place = folder / kernel.relative_to(ROOT)
        place.parent.mkdir(exist_ok=True)
        shutil.copy2(kernel, place)


def command(module: str) -> str:
    """The command that runs a module's tests."""
    return f"{sys.executable} -m pytest -q -x -p no:cacheprovider -p no:xdist {SUITES[module]}"


def drop_kernels(module: str) -> None:
    """Remove the compiled kernels that contain kernels of a module.

    numba compiles a kernel anew when its own file changes, not when one that it calls does.
    """
    if "@compiled" not in Path(module).read_text():
        return
    name = "mergec." + module.removesuffix(".py").replace("/", ".")
    for file in Path("runtime").rglob("*.py"):
        if f"from {name} import" in file.read_text():
            for index in file.parent.glob(f"__pycache__/{file.stem}.*.nb[ic]"):
                index.unlink()


def work(folder: Path, todo: multiprocessing.Queue, done: multiprocessing.Queue) -> None:
    """Take changes from `todo` until it is empty or says None, each in the copy in `folder`."""
    copy(folder)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    limits: dict[str, float] = {}
    while True:
        try:
            spec = todo.get_nowait()
        except queue.Empty:
            break
        module = str(spec.module_path)
        if module not in limits:
            # Unchanged code must pass, or nothing is learnt.
            begun = time.monotonic()
            result, said = run_tests(command(module), 1200)
            if result is not TestOutcome.SURVIVED:
                done.put(RuntimeError(f"the tests of {module} fail without a change:\n{said}"))
                break
            limits[module] = 60 + 4 * (time.monotonic() - begun)
        drop_kernels(module)
        found = mutate_and_test([spec], command(module), limits[module])
        drop_kernels(module)
        if found.worker_outcome is not WorkerOutcome.NORMAL:
            done.put(RuntimeError(found.output))
            break
        late = found.output == "timeout"
        result = "out of time" if late else str(found.test_outcome.value)
        place = f"{module}:{spec.start_pos[0]}"
        done.put(Outcome(place, spec.operator_name.removeprefix("core/"), found.diff, result))
    done.put(None)


def run(specs: list[MutationSpec], workers: int, minutes: float) -> list[Outcome]:
    """Run the changes in order; prints each."""
    outcomes: list[Outcome] = []
    todo: multiprocessing.Queue = multiprocessing.Queue()
    done: multiprocessing.Queue = multiprocessing.Queue()
    for spec in specs:
        todo.put(spec)
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as folder:
        team = [
            multiprocessing.Process(target=work, args=(Path(folder, str(i)), todo, done))
            for i in range(workers)
        ]
        for worker in team:
            worker.start()
        left = len(team)
        while left:
            found = done.get()
            if isinstance(found, Exception):
                _stop(todo)
                raise found
            if found is None:
                left -= 1
                continue
            outcomes.append(found)
            print(f"{found.result:<12} {found.place} {found.operator}", flush=True)
            if found.result == "survived":
                print(found.diff, flush=True)
            if time.monotonic() > end:
                _stop(todo)
        for worker in team:
            worker.join()
    return outcomes


def _stop(todo: multiprocessing.Queue) -> None:
    """Leave nothing to do, so that every worker ends after its present change."""
    try:
        while True:
            todo.get(timeout=0.2)
    except queue.Empty:
        pass


def page(outcomes: list[Outcome], total: int, args: argparse.Namespace) -> str:
    """The result as Markdown."""
    told = [f"--{name}={value}" for name, value in vars(args).items() if value and name != "output"]
    counts = Counter(outcome.result for outcome in outcomes)
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in outcomes:
        rows[outcome.place.split(":")[0]][outcome.result] += 1
    lines = [
        "# Single faults",
        "",
        "`make mutants`: cosmic-ray changes one place of the code at a time, such as an operator,",
        "a number or a condition, and the tests that cover the module run. A change that they do",
        "not notice is a gap in the tests, or changes nothing that can be seen.",
        "`benchmarks/mutants.py` lists the modules, and the tests of each.",
        "",
        f"Seed {args.seed}, {len(outcomes)} of {total} places. Command:",
        f"`make mutants MUTANT_ARGS={shlex.quote(shlex.join(told))}`.",
        "",
        "| module | tried | noticed | out of time | unnoticed |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in [*sorted(rows.items()), ("all", counts)]:
        noticed, late, missed = row["killed"], row["out of time"], row["survived"]
        lines.append(f"| {name} | {noticed + late + missed} | {noticed} | {late} | {missed} |")
    missed = [outcome for outcome in outcomes if outcome.result == "survived"]
    if missed:
        lines += ["", "Unnoticed:", ""]
    for outcome in sorted(missed, key=lambda outcome: outcome.place):
        changed = re.findall(r"^[-+](?![-+]{2} )\s*(.*)$", outcome.diff, re.MULTILINE)
        lines.append(f"* `{outcome.place}`: " + " becomes ".join(f"`{line}`" for line in changed))
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="draws places and changes")
    parser.add_argument("--count", type=int, default=240, help="most places")
    parser.add_argument("--minutes", type=float, default=50, help="begin no change after that")
    parser.add_argument("--workers", type=int, default=2, help="changes at the same time")
    parser.add_argument("--only", default="", help="modules whose path this pattern finds")
    parser.add_argument("--output", type=Path, help="a Markdown file for the result")
    args = parser.parse_args()
    os.chdir(ROOT)
    every = places(args.seed, [module for module in SUITES if re.search(args.only, module)])
    outcomes = run(every[: args.count], args.workers, args.minutes)
    text = page(outcomes, len(every), args)
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
