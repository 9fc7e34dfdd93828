"""Compile a small random decoder of each family, and say what its steps cost.

Usage: python examples/every_family.py [FAMILY …]
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from compiler import CompileConfig, compile_decoder
from compiler.inspect import readable

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MLP = {"intermediate_size": 48}
GROUPED = {**MLP, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "mistral": GROUPED,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": MLP,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "phi": MLP,
    "phi3": {**MLP, "pad_token_id": 0},
    "gemma": GROUPED,
    "gemma2": {**GROUPED, "query_pre_attn_scalar": 8},
    "bloom": {},
    "falcon": {},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "stablelm": {**MLP, "num_key_value_heads": 4},
    "olmo": MLP,
}


def main() -> None:
    table = Table("family", "prompt of 8: rounds", "online", "decode: rounds", "online")
    for family in sys.argv[1:] or FAMILIES:
        settings = {**SIZES, **FAMILIES[family], "bos_token_id": None, "eos_token_id": None}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
        program = compile_decoder(model, config=CompileConfig(max_length=64))
        prompt, decode = program.inspect(new=8, past=0).total, program.inspect(new=1, past=8).total
        cells = [(f"{total.rounds:,}", readable(total.online)) for total in (prompt, decode)]
        table.add_row(family, *cells[0], *cells[1])
    Console().print(table)


if __name__ == "__main__":
    main()
