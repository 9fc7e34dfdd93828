"""The benchmark: one machine, one run, one table; GPT-2-base and SmolLM2 in every setting.

Client, server and dealer are processes on loopback that share the machine's cores. Bytes and
rounds are counted at the transport. Caches of past tokens are computed in plaintext, so a step
after 512 tokens is measured without running the 512 steps before it. CrypTen's stock protocols run
only the first layers, and the rest is extrapolated from the difference that a layer makes.

Writes latest.json, latest.md and two plots to benchmarks/results, row by row. `--resume` continues
an interrupted run on the same machine. A failure is a row of the table, too.
`--quick` measures one decode step in three settings. `--small` measures a prompt and a decode step
of two decoders with two layers, without extrapolation, and writes docs/side-by-side.md.
`--logit-noise 0` leaves out the noise that the server adds, so that errors are those of protocols.
Usage: python benchmarks/bench.py [--quick | --small] [--resume] [--results DIR] [--logit-noise S]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import elementwise
import torch
from harness import RunError, Step, Taken, run
from report import FIGURES, Row, markdown, plots, side_by_side
from rich.console import Console
from torch import nn

from mergec import CompileConfig, Program, compile_decoder
from mergec.compiler.config import DEFAULT_NOISE
from mergec.compiler.frontend.capture import Captured, capture
from mergec.compiler.frontend.load import load_model
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.program.program import phase_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LATEST = "latest.json"

STOCK_LAYERS = (2, 8)
"""Layers of the models that CrypTen's stock protocols run; their difference must exceed the noise.
"""

REPEATS = 7
"""Runs of a decode step. The first of a process is slow; the median counts."""

LENGTH, OBSERVED = 1024, 128
Shape = tuple[int, int]
"""New and past tokens of a step."""

Loader = Callable[[], tuple[nn.Module, list[int]]]


@dataclass(frozen=True)
class Setting:
    """How a model is compiled and run. shapes: the steps to measure, if not all."""

    preset: str
    weights: str
    mode: str = "mergec"
    shapes: tuple[Shape, ...] = ()

    @property
    def label(self) -> str:
        return self.preset if self.mode == "mergec" else self.mode


BASELINE = Setting("exact", "shared", "crypten")
INSTALLED = Setting("exact", "shared", "crypten-gloo", ((1, 128),))
MERGE = Setting("merge", "shared")
EXACT = Setting("exact", "server")
LOSSY = ("mpcformer-2quad", "mpcformer-2relu", "thex", "merge-er", "merge-mm")


@dataclass(frozen=True)
class Plan:
    """What is measured: each model in each setting, at these steps."""

    models: Mapping[str, Loader]
    settings: tuple[Setting, ...]
    shapes: tuple[Shape, ...]
    """Small steps first, because a process's peak memory only grows."""


@cache
def gpt2() -> tuple[nn.Module, list[int]]:
    """GPT-2-base: 12 layers of width 768 and 50,257 tokens, random weights."""
    return _random("gpt2")


@cache
def smollm2() -> tuple[nn.Module, list[int]]:
    """SmolLM2-135M-Instruct: 30 layers of width 576 and 49,152 tokens. Its input is help topics."""
    model, tokenizer = load_model("smollm2")
    return model, help_topics(tokenizer, LENGTH)


@cache
def small_gpt2() -> tuple[nn.Module, list[int]]:
    """GPT-2 with two layers of width 256 and 1,024 tokens, random weights."""
    return _random("gpt2", vocab_size=1024, n_embd=256, n_layer=2, n_head=4, n_positions=256)


@cache
def small_llama() -> tuple[nn.Module, list[int]]:
    """Llama with two layers of width 256 and 1,024 tokens, random weights."""
    return _random(
        "llama",
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )


def help_topics(tokenizer: Any, count: int) -> list[int]:
    """The first tokens of the standard library's help topics, in alphabetical order."""
    text = "\n\n".join(topics[name].strip() for name in sorted(topics))
    ids: list[int] = tokenizer(text[: 16 * count])["input_ids"]
    return ids[:count]


def _random(family: str, **options: Any) -> tuple[nn.Module, list[int]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    model = model.eval()
    vocabulary: int = model.config.vocab_size
    return model, [(7919 * i + 13) % vocabulary for i in range(LENGTH)]


MODELS: dict[str, Loader] = {"gpt2-base": gpt2, "smollm2-135m": smollm2}
FULL = Plan(
    MODELS,
    (
        BASELINE,
        INSTALLED,
        *(Setting(preset, "shared") for preset in LOSSY),
        MERGE,
        Setting("exact", "shared"),
        EXACT,
    ),
    ((1, 128), (1, 512), (16, 0), (64, 0), (128, 0)),
)
QUICK = Plan(MODELS, (BASELINE, MERGE, EXACT), ((1, 128),))
SMALL = Plan(
    {"gpt2-small": small_gpt2, "llama-small": small_llama}, (BASELINE, EXACT), ((1, 32), (32, 0))
)


def shortened(model: nn.Module, layers: int) -> nn.Module:
    """A copy of the model with only its first layers, and its embedding, norm and head."""
    result = copy.deepcopy(model)
    body: Any = result.base_model
    name = "h" if hasattr(body, "h") else "layers"
    setattr(body, name, getattr(body, name)[:layers])
    result.config.num_hidden_layers = layers
    return result


def add_models(parser: argparse.ArgumentParser) -> None:
    """The options that `captured_models` reads."""
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layers", type=int, help="first layers of the models only")


def captured_models(
    options: argparse.Namespace,
) -> Iterator[tuple[str, nn.Module, list[int], Captured]]:
    """The models that the options choose: name, model, tokens to run it on, and its graph."""
    for name in options.models:
        model, tokens = MODELS[name]()
        if options.layers is not None:
            model = shortened(model, options.layers)
        yield name, model, tokens, capture(model)


def steps_of(
    program: Program,
    tokens: Sequence[int],
    shapes: Sequence[Shape],
    repeats: int,
    ahead: int = 0,
) -> list[Step]:
    """Inputs of each step: its tokens, and the caches after the tokens before, from plaintext.

    A program that resends its hidden state gets that of the previous step instead of tokens. Decode
    steps run `repeats` times while the dealer works, and `ahead` times with all randomness dealt in
    advance. Prompts run once: their randomness may be more than a party receives in advance.
    """
    plain = PlainExecutor(program.roles["server"])
    result = []
    for new, past in shapes:
        caches, hidden = plain.start(), None
        if past:
            first = plain.program.phase(phase_of(past, 0))
            fed = torch.tensor([list(tokens[:past])])
            outputs = plain.step({first.inputs[0].name: fed, **caches}, first.outputs)
            caches = {s.name: outputs[s.cache_output] for s in first.inputs if s.cache_output}
            hidden = outputs[first.outputs[0]] if plain.program.resends else None
        phase = plain.program.phase(phase_of(new, past))
        fed = torch.tensor([list(tokens[past : past + new])]) if hidden is None else hidden
        inputs = {phase.inputs[0].name: fed, **caches}
        often = (repeats, ahead) if past else (1, 0)
        result.append(Step(inputs, often[0], phase.name, often[1]))
    return result


@torch.inference_mode()
def errors_of(
    model: nn.Module, tokens: Sequence[int], shapes: Sequence[Shape], taken: list[Taken]
) -> list[float]:
    """Largest difference from the original model's logits, by step."""
    result = []
    for (new, past), found in zip(shapes, taken, strict=True):
        exact = model(input_ids=torch.tensor([list(tokens[: past + new])])).logits[0, -1].double()
        result.append(float((found.value.double().reshape(-1) - exact).abs().max()))
    return result


class Bench:
    """The rows of a run, written to `folder` as they are measured."""

    def __init__(
        self, plan: Plan, folder: Path, resume: bool, noise: float = DEFAULT_NOISE
    ) -> None:
        self.rows: list[Row] = []
        self._plan, self._folder, self._noise = plan, folder, noise
        self._console = Console(stderr=True)
        self._captured: dict[str, Captured] = {}
        folder.mkdir(parents=True, exist_ok=True)
        place, here = folder / "machine.json", machine()
        if resume and place.exists():
            if json.loads(place.read_text()) != here:
                raise SystemExit(f"{folder}: holds rows of another machine; run without --resume")
            if (folder / LATEST).exists():
                self.rows = [Row(**row) for row in json.loads((folder / LATEST).read_text())]
        place.write_text(json.dumps(here, indent=1) + "\n")

    def run(self) -> None:
        """Measure every row that is missing or failed."""
        for name in self._plan.models:
            for setting in self._plan.settings:
                done = {row.key for row in self.rows if not row.failed}
                rows = [row for row in self._planned(name, setting) if row.key not in done]
                if not rows:
                    continue
                began = time.monotonic()
                self._console.print(f"{name}: {setting.label}, weights {setting.weights}")
                stock = setting.mode != "mergec"
                rows = (self._extrapolate if stock else self._measure)(name, setting, rows)
                self._console.print(f"  {time.monotonic() - began:.0f} s")
                for reason in dict.fromkeys(row.failed for row in rows if row.failed):
                    self._console.print(f"  failed: {reason}", markup=False)
                self._keep(rows)
            self._captured.clear()

    def _planned(self, name: str, setting: Setting) -> list[Row]:
        return [_row(name, setting, shape) for shape in setting.shapes or self._plan.shapes]

    def _keep(self, rows: Sequence[Row]) -> None:
        """Add rows in the plan's order, replacing failed ones, and write all rows."""
        known = {row.key: row for row in (*self.rows, *rows)}
        planned = [
            row.key
            for name in self._plan.models
            for setting in self._plan.settings
            for row in self._planned(name, setting)
        ]
        self.rows = [known[key] for key in dict.fromkeys((*planned, *known)) if key in known]
        fresh = self._folder / f"{LATEST}.new"
        fresh.write_text(json.dumps([row.json() for row in self.rows], indent=1) + "\n")
        fresh.replace(self._folder / LATEST)

    def _measure(
        self, name: str, setting: Setting, rows: Sequence[Row], layers: int | None = None
    ) -> list[Row]:
        """Rows with each step's measurements, or why it failed. Compiles once, runs every step."""
        try:
            found, reason = self._play(name, setting, [row.shape for row in rows], layers)
        except Exception as error:  # noqa: BLE001  (the rest of the table still holds)
            found, reason = [], f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return [
            replace(
                row,
                seconds=taken.seconds,
                online_seconds=taken.online_seconds,
                offline_seconds=taken.offline_seconds,
                online_bytes=taken.online,
                offline_bytes=taken.offline,
                rounds=taken.rounds,
                peak_memory_bytes=taken.peak,
                worst_logit_error=error,
            )
            for row, (taken, error) in zip(rows, found, strict=False)
        ] + [replace(row, failed=reason) for row in rows[len(found) :]]

    def _play(
        self, name: str, setting: Setting, shapes: Sequence[Shape], layers: int | None
    ) -> tuple[list[tuple[Taken, float]], str]:
        """Measurements and errors up to the first step that failed, and the reason if one did."""
        model, tokens = self._plan.models[name]()
        if layers is not None:
            model = shortened(model, layers)
        key = f"{name}, {layers} layers"
        if key not in self._captured:
            self._captured[key] = capture(model)
        # Text for a lossy pass to observe: of the same kind, but not fed to any step.
        observed = (tuple(tokens[-OBSERVED:]),) if setting.preset != "exact" else ()
        config = CompileConfig(
            preset=setting.preset,
            weights=setting.weights,
            calibration=observed,
            logit_noise=self._noise,
        )
        program = compile_decoder(model, config=config, captured=self._captured[key])
        ahead = REPEATS if setting.mode == "mergec" else 0
        steps = steps_of(program, tokens, shapes, REPEATS, ahead)
        try:
            taken, reason = run(program.roles, steps, setting.mode), ""
        except RunError as error:
            taken, reason = error.taken, str(error)
        errors = errors_of(model, tokens, shapes[: len(taken)], taken)
        return list(zip(taken, errors, strict=True)), reason

    def _extrapolate(self, name: str, setting: Setting, rows: Sequence[Row]) -> list[Row]:
        """Rows of CrypTen's stock protocols, where each additional layer costs the same.

        Memory is not extrapolated: a process reuses the memory of one layer for the next.
        """
        model, _ = self._plan.models[name]()
        total = model.config.num_hidden_layers
        few, more = STOCK_LAYERS
        if total <= more:
            return self._measure(name, setting, rows)
        shorter, longer = (self._measure(name, setting, rows, layers) for layers in STOCK_LAYERS)
        scale = (total - few) / (more - few)
        return [
            _grown(short, long, scale)
            if not (short.failed or long.failed)
            else replace(row, failed=short.failed or long.failed)
            for row, short, long in zip(rows, shorter, longer, strict=True)
        ]


def _grown(short: Row, long: Row, scale: float) -> Row:
    """The row of a model with `scale` times the layers that `long` has beyond `short`."""
    grown = {
        key: getattr(short, key) + scale * (getattr(long, key) - getattr(short, key))
        for key in FIGURES
    }
    return replace(
        long,
        **{key: value if key == "seconds" else round(value) for key, value in grown.items()},
        peak_memory_bytes=None,
        worst_logit_error=None,
        extrapolated_from_layers=STOCK_LAYERS[1],
    )


def _row(name: str, setting: Setting, shape: Shape) -> Row:
    """A row that is still to be measured."""
    new, past = shape
    phase = "decode" if past else "prompt"
    return Row(name, phase, new, past, setting.label, setting.weights, "logits", "loopback")


def machine() -> dict[str, Any]:
    """What rows must have in common to be in one table."""
    info = Path("/proc/cpuinfo")
    models = [
        line.partition(":")[2].strip()
        for line in (info.read_text().splitlines() if info.exists() else ())
        if line.startswith("model name")
    ]
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one decode step in three settings")
    size.add_argument("--small", action="store_true", help="decoders of two layers")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--results", type=Path, help="folder to write to")
    parser.add_argument(
        "--logit-noise", type=float, default=DEFAULT_NOISE, help="standard deviation; 0: none"
    )
    options = parser.parse_args(arguments)
    plan = SMALL if options.small else QUICK if options.quick else FULL
    folder = options.results or (RESULTS / "small" if options.small else RESULTS)
    bench = Bench(plan, folder, options.resume, options.logit_noise)
    bench.run()
    if options.small:
        text = side_by_side(bench.rows)
        place = folder if options.results else ROOT / "docs"
        (place / "side-by-side.md").write_text(text)
    else:
        small = elementwise.main(folder, resume=options.resume) if plan is FULL else []
        text = markdown(bench.rows, small, machine())
        (folder / "latest.md").write_text(text)
        plots(bench.rows, folder)
    print(text)


if __name__ == "__main__":
    main()
