"""The benchmark: one machine, one run, one table; GPT-2-base and SmolLM2 in every setting.

Client, server and dealer are processes on loopback that share the machine's cores. Bytes and
rounds are counted at the transport. Caches of past tokens are filled from plaintext, so that a step
after 512 tokens is measured without the 512 steps before it. CrypTen's stock protocols run the
first layers only, and the rest is extrapolated from the difference that a layer makes.

Writes benchmarks/results/latest.json, latest.md and two plots; `--quick` measures one decode step
in three settings. Usage: python benchmarks/bench.py [--quick]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import elementwise
import torch
from harness import Step, Taken, run
from report import markdown, plots
from rich.console import Console
from torch import nn

from compiler import CompileConfig, Program, compile_decoder
from compiler.errors import CompileError
from compiler.load import load_model
from runtime.plain import PlainExecutor
from runtime.program import phase_of

RESULTS = Path(__file__).parent / "results"
STOCK_LAYERS = (1, 2)
"""CrypTen's stock protocols run models of so many layers."""

PROMPTS, PASTS = (16, 64, 128), (128, 512)
LENGTH, OBSERVED = 1024, 128

TEXT = Path(__file__).resolve().parent.parent / "docs" / "protocols.md"
"""What SmolLM2 reads; GPT-2, whose weights are random, gets pseudo-random tokens."""


@dataclass(frozen=True)
class Setting:
    """How a model is compiled and run."""

    preset: str
    weights: str
    mode: str = "mergec"

    @property
    def label(self) -> str:
        return "crypten" if self.mode == "crypten" else self.preset


@dataclass(frozen=True)
class Row:
    """One step of one model in one setting. Bytes are both directions together."""

    model: str
    phase: str
    new_tokens: int
    past: int
    preset: str
    weights: str
    reveal: str
    network: str
    seconds: float
    online_bytes: int
    offline_bytes: int
    rounds: int
    peak_memory_bytes: int
    worst_logit_error: float | None
    extrapolated_from_layers: int | None


BASELINE = Setting("exact", "shared", "crypten")
LOSSY = ("mpcformer-2quad", "mpcformer-2relu", "thex", "merge-er", "merge-mm", "merge")
FULL = (
    BASELINE,
    *(Setting(preset, "shared") for preset in LOSSY),
    Setting("exact", "shared"),
    Setting("exact", "server"),
)
QUICK = (BASELINE, Setting("merge", "shared"), Setting("exact", "server"))


def gpt2() -> tuple[nn.Module, list[int]]:
    """GPT-2-base: 12 layers of width 768 and 50,257 tokens, random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2")).eval()
    return model, [(7919 * i + 13) % 50257 for i in range(LENGTH)]


def smollm2() -> tuple[nn.Module, list[int]]:
    """SmolLM2-135M-Instruct: 30 layers of width 576 and 49,152 tokens."""
    model, tokenizer = load_model("smollm2")
    return model, tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"][:LENGTH]


MODELS = {"gpt2-base": gpt2, "smollm2-135m": smollm2}


def shortened(model: nn.Module, layers: int) -> nn.Module:
    """The model's first layers, with its embedding, norm and head."""
    body: Any = model.base_model
    name = "h" if hasattr(body, "h") else "layers"
    setattr(body, name, getattr(body, name)[:layers])
    model.config.num_hidden_layers = layers
    return model


def steps_of(
    program: Program, tokens: Sequence[int], shapes: Sequence[tuple[int, int]], repeats: int
) -> list[Step]:
    """Inputs of each step: its tokens, and the caches that plaintext has after those before.

    A program that resends its hidden state gets that of the step before instead of tokens.
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
        result.append(Step(inputs, repeats if past else 1, phase.name))
    return result


@torch.inference_mode()
def errors_of(
    model: nn.Module, tokens: Sequence[int], shapes: Sequence[tuple[int, int]], taken: list[Taken]
) -> list[float]:
    """Largest difference of a logit from the unrewritten model's, by step."""
    result = []
    for (new, past), found in zip(shapes, taken, strict=True):
        exact = model(input_ids=torch.tensor([list(tokens[: past + new])])).logits[0, -1].double()
        result.append(float((found.value.double().reshape(-1) - exact).abs().max()))
    return result


def measure(
    name: str, setting: Setting, shapes: Sequence[tuple[int, int]], layers: int | None = None
) -> list[Row]:
    """Compile once, and run every step."""
    model, tokens = MODELS[name]()
    if layers is not None:
        model = shortened(model, layers)
    # What a lossy pass observes: text of the same kind that no step is fed.
    observed = tuple(tokens[-OBSERVED:]) if setting.preset in LOSSY else ()
    config = CompileConfig(
        preset=setting.preset, weights=setting.weights, calibration=(observed,) * bool(observed)
    )
    program = compile_decoder(model, config=config)
    steps = steps_of(program, tokens, shapes, repeats=3)
    taken = run(program.roles, steps, setting.mode)
    errors = errors_of(model, tokens, shapes, taken)
    return [
        Row(
            model=name,
            phase="decode" if past else "prompt",
            new_tokens=new,
            past=past,
            preset=setting.label,
            weights=setting.weights,
            reveal="logits",
            network="loopback",
            seconds=one.seconds,
            online_bytes=one.online,
            offline_bytes=one.offline,
            rounds=one.rounds,
            peak_memory_bytes=one.peak,
            worst_logit_error=error,
            extrapolated_from_layers=None,
        )
        for (new, past), one, error in zip(shapes, taken, errors, strict=True)
    ]


def baseline(name: str, shapes: Sequence[tuple[int, int]]) -> list[Row]:
    """CrypTen's stock protocols: one layer more costs what the second cost more than the first."""
    model, _ = MODELS[name]()
    total = model.config.num_hidden_layers
    few, more = STOCK_LAYERS
    rows = []
    for short, long in zip(
        measure(name, BASELINE, shapes, few), measure(name, BASELINE, shapes, more), strict=True
    ):
        scale = (total - few) / (more - few)
        grown = {
            key: getattr(short, key) + scale * (getattr(long, key) - getattr(short, key))
            for key in ("seconds", "online_bytes", "offline_bytes", "rounds", "peak_memory_bytes")
        }
        whole = {key: value if key == "seconds" else round(value) for key, value in grown.items()}
        rows.append(replace(long, **whole, worst_logit_error=None, extrapolated_from_layers=more))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    settings = QUICK if options.quick else FULL
    # Small steps first: a process's peak memory only grows.
    decode = [(1, past) for past in (PASTS[:1] if options.quick else PASTS)]
    shapes = decode if options.quick else [*decode, *((new, 0) for new in PROMPTS)]
    console, rows = Console(stderr=True), []
    for name in MODELS:
        for setting in settings:
            console.print(f"{name}: {setting.label}, weights {setting.weights}")
            stock = setting.mode == "crypten"
            try:
                rows += baseline(name, shapes) if stock else measure(name, setting, shapes)
            except CompileError as error:
                # A lossy preset may not suit a model; the rest of the table still holds.
                console.print(f"left out: {error}")
            RESULTS.mkdir(exist_ok=True)
            text = json.dumps([asdict(row) for row in rows], indent=1) + "\n"
            (RESULTS / "latest.json").write_text(text)
    small = [] if options.quick else elementwise.main()
    (RESULTS / "latest.md").write_text(markdown(rows, small))
    plots(rows, RESULTS)
    print(markdown(rows, small))


if __name__ == "__main__":
    main()
