"""What training makes small: MERGE's loss, and the two stages of a distillation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from mergec.compiler.adaptation.config import AdaptConfig
from mergec.compiler.adaptation.data import Encoded
from mergec.compiler.adaptation.student import PADDING, Result, Student, padded

IGNORED = -100
"""The label of a token that is not learned: of the prompt, or padding."""

_GROWTH = 4.0
"""How many times longer rows may become in a layer when hidden states are resent."""

_HALVINGS = 4
"""How often a text that grows moves half as far, before it stays at its embeddings."""

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
    share: float | None = None,
) -> Losses:
    """The loss of a batch.

    With the objective "data", cross entropy with the labels; with "teacher", the divergence from
    the teacher's distributions, or, if `layers`, the distance from its layers. Where hidden states
    are resent, each hidden state is drawn to the embedding of the next token:
    (1 - λ) · loss + λ · (1 - cos(h_t, E[x_{t+1}])), with λ = config.cosine (MERGE, Liang et al.,
    AAAI 2024). Where this is not the distance from the layers itself, config.layer_weight times
    that is added. disturbed: whether embeddings get noise and dropout. share: how far rows move
    from embeddings to hidden states that are resent, less far in texts that would grow (`_resent`);
    None: all the way, as in the program.
    """
    labels = batch["labels"]
    learned = labels[:, 1:] != IGNORED
    result, clean = _run(student, batch, config, disturbed=disturbed, share=share)
    wanted = None
    if teacher is not None and (config.objective == "teacher" or config.layer_weight):
        with torch.no_grad():
            wanted = teacher(batch["input_ids"], source=batch.get("source"))
    if config.objective == "data" or wanted is None:
        loss = F.cross_entropy(result.logits[:, :-1][learned], labels[:, 1:][learned])
        parts = {"cross entropy": loss}
    elif layers:
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
    if config.layer_weight and wanted is not None and "layers" not in parts:
        parts["layers"] = _layers(result, wanted, batch)
        loss = loss + config.layer_weight * parts["layers"]
    return Losses(loss, {name: part.detach() for name, part in parts.items()})


def _run(
    student: Student, batch: Batch, config: AdaptConfig, *, disturbed: bool, share: float | None
) -> tuple[Result, torch.Tensor | None]:
    """The student's result, and its embedding of the tokens, if that is needed."""
    ids, source = batch["input_ids"], batch.get("source")
    disturbed = disturbed and bool(config.noise or config.dropout)
    if not (disturbed or student.resends):
        return student(ids, source=source), None
    clean = student.embed(ids)
    rows = _disturbed(clean, config) if disturbed else clean
    return _resent(student, batch, rows, config.resent if student.resends else 0, share), clean


def _resent(
    student: Student, batch: Batch, rows: torch.Tensor, times: int, share: float | None
) -> Result:
    """The result from rows [B, N, E], run again `times` times with hidden states of the run before.

    A token of the answer enters as (1 - s) · row + s · hidden state before it, with s = share; None
    is 1 for all texts. With a share, s is halved for each text whose rows become `_GROWTH` times
    longer in a layer than they are without hidden states. Behind a constant norm, a gated MLP
    squares such a growth, layer after layer, so that the text would not be finite in the end.
    """
    ids, source = batch["input_ids"], batch.get("source")
    answered = (batch["labels"][:, 1:] != IGNORED)[..., None]
    first = result = student(ids, rows, source)
    far = rows.new_full((len(ids), 1, 1), 1.0 if share is None else share)
    limit = math.inf if share is None else _GROWTH**2 * _sizes(first, batch["kept"])
    for _ in range(times):
        hidden = result.hidden[:, :-1]
        for halved in range(_HALVINGS + 1):
            sent = torch.where(answered, torch.lerp(rows[:, 1:], hidden, far), rows[:, 1:])
            result = student(ids, torch.cat([rows[:, :1], sent], 1), source)
            if share is None:
                break
            # Not the other way around: sizes may be NaN.
            grown = ~(_sizes(result, batch["kept"]) <= limit).all(0)
            if not bool(grown.any()):
                break
            nearer = far / 2 if halved < _HALVINGS - 1 else torch.zeros_like(far)
            far = torch.where(grown[:, None, None], nearer, far)
    return result


@torch.no_grad()
def _sizes(result: Result, kept: torch.Tensor) -> torch.Tensor:
    """The mean square of the longest row of each layer and text [layers, B]."""
    sizes = [stream.square().mean(-1).masked_fill(~kept, 0.0).amax(-1) for stream in result.streams]
    return torch.stack(sizes)


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
