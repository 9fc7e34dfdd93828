"""The same bundles by CrypTen's stock protocols and by mergec's, in three processes each.

Random decoders of small size. Writes docs/side-by-side.md.
Usage: python benchmarks/side_by_side.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from compiler import CompileConfig, compile_decoder
from runtime.generation import StepReport
from runtime.local import run_local

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 1024, "n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "llama": {
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    },
}
PROMPT = [(17 * i + 5) % 1024 for i in range(32)]
TOKENS = 3
TARGET = Path(__file__).resolve().parent.parent / "docs" / "side-by-side.md"


def measure(family: str, options: dict[str, Any]) -> list[str]:
    """Rows of the table: prompt and decode, in both modes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options)).eval()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bundles"
        compile_decoder(model, config=CompileConfig(max_length=256)).save(path)
        reports = {
            mode: run_local(path, PROMPT, max_tokens=TOKENS, mode=mode, ignore_stop=True).records
            for mode in ("crypten", "mergec")
        }
    for phase, index in (("prompt of 32", 0), ("decode, past 33", 2)):
        stock, ours = reports["crypten"][index], reports["mergec"][index]
        rows.append(row(family, phase, "crypten", stock, stock))
        rows.append(row(family, phase, "mergec", ours, stock))
    return rows


def row(family: str, phase: str, mode: str, report: StepReport, base: StepReport) -> str:
    """One line: absolute figures, and how many times fewer than the stock protocols'."""
    online, base_online = report.sent + report.received, base.sent + base.received
    return (
        f"| {family} | {phase} | {mode} | {report.rounds:,} | {online / 1e6:.2f} "
        f"| {report.offline_bytes / 1e6:.2f} | {base.rounds / report.rounds:.1f} "
        f"| {base_online / online:.1f} | {base.seconds / report.seconds:.1f} |"
    )


def main() -> None:
    lines = [
        "# Stock protocols and ours, side by side",
        "",
        "Two-layer decoders of width 256 and 1,024 tokens with random weights, the same bundles in",
        "both modes, three processes on loopback. `crypten` runs every op by CrypTen's stock",
        "protocol with secret-shared weights and its trusted third party; `mergec` is the default.",
        "Rounds and bytes are counted at the transport, both directions together; the last three",
        "columns say how many times fewer than `crypten` in the same run. Made by",
        "`python benchmarks/side_by_side.py`.",
        "",
        "| model | step | mode | rounds | online MB | offline MB | rounds × | bytes × | time × |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for family, options in MODELS.items():
        lines += measure(family, options)
    text = "\n".join(lines) + "\n"
    TARGET.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
