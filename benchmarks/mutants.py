"""Single faults that cosmic-ray puts into the code, and which of them the tests notice.

The checkout stays as it is: each worker changes a copy of its own, one place at a time, and runs
the tests that `SUITES` lists for the changed module. Places are drawn by a seed, and for each place
one of cosmic-ray's changes. A run ends when the sample or the time is used up, so a shorter one
runs the first part of the same list. With `--results` a run goes on where the last one ended, and
tries again what the tests did not notice then.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import importlib
import json
import multiprocessing
import os
import queue
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, MutableMapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.queues import Queue
from pathlib import Path

import pytest
from cosmic_ray.commands.init import init
from cosmic_ray.mutating import use_mutation
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec

ROOT = Path(__file__).resolve().parents[1]


def _tests(names: str, ops: str = "", exact: str = "") -> str:
    """Arguments of pytest for some tests; a name alone is a file of `tests/protocols`.

    ops: also the tests of every op, for ops of these names, as in pytest's `-k`. exact: also the
    tests of rounding; the ones of exact rounding, which are slow, for these cases.
    """
    files = [n if "/" in n else f"tests/protocols/test_{n}.py" for n in names.split()]
    chosen = []
    if ops:
        files.insert(1, "tests/ops/test_every_op.py")
        chosen.append(f"(not test_every_op or {ops})")
    if exact:
        files.append("tests/protocols/test_rounding.py")
        chosen.append(f"(not that_decides or {exact})")
    return " ".join(files) + (f" -k '{' and '.join(chosen)}'" if chosen else "")


_KERNELS = "tests/kernels/test_kernels.py"
_FORMS = f"{_KERNELS}::test_torch_gives_the_words_of_the_cpu"
_STREAM = f"{_KERNELS}::test_a_device_reads_the_same_stream"
_ARRAYS = f"{_KERNELS}::test_no_kernel_of_the_cpu_leaves_its_arrays"
_EXPANDED = "tests/test_weights.py::test_masks_expanded_for_each_product_deal_the_same_words"
_DOMAINS = "tests/ops/test_domains.py"
_STATED = "tests/protocols/test_stated.py"
_EVERY = "exhaustive evidence"

SUITES = {
    "runtime/protocols/argmax.py": _tests(f"argmax {_EVERY} stated"),
    "runtime/protocols/broad.py": _tests(f"{_FORMS} broad stated"),
    "runtime/protocols/columns.py": _tests("normalize deferred"),
    "runtime/protocols/compare.py": _tests(f"compare {_EVERY}"),
    "runtime/protocols/deferred.py": _tests("deferred evidence", "linear", "truncate"),
    "runtime/protocols/digits.py": _tests(f"{_FORMS} formula argmax {_EVERY} stated"),
    "runtime/protocols/finer.py": _tests("finer stated"),
    "runtime/protocols/formula.py": _tests(f"{_FORMS} formula selection stated"),
    "runtime/protocols/gain.py": _tests("normalize", "norm"),
    "runtime/protocols/gated.py": _tests(f"{_FORMS} gated", "glu"),
    "runtime/protocols/gumbel.py": "tests/ops/test_reveal_token.py",
    "runtime/protocols/halves.py": _tests(f"{_FORMS} formula {_DOMAINS} stated"),
    "runtime/protocols/histogram.py": _tests("histogram stated"),
    "runtime/protocols/interval.py": _tests(
        f"{_FORMS} {_DOMAINS} interval evidence stated", "", "silu"
    ),
    "runtime/protocols/local.py": _tests("multiply", "mul or scale or embedding"),
    "runtime/protocols/logarithm.py": _tests(f"{_FORMS} logarithm stated"),
    "runtime/protocols/multiply.py": _tests(f"multiply {_EVERY} stated"),
    "runtime/protocols/normalize.py": _tests(f"{_FORMS} normalize {_EVERY} stated", "", "truncate"),
    "runtime/protocols/octave.py": _tests(f"{_FORMS} {_DOMAINS} octave stated", "", "truncate"),
    "runtime/protocols/opening.py": _tests("compare secrecy stated", "", "truncate or square"),
    "runtime/protocols/peak.py": _tests(f"{_FORMS} peak {_EVERY} stated"),
    "runtime/protocols/pieces.py": _tests(f"{_FORMS} pieces stated", "silu or gelu"),
    "runtime/protocols/power.py": _tests(f"{_DOMAINS} power {_EVERY} stated", "", "truncate"),
    "runtime/protocols/probabilities.py": _tests("probabilities stated"),
    "runtime/protocols/public_text.py": (
        "tests/test_public_text.py -k 'logits or bytes or fresh or sent'"
    ),
    "runtime/protocols/ranks.py": _tests(f"{_FORMS} ranks argmax peak"),
    "runtime/protocols/rectify.py": _tests(f"{_EVERY} stated", "relu or glu", "relu"),
    "runtime/protocols/rows.py": _tests(
        f"{_DOMAINS} rows stated", "softmax", "softmax and not long"
    ),
    "runtime/protocols/saturate.py": _tests(f"{_FORMS} {_DOMAINS} pieces stated", "lu", "silu"),
    "runtime/protocols/selection.py": _tests(f"{_FORMS} selection {_DOMAINS} stated"),
    "runtime/protocols/shared_weights.py": _tests("multiply", "linear or embedding"),
    "runtime/protocols/slots.py": _tests(f"{_FORMS} slots rows stated"),
    "runtime/protocols/squares.py": _tests(
        f"{_FORMS} truncate normalize {_EVERY} stated", "", "square"
    ),
    "runtime/protocols/top_k.py": _tests("top_k stated", "top_k"),
    "runtime/protocols/truncate.py": _tests(f"{_FORMS} truncate {_EVERY} stated", "", "truncate"),
    "runtime/protocols/waves.py": _tests("waves stated", "silu or gelu"),
    "runtime/protocols/weights.py": _tests(
        f"multiply {_EXPANDED} {_EVERY} stated", "linear or embedding"
    ),
    "runtime/protocols/wide.py": _tests(f"{_FORMS} wide stated", "linear"),
    "runtime/correlations/counters.py": (
        f"tests/test_counters.py {_FORMS} {_STATED} {_ARRAYS} -m ''"
    ),
    "runtime/correlations/dpf.py": f"tests/test_dpf.py {_FORMS}",
    "runtime/correlations/prg.py": _tests(f"{_STREAM} tests/test_dpf.py secrecy"),
    "runtime/program/validate.py": (
        "tests/test_stranger.py tests/test_bundle.py tests/test_encoder_decoders.py "
        "-k 'not test_encoder_decoders or keep_the_phases or faulty_phases'"
    ),
    "compiler/backend/legalize.py": (
        "tests/test_legalize.py tests/passes/test_fix_attention.py tests/test_deferral.py "
        "-k 'not no_wire_is_opened and not deferral or fits_before or results_beyond or rows_keep'"
    ),
    "runtime/session/sampling.py": (
        "tests/test_sampling.py tests/test_generation_settings.py "
        "-k 'not test_generation_settings or honour or follows or sample_alone or no_token'"
    ),
    "runtime/transport/channel.py": "tests/test_channel.py",
    "runtime/transport/frames.py": "tests/test_channel.py",
}
"""The tests that cover a module, as arguments of pytest; the likeliest to notice a fault first."""

_FROZEN = "nothing assigns to a field"
_PIECES = "elements do not depend on how many are expanded at once"

_DISJOINT = "both never have the same bit set"

EQUIVALENT: dict[str, dict[tuple[str, str], str]] = {
    "compiler/backend/legalize.py": {
        (
            'if node.op == "placeholder" and node.meta["vis"] is Vis.SHARED:',
            'if node.op is "placeholder" and node.meta["vis"] is Vis.SHARED:',
        ): "Python keeps one object for all strings that are written like a name",
    },
    "runtime/correlations/counters.py": {
        (
            "for path, value in zip(some, values.reshape(len(some), -1), strict=True):",
            "for path, value in zip(some, values.reshape(len(some), -1), strict=False):",
        ): "both always have the same length",
        (
            "for start in range(0, nodes.shape[0], LANES):",
            "for start in range(0, nodes.shape[ -1], LANES):",
        ): "there is one dimension",
    },
    "runtime/protocols/broad.py": {
        ("_TOGETHER = 1 << 12", "_TOGETHER = 2 << 12"): _PIECES,
        ("_TOGETHER = 1 << 12", "_TOGETHER = 1 << 11"): _PIECES,
        (
            "if dealt is None or opened.is_meta:",
            "if dealt is None and opened.is_meta:",
        ): "the dealer has neither, and parties have both",
    },
    "runtime/protocols/interval.py": {
        ("_PIECE = 64", "_PIECE = 63"): _PIECES,
        (
            "ones[2 * j + word] = (blocks[0, i, j, word] ^ seed) + (chosen & last[i, word])",
            "ones[2 * j ^ word] = (blocks[0, i, j, word] ^ seed) + (chosen & last[i, word])",
        ): _DISJOINT,
    },
    "runtime/protocols/logarithm.py": {
        (
            "lanes = (2 * _END + LANES - 1) // LANES",
            "lanes = (2 * _END + LANES - 0) // LANES",
        ): "nothing uses one more vector",
        (
            "elif level + 1 > _HEAD:",
            "elif level + 2 > _HEAD:",
        ): "the branch before takes that level",
        ("count = last + 1", "count = last + 2"): "nothing reads one more node",
        (
            "words[k, 2 * lane + 1] = corrections[i, 2 * k + 1]",
            "words[k, 2 * lane + 1] = corrections[i, 2 * k ^ 1]",
        ): _DISJOINT,
        (
            "nodes, last, total = 1, 0, np.int64(0)",
            "nodes, last, total = 1, 1, np.int64(0)",
        ): "the first table sets it, and nothing reads it before",
    },
    "runtime/protocols/multiply.py": {
        (
            "products.append(product_of_masked(ctx, Masked(x, a, 0), Masked(y, b, 0)))",
            "products.append(product_of_masked(ctx, Masked(x, a, 0), Masked(y, b, -1)))",
        ): "a product of words asks for no fractional bits",
    },
    "runtime/protocols/normalize.py": {
        (
            "both_wrap += wrap_of(0, s, RING_BITS) * wrap[i, k] * both[i, e, far]",
            "both_wrap += wrap_of( 1, s, RING_BITS) * wrap[i, k] * both[i, e, far]",
        ): "only the sign of the word counts, and neither is negative",
        (
            "part = logical_shift(mask, s) if s > 0 else mask << -s",
            "part = logical_shift(mask, s) if s > -1 else mask << -s",
        ): "a shift by no bits is the same in both directions",
        ("wraps = top.shape[1] > 0", "wraps = top.shape[1] != 0"): "no length is negative",
    },
    "runtime/protocols/octave.py": {
        ("if d + 1 < depth:", "if d + 1 is not depth:"): "no level lies below the last one",
        (
            "lifted = share << lift if lift and not share.is_meta else share",
            "lifted = share << lift if lift or not share.is_meta else share",
        ): "a shift by no bits, or of words without values, changes nothing",
    },
    "runtime/protocols/peak.py": {
        ("@dataclass(frozen=True, eq=False)", "@dataclass(frozen=False, eq=False)"): _FROZEN,
        (
            "if valid.numel() > _REMEMBERED:",
            "if not valid.numel() > _REMEMBERED:",
        ): "what is not kept is found again, and is the same",
        (
            "less = _LESS.evaluate(bits, words)[:, 0]",
            "less = _LESS.evaluate(bits, words)[:, -1]",
        ): "there is one payload",
        (
            "place = (rank.long() & (level.pairs.entries - 1))[:, None, None].expand(-1, 2, 1)",
            "place = (rank.long() & (level.pairs.entries - 1))[:, None, None].expand(-1, 2, 2)",
        ): "of both columns the first one is read",
    },
    "runtime/protocols/pieces.py": {
        (
            "low = halves[i, entry * terms : (entry + 1) * terms]",
            "low = halves[i, entry * terms : (entry + 2) * terms]",
        ): "of the longer slice only the first words are used",
    },
    "runtime/protocols/selection.py": {
        (
            "crossed = factors.shape[0] > 0",
            "crossed = factors.shape[0] != 0",
        ): "no length is negative",
    },
    "runtime/protocols/slots.py": {
        (
            "for k in range(target.shape[0]):",
            "for k in range(target.shape[ -1]):",
        ): "there is one dimension",
    },
    "runtime/protocols/truncate.py": {
        ("return words[0]", "return words[ 1]"): "both are shapes without words, and equal",
    },
    "runtime/protocols/weights.py": {
        ("if ctx.party == CLIENT:", "if ctx.party <= CLIENT:"): "no party's number is lower",
        (
            "for piece, mask in zip(_pieces(source), masks, strict=True):",
            "for piece, mask in zip(_pieces(source), masks, strict=False):",
        ): "both always have the same length",
    },
    "runtime/protocols/wide.py": {
        (
            "return low << bits, (high << bits) | carried",
            "return low << bits, (high << bits) + carried",
        ): _DISJOINT,
    },
    "runtime/session/sampling.py": {
        (
            "scores = _keep_likely(scores, self._settings.top_k or 0, self._settings.top_p or 1.0)",
            (
                "scores = _keep_likely(scores, self._settings.top_k or -1, "
                "self._settings.top_p or 1.0)"
            ),
        ): "any number below one keeps all tokens",
    },
    "runtime/transport/channel.py": {
        (
            "if self._start < self._stop:",
            "if self._start != self._stop:",
        ): "what is taken never exceeds what was read",
        (
            "found = {d for d, _ in poll.poll(0 if here else 1000 * max(0.0, left))} - {mine}",
            "found = {d for d, _ in poll.poll(0 if here else 1001 * max(0.0, left))} - {mine}",
        ): "it looks again a thousandth later, which is less than a clock promises",
    },
}
"""Changes of a module that nothing can notice, as text before and after, each with the reason."""

_NOT_BEHAVIOUR = {"core/RemoveDecorator"}
"""A kernel without its decorator is slower, and a cache only saves time."""


_PATIENCE = timedelta(minutes=10)
"""A test that waits for ever ends after that; on a busy machine some take several minutes."""

_OPTIONS = shlex.split(
    "-q -x -p no:cacheprovider -p no:xdist "
    f"-o faulthandler_timeout={_PATIENCE.total_seconds()} -o faulthandler_exit_on_timeout=true"
)
_WAITED = f"Timeout ({_PATIENCE})!"
"""What faulthandler prints before it ends such a test."""

_LIBRARIES = ("hypothesis", "numba", "numpy", "torch", "torch.export", "transformers")
"""What many tests import; nothing of this repository."""
_COMPILED = "@compiled"

Key = tuple[str, str, int]
"""A change: module, operator, occurrence."""


@dataclass(frozen=True)
class Outcome:
    """One change: which, where, and what became of it.

    occurrence: cosmic-ray's number of the place, among those of this operator in the module.
    old, new: the text of the changed lines. digest: of the file before the change.
    """

    module: str
    operator: str
    occurrence: int
    line: int
    old: str
    new: str
    result: str
    digest: str

    @property
    def key(self) -> Key:
        return self.module, self.operator, self.occurrence

    @property
    def place(self) -> str:
        return f"{self.module}:{self.line}"

    @property
    def reason(self) -> str:
        """Why nothing can notice the change, or nothing."""
        return EQUIVALENT.get(self.module, {}).get((self.old, self.new), "")


Tries = dict[Key, list[Outcome]]
"""All that was found for each change, the first try first."""


def key(spec: MutationSpec) -> Key:
    """What a change is known by."""
    return str(spec.module_path), spec.operator_name, spec.occurrence


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
    copy_kernels(ROOT, folder)


def copy_kernels(source: Path, target: Path) -> None:
    """Make the compiled kernels of `target` those of `source`."""
    for kernel in (target / "runtime").rglob("*.nb[ic]"):
        kernel.unlink()
    for kernel in (source / "runtime").rglob("*.nb[ic]"):
        place = target / kernel.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(kernel, place)


def run_tests(module: str, limit: float) -> tuple[str, str]:
    """Run a module's tests in a fork: "survived", "killed" or "out of time", and what they print.

    The fork inherits what the tests import from elsewhere, which takes longer than many of them.
    """
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if not child:
            os.setsid()
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            code = pytest.main([*_OPTIONS, *shlex.split(SUITES[module])])
            sys.stdout.flush()
            os._exit(code)
        last, left = time.monotonic(), limit
        ended, status = os.waitpid(child, os.WNOHANG)
        while not ended and left > 0:
            time.sleep(0.05)
            now = time.monotonic()
            # If this process was stopped for a while, so were the tests.
            last, left = now, left - min(now - last, 1.0)
            ended, status = os.waitpid(child, os.WNOHANG)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        if not ended:
            os.waitpid(child, 0)
            return "out of time", ""
        said.seek(0)
        text = said.read()
        if status and _WAITED in text:
            return "out of time", text
        return "killed" if status else "survived", text


def try_change(spec: MutationSpec, limit: float, kernels: Path) -> Outcome:
    """Make one change, run the tests, and undo it; compiled kernels become those of `kernels`."""
    module = str(spec.module_path)
    times = Path(module).stat()
    operator = get_operator(spec.operator_name)(**spec.operator_args)
    if _COMPILED in Path(module).read_text():
        drop_callers(module)
    with use_mutation(spec.module_path, operator, spec.occurrence) as (before, after):
        result, _ = run_tests(module, limit)
    # Else the kernels of the unchanged file, and those that call them, would count as outdated.
    os.utime(module, ns=(times.st_atime_ns, times.st_mtime_ns))
    copy_kernels(kernels, Path())
    changes = difflib.ndiff(before.splitlines(), after.splitlines())
    lines = [(line[0], line[2:].strip()) for line in changes if line[0] in "-+"]
    old, new = (" ".join(text for sign, text in lines if sign == which) for which in "-+")
    return Outcome(*key(spec), spec.start_pos[0], old, new, result, digest(before))


def digest(text: str) -> str:
    """A short digest of a file's text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def drop_callers(module: str) -> None:
    """Remove the compiled kernels of the files that call kernels of a module.

    numba compiles a kernel anew when its own file changes, not when one that it calls does.
    """
    name = "mergec." + module.removesuffix(".py").replace("/", ".")
    for file in Path("runtime").rglob("*.py"):
        if f"from {name} import" in file.read_text():
            for index in file.parent.glob(f"__pycache__/{file.stem}.*.nb[ic]"):
                index.unlink()


def work(folder: Path, todo: Queue, done: Queue, limits: MutableMapping[str, float]) -> None:
    """Take changes from `todo` until it is empty, each in the copy in `folder`.

    limits: the seconds that a module's tests may take; shared by the workers.
    """
    checkout, kernels = folder / "checkout", folder / "kernels"
    copy(checkout)
    os.chdir(checkout)
    os.environ["PYTHONPATH"] = str(checkout)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(checkout))
    while True:
        try:
            spec = todo.get_nowait()
        except queue.Empty:
            break
        module = str(spec.module_path)
        if module not in limits:
            # Unchanged code must pass, or nothing is learnt.
            begun = time.monotonic()
            result, said = run_tests(module, 1200)
            if result != "survived":
                done.put(RuntimeError(f"the tests of {module} fail without a change:\n{said}"))
                break
            limits[module] = 40 + 3 * (time.monotonic() - begun)
            copy_kernels(Path(), kernels)
        elif not kernels.exists():
            copy_kernels(Path(), kernels)
        done.put(try_change(spec, limits[module], kernels))
    done.put(None)


def run(specs: list[MutationSpec], workers: int, minutes: float) -> Iterator[Outcome]:
    """Run the changes in order; prints each."""
    for library in _LIBRARIES:
        importlib.import_module(library)
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    forks = multiprocessing.get_context("fork")
    todo: Queue = forks.Queue()
    done: Queue = forks.Queue()
    for spec in specs:
        todo.put(spec)
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as folder, forks.Manager() as manager:
        limits = manager.dict()
        team = [
            forks.Process(target=work, args=(Path(folder, str(i)), todo, done, limits))
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
            print(f"{found.result:<12} {found.place} {found.operator}", flush=True)
            if found.result == "survived":
                print(f"    {found.old}\n    {found.new}", flush=True)
            yield found
            if time.monotonic() > end:
                _stop(todo)
        for worker in team:
            worker.join()


def _stop(todo: Queue) -> None:
    """Leave nothing to do, so that every worker ends after its present change."""
    try:
        while True:
            todo.get(timeout=0.2)
    except queue.Empty:
        pass


_SAMPLE = re.compile(r"^\| (\d+) \| .*\|$", re.MULTILINE)
"""A line of the table of samples, which begins with the seed."""


def page(tried: Tries, total: int, args: argparse.Namespace, former: str = "") -> str:
    """The result as Markdown: of the last try of each change, and the share of the first ones.

    former: the page before, whose samples of other seeds stay.
    """
    outcomes = [tries[-1] for tries in tried.values()]
    at_first = [tries[0] for tries in tried.values()]
    told = [
        f"--{name}={value}"
        for name, value in vars(args).items()
        if value and name not in ("output", "results")
    ]
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in outcomes:
        for row in (outcome.module, "all"):
            rows[row]["equal" if _is_equal(outcome) else outcome.result] += 1
    changing = rows["all"].total() - rows["all"]["equal"]
    noticed, before = (
        sum(outcome.result != "survived" for outcome in each) for each in (outcomes, at_first)
    )

    def share(count: int) -> str:
        return f"{count / max(1, changing):.1%}"

    lines = [
        "# Single faults",
        "",
        "`make mutants`: cosmic-ray changes one place of the code at a time, such as an operator,",
        "a number or a condition, and the tests that cover the module run. A change that they do",
        "not notice is a gap in the tests, or changes nothing that can be seen.",
        "`benchmarks/mutants.py` lists the modules, the tests of each, and the changes that, as a",
        "person judged, change nothing, with the reason for each. Tests are added for what a run",
        "does not notice, so the share on the first try, before that, tells how many faults of",
        "other places they do.",
        "",
        f"Seed {args.seed}, {len(outcomes)} of {total} places. Of the {changing} faults that",
        f"change anything, the tests noticed {before} on the first try: {share(before)}. With the",
        f"tests that were added since, they notice {noticed}: {share(noticed)}. Command:",
        f"`make mutants MUTANT_ARGS={shlex.quote(shlex.join(told))}`.",
        "",
        "Samples, each of the code and the tests as they were then:",
        "",
        "| seed | faults | noticed on the first try |",
        "| --- | ---: | ---: |",
        *_samples(former, args.seed, f"{changing} | {before} ({share(before)})"),
        "",
        "| module | tried | noticed | out of time | change nothing | unnoticed |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in [*sorted(rows.keys() - {"all"}), "all"]:
        row = rows[name]
        kinds = " | ".join(str(row[k]) for k in ("killed", "out of time", "equal", "survived"))
        lines.append(f"| {name} | {row.total()} | {kinds} |")
    missed = sorted(
        (outcome for outcome in outcomes if outcome.result == "survived"),
        key=lambda outcome: (outcome.module, outcome.line),
    )
    for title, equal in (("Unnoticed", False), ("Change nothing", True)):
        of_kind = [outcome for outcome in missed if _is_equal(outcome) == equal]
        if of_kind:
            lines += ["", f"{title}:", ""]
        for outcome in of_kind:
            why = f": {outcome.reason}" if equal else ""
            lines.append(f"* `{outcome.place}`: `{outcome.old}` becomes `{outcome.new}`{why}")
    return "\n".join([*lines, ""])


def _samples(former: str, seed: int, found: str) -> list[str]:
    """The lines of the table of samples, by seed: those of a former page, and what was found."""
    lines = {int(line[1]): line[0] for line in _SAMPLE.finditer(former)}
    lines[seed] = f"| {seed} | {found} |"
    return [lines[number] for number in sorted(lines)]


def _is_equal(outcome: Outcome) -> bool:
    return outcome.result == "survived" and bool(outcome.reason)


def known(file: Path | None, specs: list[MutationSpec]) -> Tries:
    """What earlier runs found for these changes, of modules that have not changed since.

    The tests are taken to be as good as they were.
    """
    if file is None or not file.exists():
        return {}
    asked = {key(spec) for spec in specs}
    digests = {module: digest((ROOT / module).read_text()) for module, *_ in asked}
    found: Tries = {}
    for line in file.read_text().splitlines():
        outcome = Outcome(**json.loads(line))
        if outcome.key in asked and outcome.digest == digests[outcome.module]:
            found.setdefault(outcome.key, []).append(outcome)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="draws places and changes")
    parser.add_argument("--count", type=int, default=240, help="most places")
    parser.add_argument("--minutes", type=float, default=50, help="begin no change after that")
    parser.add_argument("--workers", type=int, default=2, help="changes at the same time")
    parser.add_argument("--only", default="", help="modules whose path this pattern finds")
    parser.add_argument("--output", type=Path, help="a Markdown file for the result")
    parser.add_argument("--results", type=Path, help="a file of results to go on with")
    args = parser.parse_args()
    os.chdir(ROOT)
    every = places(args.seed, [module for module in SUITES if re.search(args.only, module)])
    specs = every[: args.count]
    tried = known(args.results, specs)
    again = {k for k, (*_, last) in tried.items() if last.result == "survived" and not last.reason}
    todo = [spec for spec in specs if key(spec) not in tried or key(spec) in again]
    for outcome in run(todo, args.workers, args.minutes):
        tried.setdefault(outcome.key, []).append(outcome)
        if args.results:
            with args.results.open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
    former = args.output.read_text() if args.output and args.output.exists() else ""
    text = page(tried, len(every), args, former)
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
