"""Inspect a program: its graph, its cost, and what the passes changed.

Usage: python examples/inspect_graph.py [PAGE.html]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from mergec import compile_decoder


def main() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, num_attention_heads=4, **sizes))
    program = compile_decoder(model)
    console = Console(width=110)

    print("One layer, as the parties run it:")
    for line in str(program.graph).splitlines():
        if line.startswith("%model.layers.1."):
            print(" ", line.partition("  #")[0])

    inspection = program.inspect(new=1, past=64, savings=True)
    console.print(inspection.render())
    console.print(inspection.why_not("fuse_layer_norm").render())

    print("\nWhat fuse_glu changed:")
    for change in program.history.changes:
        if change.name == "fuse_glu":
            for hunk in change.hunks:
                print(f"  in {', '.join(hunk.layers)}")
                print("\n".join(f"  - {line}" for line in hunk.removed))
                print("\n".join(f"  + {line}" for line in hunk.added))

    for path in map(Path, sys.argv[1:]):
        path.write_text(program.to_html(new=1, past=64, savings=True), encoding="utf-8")
        print(f"{path}: the same as a page")


if __name__ == "__main__":
    main()
