"""Small handwritten programs, as a compiler would emit for a one-layer decoder."""

from __future__ import annotations

from typing import Any

import torch

from mergec.runtime.core.spec import Vis
from mergec.runtime.program.manifest import Manifest
from mergec.runtime.program.program import InputSpec, Instruction, Ref, RoleProgram, TensorSpec

VOCAB, WIDTH = 11, 8
MODULE = "model.layers.0"


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    table = torch.randn(VOCAB, WIDTH, generator=generator)
    return {
        "embed.weight": table,
        "norm.weight": torch.ones(WIDTH),
        "up.weight": torch.randn(WIDTH, WIDTH, generator=generator),
        "head.weight": table,
    }


def tiny(role: str = "server", **manifest: Any) -> RoleProgram:
    """Embedding, norm, linear, cache and head; every kind of argument occurs once."""
    secret = weights()
    public = {"cos": torch.linspace(0.0, 1.0, 4)}
    constants = [
        TensorSpec(name, Vis.SERVER, "float32", tuple(value.shape))
        for name, value in secret.items()
    ]
    constants += [
        TensorSpec(name, Vis.PUBLIC, "torch.float32", tuple(value.shape))
        for name, value in public.items()
    ]

    def shared(name: str, target: str, *args: object, frac: int = 16) -> Instruction:
        return Instruction(name, target, args, {}, Vis.SHARED, frac, MODULE, "modeling.py:7")

    public_length = Instruction("n", "aten.sym_size.int", (Ref("ids"), 1), {}, Vis.PUBLIC, 0)
    instructions = [
        public_length,
        Instruction("twice", "sym.mul", (Ref("n"), 2), {}, Vis.PUBLIC, 0),
        shared("embed", "mpc.embedding", Ref("ids"), Ref("embed.weight")),
        shared("norm", "mpc.rms_norm", Ref("embed"), Ref("norm.weight"), 1e-6, 0.0),
        shared("up", "mpc.linear", Ref("norm"), Ref("up.weight"), None),
        shared("low", "mpc.shift", Ref("up"), float("-inf")),
        shared("heads", "mpc.add", Ref("up"), [Ref("norm"), 1, "x", True, None]),
        shared("rows", "aten.view.default", Ref("up"), [1, Ref("n"), WIDTH]),
        shared("cache.out", "mpc.cache_append", Ref("cache"), Ref("heads")),
        shared("head", "mpc.linear", Ref("up"), Ref("head.weight")),
        Instruction("logits", "mpc.reveal", (Ref("head"),), {}, Vis.CLIENT, 0),
    ]
    return RoleProgram(
        role=role,
        instructions=instructions,
        inputs=[
            InputSpec("ids", Vis.CLIENT, "int64", (1, "new")),
            InputSpec("cache", Vis.SHARED, "float32", (1, 1, "past", WIDTH), 16, "cache.out"),
        ],
        outputs=["logits", "cache.out"],
        constants=constants,
        tensors={**public, **(secret if role == "server" else {})},
        manifest=Manifest(**{"model": "tiny", "vocab_size": VOCAB, "max_length": 16, **manifest}),
    )


def decoder(role: str = "server", **manifest: Any) -> RoleProgram:
    """A program that runs: embedding, linear, a cache that nothing reads, and a tied head."""
    secret = {k: v for k, v in weights().items() if k != "norm.weight"}

    def make(name: str, target: str, *args: object, vis: Vis = Vis.SHARED, frac: int = 16):
        module = "lm_head" if name.startswith(("head", "logits")) else MODULE
        return Instruction(name, target, args, {}, vis, frac, module)

    return RoleProgram(
        role=role,
        instructions=[
            make("embed", "mpc.embedding", Ref("ids"), Ref("embed.weight")),
            make("embed.send", "mpc.send", Ref("embed")),
            make("up", "mpc.linear", Ref("embed.send"), Ref("up.weight"), frac=32),
            make("up.truncate", "mpc.truncate", Ref("up")),
            make("up.open", "mpc.open", Ref("up.truncate")),
            make("row", "aten.unsqueeze.default", Ref("up.open"), 1),
            make("cache.out", "mpc.cache_append", Ref("cache"), Ref("row")),
            make("up.send", "mpc.send", Ref("up.truncate")),
            make("head", "mpc.linear", Ref("up.send"), Ref("head.weight"), frac=32),
            make("logits", "mpc.reveal", Ref("head"), vis=Vis.CLIENT, frac=0),
        ],
        inputs=[
            InputSpec("ids", Vis.CLIENT, "int64", (1, "new")),
            InputSpec("cache", Vis.SHARED, "float32", (1, 1, "past", WIDTH), 16, "cache.out"),
        ],
        outputs=["logits", "cache.out"],
        constants=[
            TensorSpec(name, Vis.SERVER, "torch.float32", tuple(value.shape))
            for name, value in secret.items()
        ],
        tensors=secret if role == "server" else {},
        manifest=Manifest(
            **{"model": "decoder", "vocab_size": VOCAB, "max_length": 16, **manifest}
        ),
    )


def greedy(prompt: list[int], count: int) -> list[int]:
    """The answer of `decoder`, computed without mergec's code."""
    held, tokens = weights(), list(prompt)
    for _ in range(count):
        hidden = held["up.weight"] @ held["embed.weight"][tokens[-1]]
        tokens.append(int((held["head.weight"] @ hidden).argmax()))
    return tokens[len(prompt) :]
