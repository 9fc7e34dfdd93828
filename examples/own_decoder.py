"""Compile your own decoder: any module that maps token ids [1, N] to logits [1, N, V]."""

from __future__ import annotations

import torch
from torch import nn

from mergec import compile_decoder


class Block(nn.Module):
    """Single-head causal attention and a gated MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        query, key, value = (f(y).unsqueeze(1) for f in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) * x.shape[-1] ** -0.5
        length = x.shape[1]
        mask = torch.full((length, length), -1e9).triu(1)
        x = x + (torch.softmax(scores + mask, -1) @ value).squeeze(1)
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Decoder(nn.Module):
    """Embedding, two blocks, and a head that shares the embedding's table."""

    def __init__(self, vocabulary: int = 64, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.embedding.weight.T


def main() -> None:
    torch.manual_seed(0)
    program = compile_decoder(Decoder())
    print(program.graph)
    answer = program.generate_local([1, 2, 3], max_tokens=4)
    print("private: ", answer.tokens)
    print("in clear:", program.plaintext(answer).tokens)


if __name__ == "__main__":
    main()
