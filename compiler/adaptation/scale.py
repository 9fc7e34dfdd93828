"""Gives hidden states the size of embeddings, whose place they take where they are resent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mergec.compiler.adaptation.student import Student
from mergec.compiler.config import CompileConfig
from mergec.compiler.errors import CompileError

_APART = 1e-3
"""How far logits may move, in standard deviations: c is rounded, and so is its inverse."""

_LEAVE = "leave out match_scale"


@torch.no_grad()
def match_scale(model: Any, teacher: Student, sequences: Sequence[Sequence[int]]) -> float:
    """Scale a model's last norm so that hidden states are as large as embeddings.

    The norm's gain and shift are multiplied by c, the head's matrix is divided by c, so no logit
    changes. c is the root mean square of the embedding's rows, divided by that of the hidden states
    that predict them. A head that is tied to the embedding gets a matrix of its own.

    MERGE's cosine term draws a hidden state to the direction of the next token's embedding, not to
    its size. What a trained decoder sends to its head is many times larger than an embedding, so
    that in its place it drowns positions, and what layers add to it.

    Args:
        model: a Hugging Face model; it is changed.
        teacher: a student of the same model without lossy passes, with weights of its own.
        sequences: token sequences to measure with.

    Returns:
        c.

    Raises:
        CompileError: the head does not read a norm with a gain, or scaling that changes logits.
    """
    given = dict(model.named_parameters(remove_duplicate=False))
    norm = [given[name] for name in teacher.last_norm() if name in given]
    head = model.get_output_embeddings()
    if not norm or not isinstance(head, nn.Linear):
        raise CompileError(f"the model's head does not read a norm with a gain; {_LEAVE}")
    texts = [torch.tensor([list(sequence)]) for sequence in sequences if len(sequence) > 1]
    before = [teacher(ids) for ids in texts]
    rows = torch.cat([teacher.embed(ids)[0, 1:] for ids in texts])
    hidden = torch.cat([result.hidden[0, :-1] for result in before])
    factor = float((rows.square().mean() / hidden.square().mean()).sqrt())
    for parameter in norm:
        parameter.mul_(factor)
    head.weight = nn.Parameter(head.weight / factor)
    model.config.tie_word_embeddings = False
    after = Student(model, CompileConfig(), [[0]])(texts[0]).logits
    wanted = before[0].logits
    if not float((after - wanted).abs().max() / wanted.std()) < _APART:
        raise CompileError(f"scaling this model's last norm and its head changes logits; {_LEAVE}")
    return factor
