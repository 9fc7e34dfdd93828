"""Models for which MERGE's lossy passes are exact by construction."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch

CODE = 16
"""Entries of a code: as many +1 as -1, so that every row of codes has mean 0 and deviation 1."""

VOCAB, POSITIONS = 40, CODE - 1


def codes(count: int, seed: int = 0) -> torch.Tensor:
    """Distinct codes [count, 16]."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.tensor([1.0, -1.0]).repeat(CODE // 2)
    found: set[tuple[float, ...]] = set()
    while len(found) < count:
        found.add(tuple(signs[torch.randperm(CODE, generator=generator)].tolist()))
    return torch.tensor(sorted(found), dtype=torch.float64)


def position_codes() -> torch.Tensor:
    """Codes [15, 16] that are orthogonal to each other: rows of a Hadamard matrix (Sylvester)."""
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    return reduce(torch.kron, [step] * 4)[1:]


def gpt2(width: int, **settings: Any) -> Any:
    """A GPT-2 in float64 with one layer and one head, all of whose weights are zero."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=POSITIONS,
        n_embd=width,
        n_layer=1,
        n_head=1,
        bos_token_id=None,
        eos_token_id=None,
        **settings,
    )
    model = GPT2LMHeadModel(config).eval().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" not in name:
                parameter.zero_()
    return model


def looks_back() -> Any:
    """Its attention looks at the previous token, at any position; the rest is random.

    A row is [token, position, room]. Attention copies the previous token into the room, so all rows
    have mean 0 and deviation 1 before the second norm, too.
    """
    model = gpt2(3 * CODE)
    token, position, room = (slice(i * CODE, (i + 1) * CODE) for i in range(3))
    block = model.transformer.h[0]
    # Before the room is filled, a third of the row is 0.
    scale = 1.5**0.5
    seen = position_codes()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        model.transformer.wte.weight[:, token] = codes(VOCAB)
        model.transformer.wpe.weight[:, position] = seen
        queries, keys, values = block.attn.c_attn.weight.split(3 * CODE, dim=1)
        queries[position, :CODE] = 16.0 * seen[1:].T @ seen[:-1] / CODE
        keys[position, :CODE] = torch.eye(CODE, dtype=torch.float64)
        values[token, :CODE] = torch.eye(CODE, dtype=torch.float64)
        block.attn.c_proj.weight[:CODE, room] = torch.eye(CODE, dtype=torch.float64) / scale
        for linear in (block.mlp.c_fc, block.mlp.c_proj):
            for parameter in linear.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def says_its_next_row() -> Any:
    """Its hidden state is the row of the token that it outputs; each token has one successor.

    A row is [token, position, room]. The first layer of the MLP computes a linear map twice, with
    both signs, so its ReLU loses nothing. The second layer replaces the token's code by that of the
    next token and removes the position.
    """
    model = gpt2(3 * CODE, activation_function="relu")
    token, position = (slice(i * CODE, (i + 1) * CODE) for i in range(2))
    block = model.transformer.h[0]
    table = position_codes()
    following = table.roll(-1, 0)
    eye = torch.eye(2 * CODE, dtype=torch.float64)
    step = torch.zeros(2 * CODE, 3 * CODE, dtype=torch.float64)
    step[:CODE, token] = table.T @ following / CODE - eye[:CODE, :CODE]
    step[CODE:, position] = -eye[:CODE, :CODE]
    # Norms of rows of which a third, or two thirds, are 0.
    with torch.no_grad():
        model.transformer.wte.weight[:POSITIONS, token] = table
        model.transformer.wpe.weight[:, position] = table
        block.ln_2.weight.fill_((2 / 3) ** 0.5)
        model.transformer.ln_f.weight.fill_((1 / 3) ** 0.5)
        block.mlp.c_fc.weight[: 2 * CODE, : 2 * CODE] = eye
        block.mlp.c_fc.weight[: 2 * CODE, 2 * CODE : 4 * CODE] = -eye
        block.mlp.c_proj.weight[: 2 * CODE] = step
        block.mlp.c_proj.weight[2 * CODE : 4 * CODE] = -step
    return model
