"""Heads that guess the tokens after the next one, as a module that is trained beside a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from mergec.compiler.adaptation.config import AdaptConfig
from mergec.compiler.adaptation.data import Encoded
from mergec.compiler.adaptation.losses import IGNORED, Batch, Losses, collate
from mergec.compiler.adaptation.student import Student
from mergec.compiler.frontend.heads import (
    BLOCK,
    BLOCK_BIAS,
    Heads,
    bias_name,
    digest,
    head_name,
)

WEIGHT = 0.8
"""The loss of head k counts WEIGHT**k: later tokens are harder, and needed less often."""


class TrainedHeads(nn.Module):
    """Heads on the last hidden state of a model that stays as it is (Medusa-1).

    Head k, counted from 1, guesses the token after the next k ones: a residual block h + SiLU(B h +
    b), or none, and a matrix that starts as the model's own head. B and b start at zero, so before
    training every head says what the model's own head says. Source: Cai et al., "Medusa" (ICML
    2024), section 2.1.

    model: the frozen model. count: number of heads. layers: residual blocks of each, 0 or 1.
    """

    def __init__(self, model: Student, count: int, layers: int) -> None:
        super().__init__()
        # In a tuple, because it is no submodule: checkpoints hold the heads alone.
        self._model = (model,)
        matrix, bias = model.head()
        self.count, self.width = count, matrix.shape[1]
        self.block = None
        if layers:
            self.block = nn.Linear(self.width, count * self.width, dtype=matrix.dtype)
            nn.init.zeros_(self.block.weight)
            nn.init.zeros_(self.block.bias)
        self.matrices = nn.ParameterList(matrix.detach().clone() for _ in range(count))
        self.biases = nn.ParameterList()
        if bias is not None:
            self.biases.extend(bias.detach().clone() for _ in range(count))

    @property
    def model(self) -> Student:
        """The model that the heads belong to."""
        return self._model[0]

    def forward(self, hidden: torch.Tensor, number: int) -> torch.Tensor:
        """The logits [..., V] of head `number`, counted from 1, for hidden states [..., E]."""
        if self.block is not None:
            rows = slice((number - 1) * self.width, number * self.width)
            hidden = hidden + F.silu(
                F.linear(hidden, self.block.weight[rows], self.block.bias[rows])
            )
        bias = self.biases[number - 1] if len(self.biases) else None
        # A loss of bfloat16, as under autocast, would be coarse.
        return F.linear(hidden, self.matrices[number - 1], bias).to(hidden.dtype)

    def trained(self) -> Heads:
        """The heads as they are now."""
        found = {head_name(number): value for number, value in enumerate(self.matrices, 1)}
        found |= {bias_name(number): value for number, value in enumerate(self.biases, 1)}
        if self.block is not None:
            found |= {BLOCK: self.block.weight, BLOCK_BIAS: self.block.bias}
        tensors = {name: value.detach().cpu().clone() for name, value in found.items()}
        return Heads(self.count, tensors, digest(self.model.head()[0]))


def _places(labels: torch.Tensor, number: int) -> torch.Tensor:
    """Where head `number` learns [B, N - 1 - number]: both the next token and its own are learned.

    The token after the next k ones is at k + 1 places further. Before the end of the prompt, heads
    are asked for nothing.
    """
    count = labels.shape[1] - 1 - number
    if count < 1:
        return torch.zeros(len(labels), 0, dtype=torch.bool, device=labels.device)
    return (labels[:, 1 : 1 + count] != IGNORED) & (labels[:, 1 + number :] != IGNORED)


def head_losses(heads: TrainedHeads, batch: Batch) -> Losses:
    """The sum over the heads of WEIGHT**k times the cross entropy with the texts' tokens."""
    labels = batch["labels"]
    with torch.no_grad():
        hidden = heads.model(batch["input_ids"]).hidden
    parts = {}
    # Zero, and a function of the heads also if no answer is as long as a head looks ahead.
    total = heads.matrices[0].sum() * 0.0
    for number in range(1, heads.count + 1):
        places = _places(labels, number)
        if bool(places.any()):
            said = heads(hidden[:, : places.shape[1]][places], number)
            loss = F.cross_entropy(said, labels[:, 1 + number :][places])
            parts[f"head {number}"] = loss.detach()
            total = total + WEIGHT**number * loss
    return Losses(total, parts)


class HeadMeasures:
    """Measures heads on validation texts, beside what the model itself chooses."""

    def __init__(self, texts: Sequence[Encoded], config: AdaptConfig) -> None:
        self.texts = list(texts)
        self.config = config

    @torch.no_grad()
    def right(self, heads: TrainedHeads) -> list[float]:
        """Of each head, how many of its best tokens are those that the model chooses there."""
        device = next(heads.parameters()).device
        same, all_ = [0] * heads.count, [0] * heads.count
        for begin in range(0, len(self.texts), self.config.batch):
            batch = collate(self.texts[begin : begin + self.config.batch])
            labels = batch["labels"].to(device)
            result = heads.model(batch["input_ids"].to(device))
            chosen = result.logits.argmax(-1)
            for number in range(1, heads.count + 1):
                places = _places(labels, number)
                said = heads(result.hidden[:, : places.shape[1]][places], number).argmax(-1)
                theirs = chosen[:, number : number + places.shape[1]][places]
                same[number - 1] += int((said == theirs).sum())
                all_[number - 1] += int(places.sum())
        return [right / count if count else 0.0 for right, count in zip(same, all_, strict=True)]

    @torch.no_grad()
    def __call__(self, heads: TrainedHeads) -> dict[str, float]:
        """The validation loss, and of each head how many of its guesses are right."""
        device = next(heads.parameters()).device
        total = 0.0
        for begin in range(0, len(self.texts), self.config.batch):
            part = self.texts[begin : begin + self.config.batch]
            batch = {name: value.to(device) for name, value in collate(part).items()}
            total += float(head_losses(heads, batch).total) * len(part)
        right = {f"head {n} right": share for n, share in enumerate(self.right(heads), 1)}
        return {"loss": total / len(self.texts), **right}

    def row(self, name: str, heads: TrainedHeads) -> dict[str, object]:
        """A row of the report."""
        right = {f"head {n} right": share for n, share in enumerate(self.right(heads), 1)}
        return {"name": name, **right}
