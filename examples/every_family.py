"""Compile a small random decoder of each family; report the cost of its steps and its logit error.

All three parties run in one process. Families that cannot be compiled are listed with the reason.
Usage: python examples/every_family.py [--markdown] [FAMILY …]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from mergec import CompileConfig, compile_decoder
from mergec.compiler.errors import CompileError
from mergec.runtime.roles.inprocess import InProcessSession

SIZES: dict[str, int] = {
    "vocab_size": 96,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "dff", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "expansion_ratio": 2,
    "decoder_layers": 2,
    "pad_token_id": 0,
    **dict.fromkeys(("num_experts", "num_local_experts"), 8),
    "num_experts_per_tok": 3,
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
}
"""Sizes by configuration key; each family uses the keys that its configuration has."""

_END: dict[str, Any] = dict.fromkeys(("eos_token_id", "sep_token_id"), 2)
_GROUPS = {"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 4, "topk_group": 2}
"""Experts in four groups, of which a token's router chooses two first."""
_LATENT: dict[str, Any] = {
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    "num_key_value_heads": 4,
    "initializer_range": 0.02,
}
"""Sizes of multi-head latent attention: keys have twice the width of values."""

SETTINGS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "stablelm": {"num_key_value_heads": 4},
    "axk1": {**_LATENT, **_GROUPS, "first_k_dense_replace": 1},
    "deepseek_v3": {**_LATENT, **_GROUPS, "first_k_dense_replace": 1},
    "dots1": {**_GROUPS, "n_group": 1, "topk_group": 1},
    # By default its layers are mixtures of experts.
    "flint": {"num_experts": 0},
    "glm4_moe_lite": _LATENT,
    "cwm": {"bos_token_id": 1},
    "modernbert-decoder": {**dict.fromkeys(("bos_token_id", "cls_token_id"), 1), **_END},
    "granitemoeshared": {"shared_intermediate_size": 24},
    "minicpm3": {**_LATENT, "dim_model_base": 32},
    "qwen3_moe": {"norm_topk_prob": True},
    "youtu": _LATENT,
}

SEEDS = {
    **dict.fromkeys(("axk1", "deepseek_v3", "dots1", "glm4_moe_lite", "solar_open"), 5),
    **dict.fromkeys(("granitemoe", "granitemoeshared"), 4),
    "ernie4_5_moe": 6,
    "hy_v3": 3,
    "mimo_v2_flash": 1,
    "minimax_m2": 1,
    "mixtral": 3,
    "olmoe": 2,
    "qwen2_moe": 1,
}
"""Seeds other than 0 of mixtures of experts, so that no choice is a near tie: the scores of the
third and the fourth expert of a token differ by at least 4.4e-3, before a softmax or after a
sigmoid, and so do those of the second and the third group."""

FAMILIES = (
    *("gpt2", "llama", "qwen2", "qwen3", "mistral", "opt", "gpt_neox", "gpt_neo", "phi", "phi3"),
    *("gemma", "gemma2", "bloom", "falcon", "gptj", "codegen", "stablelm", "olmo"),
)
"""Every pass and every preset is tested on these."""

MORE = (
    *("apertus", "apertus1p5_text", "arcee", "axk1", "biogpt", "bitnet", "cohere", "cohere2"),
    *("cohere2_moe", "ctrl", "cwm", "deepseek_v3", "diffllama", "dots1", "ernie4_5"),
    *("ernie4_5_moe", "exaone", "exaone4", "exaone_moe"),
    *("flex_olmo", "flint", "gemma3_text", "glm", "glm4", "glm4_moe"),
    *("glm4_moe_lite", "gpt-sw3", "gpt_bigcode", "gpt_neox_japanese", "gpt_oss", "granite"),
    *("granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared", "helium", "hrm_text"),
    *("hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3", "iquestcoder"),
    *("jais2", "mellum", "mimo_v2_flash", "minicpm3", "minimax_m2", "ministral", "ministral3"),
    *("mixtral", "modernbert-decoder", "mpt", "nanochat", "nemotron", "olmo2", "olmo3"),
    *("olmoe", "persimmon", "qwen2_moe", "qwen3_moe", "seed_oss", "smollm3", "solar_open"),
    *("starcoder2", "trocr", "vaultgemma", "xglm", "youtu"),
)

REFUSED = ("bert", "doge", "jamba", "mamba", "openai-gpt", "qwen3_next", "rwkv")

PROMPT, ANSWER = [5, 17, 3, 88, 41], [7, 9]


@dataclass(frozen=True)
class Measured:
    """Rounds and online bytes of the prompt and of a decode step.

    error: largest difference from the model's own logits, over all steps. logit: largest logit.
    """

    prompt: tuple[int, int]
    decode: tuple[int, int]
    error: float
    logit: float


def decoder(family: str) -> Any:
    """A model with random weights, larger than usual initial weights, so that its logits differ."""
    defaults = AutoConfig.for_model(family)
    known = {*defaults.to_dict(), *defaults.attribute_map}
    settings = {name: size for name, size in SIZES.items() if name in known}
    settings |= {"bos_token_id": None, "eos_token_id": None, **SETTINGS.get(family, {})}
    config = AutoConfig.for_model(family, **settings)
    torch.manual_seed(SEEDS.get(family, 0))
    model = AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model


@torch.no_grad()
def measure(family: str) -> Measured:
    """Compile the family's model, run a prompt and two steps, and compare the logits.

    Without the server's noise, which would hide the protocols' own error.
    """
    model = decoder(family)
    program = compile_decoder(model, config=CompileConfig(max_length=64, logit_noise=0))
    wanted = model(torch.tensor([PROMPT + ANSWER]), use_cache=False).logits[0, len(PROMPT) - 1 :]
    costs, logits = [], []
    with InProcessSession(program.roles) as session:
        for past, ids in ((0, PROMPT), *((len(PROMPT) + i, [t]) for i, t in enumerate(ANSWER))):
            logits.append(session.step(ids, past))
            costs.append((session.record.total.rounds, session.record.total.online))
    error = float((torch.stack(logits) - wanted).abs().max())
    return Measured(costs[0], costs[1], error, float(wanted.abs().max()))


def rows(families: list[str]) -> tuple[list[list[str]], dict[str, str]]:
    """A row of figures for each family; for families that cannot be compiled, the reason."""
    found, refused = [], {}
    for family in families:
        try:
            result = measure(family)
        except CompileError as error:
            refused[family] = "; ".join(
                [str(error).splitlines()[0], *dict.fromkeys(error.nodes.values())]
            )
            continue
        costs = [f"{number:,}" for cost in (result.prompt, result.decode) for number in cost]
        found.append([family, *costs, f"{result.error:.1e}", f"{result.logit:.1f}"])
    return found, refused


INTRODUCTION = f"""# Families

{len(FAMILIES) + len(MORE)} families of transformers {transformers.__version__}, each with random
weights, 2 layers and a width of 32. The three parties ran a prompt of {len(PROMPT)} tokens and
{len(ANSWER)} decode steps. `largest error` is the largest difference between a revealed logit and
the model's own, without the server's noise; `logit` is the largest logit. All passes and presets
are tested on the first {len(FAMILIES)} families. Made by `make families`.

Families with moe in their names, axk1, deepseek_v3, dots1, flex_olmo, gpt_oss, hy_v3, mellum,
mimo_v2_flash, minimax_m2, mixtral and solar_open are mixtures of 8 experts, all of which run; of
axk1's and deepseek_v3's four groups a token chooses two first. flint is without experts. Where
transformers caches latents (multi-head latent attention: axk1, deepseek_v3, glm4_moe_lite,
minicpm3, youtu), the parties cache the keys and values that follow from them, so that a step opens
those of its new tokens alone.
"""

REFUSALS = """Families that the compiler rejects, with its error message. Where an op is named, it
can be added: see [CONTRIBUTING.md](../CONTRIBUTING.md).
"""

HEAD = ["family", "prompt: rounds", "bytes", "decode: rounds", "bytes", "largest error", "logit"]


def main() -> None:
    asked = [name for name in sys.argv[1:] if name != "--markdown"]
    found, refused = rows(asked or [*FAMILIES, *MORE, *REFUSED])
    if "--markdown" in sys.argv:
        lines = [HEAD, ["---", *["---:"] * (len(HEAD) - 1)], *found]
        lines += [["refused", "because"], ["---"] * 2, *map(list, refused.items())]
        texts = [f"| {' | '.join(line)} |" for line in lines]
        texts[len(found) + 2 : len(found) + 2] = ["", REFUSALS]
        print("\n".join([INTRODUCTION, *texts]))
        return
    table = Table(*HEAD)
    for row in found:
        table.add_row(*row)
    console = Console()
    console.print(table)
    for family, reason in refused.items():
        console.print(f"{family}: {reason}", markup=False)


if __name__ == "__main__":
    main()
