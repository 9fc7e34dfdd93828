"""What training makes small: MERGE's loss, and the two stages of a distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from mergec.compiler.adaptation.config import AdaptConfig
from mergec.compiler.adaptation.data import Encoded
from mergec.compiler.adaptation.student import PADDING, Result, Student, padded

IGNORED = -100
"""The label of a token that is not learned: of the prompt, or padding."""

Batch = dict[str, torch.Tensor]


def collate(texts: Sequence[Encoded]) -> Batch:
    """Token ids [B, N], padded at their ends, and labels [B, N]: the ids that are learned.

    For an encoder-decoder these are of answers, and "source" [B, S] is what it reads.
    """
    ids = padded([text.tokens for text in texts])
    labels = torch.full_like(ids, IGNORED)
    kept = torch.zeros_like(ids, dtype=torch.bool)
    for row, text in enumerate(texts):
        size = len(text.tokens)
        labels[row, text.start : size] = ids[row, text.start : size]
        kept[row, :size] = True
    batch = {"input_ids": ids, "labels": labels, "kept": kept}
    if texts[0].source:
        batch["source"] = padded([text.source for text in texts], PADDING)
    return batch


@dataclass
class Losses:
    """A batch's loss, and the parts that it is made of, by name."""

    total: torch.Tensor
    parts: dict[str, torch.Tensor]


def losses(
    student: Student,
    teacher: Student | None,
    batch: Batch,
    config: AdaptConfig,
    *,
    layers: bool = False,
    disturbed: bool = False,
) -> Losses:
    """The loss of a batch.

    With the objective "data", cross entropy with the labels; with "teacher", the divergence from
    the teacher's distributions, or, if `layers`, the distance from its layers. Where hidden states
    are resent, each hidden state is drawn to the embedding of the next token:
    (1 - λ) · loss + λ · (1 - cos(h_t, E[x_{t+1}])), with λ = config.cosine (MERGE, Liang et al.,
    AAAI 2024). disturbed: whether embeddings get noise and dropout.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    learned = labels[:, 1:] != IGNORED
    result, clean = _run(student, batch, config, disturbed=disturbed)
    if config.objective == "data" or teacher is None:
        loss = F.cross_entropy(result.logits[:, :-1][learned], labels[:, 1:][learned])
        parts = {"cross entropy": loss}
    else:
        with torch.no_grad():
            wanted = teacher(ids, source=batch.get("source"))
        if layers:
            loss = _layers(result, wanted, batch)
            parts = {"layers": loss}
        else:
            rows = (side.logits[:, :-1][learned] / config.temperature for side in (result, wanted))
            mine, theirs = (side.log_softmax(-1) for side in rows)
            loss = F.kl_div(mine, theirs, reduction="batchmean", log_target=True)
            loss = loss * config.temperature**2
            parts = {"divergence": loss}
    if student.resends and clean is not None and config.cosine:
        near = F.cosine_similarity(result.hidden[:, :-1], clean[:, 1:], dim=-1)[learned]
        apart = (1 - near).mean()
        parts["cosine distance"] = apart
        loss = (1 - config.cosine) * loss + config.cosine * apart
    return Losses(loss, {name: part.detach() for name, part in parts.items()})


def _run(
    student: Student, batch: Batch, config: AdaptConfig, *, disturbed: bool
) -> tuple[Result, torch.Tensor | None]:
    """The student's result, and its embedding of the tokens, if that is needed."""
    ids, source = batch["input_ids"], batch.get("source")
    disturbed = disturbed and bool(config.noise or config.dropout)
    if not (disturbed or student.resends):
        return student(ids, source=source), None
    clean = student.embed(ids)
    rows = _disturbed(clean, config) if disturbed else clean
    result = student(ids, rows, source)
    answered = (batch["labels"][:, 1:] != IGNORED)[..., None]
    for _ in range(config.resent if student.resends else 0):
        # A token of the answer enters as the hidden state before it.
        sent = torch.where(answered, result.hidden[:, :-1], rows[:, 1:])
        result = student(ids, torch.cat([rows[:, :1], sent], 1), source)
    return result, clean


def _disturbed(rows: torch.Tensor, config: AdaptConfig) -> torch.Tensor:
    """Uniform noise, then dropout."""
    noise = (torch.rand_like(rows) * 2 - 1) * (config.noise or 0.0)
    return F.dropout(rows + noise, config.dropout or 0.0)


def _layers(mine: Result, theirs: Result, batch: Batch) -> torch.Tensor:
    """The squared distance from the teacher, layer by layer, relative to the teacher's square.

    Relative, so that no layer with massive activations outweighs the others. An encoder's layers
    count like a decoder's.
    """
    kept = [batch["kept"]] * (len(mine.streams) + 1)
    if mine.encoded:
        kept += [batch["source"] != PADDING] * len(mine.encoded)
    sides = ([*side.streams, side.hidden, *side.encoded] for side in (mine, theirs))
    found = [
        F.mse_loss(a[rows], b[rows]) / b[rows].square().mean().clamp(min=1e-12)
        for a, b, rows in zip(*sides, kept, strict=True)
    ]
    return torch.stack(found).mean()
