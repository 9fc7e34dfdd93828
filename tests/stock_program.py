"""A handwritten program for CrypTen's stock protocols, with every kind of value and move in it."""

from __future__ import annotations

import torch

from mergec.runtime.core.spec import Vis
from mergec.runtime.program.manifest import Manifest
from mergec.runtime.program.program import InputSpec, Instruction, Ref, RoleProgram, TensorSpec

VOCAB, WIDTH = 11, 8
PROMPT, NEXT = [[2, 6, 0]], [[9]]


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "embed.weight": normal(VOCAB, WIDTH),
        "norm.weight": 1 + 0.1 * normal(WIDTH),
        "up.weight": normal(WIDTH, WIDTH) / 3,
        "up.bias": normal(WIDTH),
        "sink": normal(1, 1, 1, WIDTH),
        "head.weight": normal(VOCAB, 2 * WIDTH) / 4,
    }


def program(role: str) -> RoleProgram:
    """Embedding, norm, linear, attention over a cache and a learned key, head, reveal."""
    secret = weights()
    public = {"order": torch.tensor([7, 6, 5, 4, 3, 2, 1, 0]), "mark": torch.ones(1, 1, 1, WIDTH)}

    def constants(tensors: dict[str, torch.Tensor], vis: Vis) -> list[TensorSpec]:
        return [TensorSpec(k, vis, str(v.dtype), tuple(v.shape)) for k, v in tensors.items()]

    def make(name: str, target: str, *args: object, vis: Vis = Vis.SHARED) -> Instruction:
        return Instruction(name, target, args, {}, vis, 16)

    everywhere = [None, None, None]
    return RoleProgram(
        role=role,
        instructions=[
            make("new", "aten.sym_size.int", Ref("ids"), 1, vis=Vis.PUBLIC),
            make("embed", "mpc.embedding", Ref("ids"), Ref("embed.weight")),
            make("norm", "mpc.rms_norm", Ref("embed"), Ref("norm.weight"), 1e-5),
            make("up", "mpc.linear", Ref("norm"), Ref("up.weight"), Ref("up.bias")),
            make("rows", "aten.view.default", Ref("up"), [1, 1, Ref("new"), WIDTH]),
            make("cache.out", "mpc.cache_append", Ref("cache"), Ref("rows")),
            # Concatenates a secret with a value of the server and a public one.
            make("keys", "aten.cat.default", [Ref("cache.out"), Ref("sink"), Ref("mark")], -2),
            # Indexes a secret by public numbers.
            make("values", "aten.index.Tensor", Ref("keys"), [*everywhere, Ref("order")]),
            make("seen", "mpc.attention", Ref("rows"), Ref("keys"), Ref("values"), None, 0.35),
            make("left", "aten.slice.Tensor", Ref("seen"), 3, 0, WIDTH // 2),
            make("right", "aten.slice.Tensor", Ref("seen"), 3, WIDTH // 2, WIDTH),
            make("turned", "aten.cat.default", [Ref("right"), Ref("left")], -1),
            make("flat", "aten.squeeze.dim", Ref("turned"), 1),
            make("both", "aten.cat.default", [Ref("flat"), Ref("embed")], -1),
            make("head", "mpc.linear", Ref("both"), Ref("head.weight"), None),
            make("last", "aten.select.int", Ref("head"), 1, -1),
            make("logits", "mpc.reveal", Ref("last"), vis=Vis.CLIENT),
        ],
        inputs=[
            InputSpec("ids", Vis.CLIENT, "int64", (1, "new")),
            InputSpec("cache", Vis.SHARED, "float32", (1, 1, "past", WIDTH), 16, "cache.out"),
        ],
        outputs=["logits", "cache.out"],
        constants=[*constants(secret, Vis.SERVER), *constants(public, Vis.PUBLIC)],
        tensors={**public, **(secret if role == "server" else {})},
        manifest=Manifest(fractional_bits=16),
    )
