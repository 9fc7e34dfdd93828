"""A one-layer decoder as a handwritten program, in the forms that a compiler would produce."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mergec.runtime.core.spec import ROLES, Vis
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.program.bundle import load_bundle, role_path, save_bundle
from mergec.runtime.program.manifest import Manifest
from mergec.runtime.program.program import InputSpec, Instruction, Ref, RoleProgram, TensorSpec

VOCAB, WIDTH, LENGTH = 13, 8, 16
LAST = 2**63 - 1
BOUND = 64.0
"""Largest mean square that the norm expects: rows are about 1, and may be up to 2**4 larger."""


def weights(seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, by: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * by

    return {
        "embed.weight": normal(VOCAB, WIDTH),
        "norm.weight": 1 + normal(WIDTH, by=0.1),
        "q.weight": normal(WIDTH, WIDTH, by=0.5),
        "k.weight": normal(WIDTH, WIDTH, by=0.5),
        "v.weight": normal(WIDTH, WIDTH, by=0.5),
        "out.weight": normal(WIDTH, WIDTH, by=0.5),
        "out.bias": normal(WIDTH),
        "head.weight": normal(VOCAB, WIDTH, by=2.0),
    }


def program(
    role: str = "server", seed: int = 3, noise: float = 0.0, shift: str = "", **manifest: Any
) -> RoleProgram:
    """Embedding, norm, attention with a cache, residual and head; greedy margins are large."""
    secret = weights(seed)
    made: list[Instruction] = []

    def add(name: str, target: str, *args: Any, vis: Vis = Vis.SHARED, frac: int = 16) -> Ref:
        made.append(Instruction(name, target, args, {}, vis, frac, "model", "decoder.py:1"))
        return Ref(name)

    def public(name: str, target: str, *args: Any) -> Ref:
        return add(name, target, *args, vis=Vis.PUBLIC, frac=0)

    def linear(name: str, x: Ref, bias: bool = False) -> Ref:
        held = (Ref(f"{name}.weight"), Ref(f"{name}.bias") if bias else None)
        return add(name, "mpc.linear", x, *held, frac=32)

    def sent(x: Ref) -> Ref:
        return add(f"{x.name}.send", "mpc.send", add(f"{x.name}.trunc", "mpc.truncate", x))

    def opened(x: Ref) -> Ref:
        return add(f"{x.name}.open", "mpc.open", add(f"{x.name}.trunc", "mpc.truncate", x))

    ids = Ref("ids")
    new = public("new", "aten.sym_size.int", ids, 1)
    past = public("past", "aten.sym_size.int", Ref("cache.k"), 2)
    rows = public("rows.0", "aten.arange.default", new)
    rows = public(
        "rows", "aten.unsqueeze.default", public("rows.1", "aten.add.Tensor", rows, past), 1
    )
    total = public("total", "sym.add", past, new)
    seen = public("seen", "aten.le.Tensor", public("cols", "aten.arange.default", total), rows)
    mask = public("mask", "aten.where.ScalarOther", seen, Ref("zero"), -3e38)
    embed = add("embed", "mpc.embedding", ids, Ref("embed.weight"))
    norm = add("norm", "mpc.rms_norm", embed, Ref("norm.weight"), 1e-5, 0.0, BOUND, frac=32)
    x = sent(norm)
    heads = {}
    for name in ("q", "k", "v"):
        flat = linear(name, x)
        heads[name] = opened(add(f"{name}.heads", "aten.unsqueeze.default", flat, 1, frac=32))
    keys = add("cache.k.next", "mpc.cache_append", Ref("cache.k"), heads["k"])
    values = add("cache.v.next", "mpc.cache_append", Ref("cache.v"), heads["v"])
    scores = (heads["q"], keys, values, mask, 0.25, 0.0, *([shift] if shift else []))
    mixed = add("mixed", "mpc.attention", *scores, frac=46)
    flat = add("mixed.flat", "aten.reshape.default", mixed, [1, new, WIDTH], frac=46)
    out = linear("out", sent(flat), bias=True)
    added = add("added", "mpc.add", embed, out, frac=32)
    start: Any = -1
    if most := manifest.get("speculate_up_to", 0):
        # new for 1 to `most` + 1 new tokens after cached ones, else 1; see `frontend.positions`.
        few = public("few.1", "sym.sub", most + 2, new)
        few = public("few", "sym.max", 0, public("few.0", "sym.min", 1, few))
        few = public("checks", "sym.mul", few, public("behind", "sym.min", 1, past))
        few = public("drafts", "sym.mul", few, public("more", "sym.sub", new, 1))
        start = public("start", "sym.neg", public("kept", "sym.add", few, 1))
    last = add("last", "aten.slice.Tensor", added, 1, start, LAST, frac=32)
    head = linear("head", sent(last))
    add("logits", "mpc.reveal", head, *([noise] if noise else []), vis=Vis.CLIENT, frac=0)
    shared = {"zero": torch.zeros(())}
    specs = [
        TensorSpec(name, vis, "float32", tuple(tensor.shape))
        for held, vis in ((secret, Vis.SERVER), (shared, Vis.PUBLIC))
        for name, tensor in held.items()
    ]
    cache = (1, 1, "past", WIDTH)
    return RoleProgram(
        role=role,
        instructions=made,
        inputs=[
            InputSpec("ids", Vis.CLIENT, "int64", (1, "new")),
            InputSpec("cache.k", Vis.SHARED, "float32", cache, 16, "cache.k.next"),
            InputSpec("cache.v", Vis.SHARED, "float32", cache, 16, "cache.v.next"),
        ],
        outputs=["logits", "cache.k.next", "cache.v.next"],
        constants=specs,
        tensors={**shared, **(secret if role == "server" else {})},
        manifest=Manifest(
            **{"model": "handmade", "vocab_size": VOCAB, "max_length": LENGTH, "logit_noise": noise}
            | manifest
        ),
    )


def save(path: Path, seed: int = 3, **manifest: Any) -> Path:
    for role in ROLES:
        save_bundle(program(role, seed, **manifest), role_path(path, role))
    return path


def plaintext(path: Path, prompt: list[int], max_tokens: int) -> list[int]:
    plain = PlainExecutor(load_bundle(role_path(path, "server"), "server"))
    return [token for token, _ in plain.generate(prompt, max_tokens)]
