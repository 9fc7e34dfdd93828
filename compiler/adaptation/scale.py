"""Gives hidden states the size of embeddings, whose place they take where they are resent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mergec.compiler.adaptation.student import Student
from mergec.compiler.config import CompileConfig, Pair, Sample, as_pair
from mergec.compiler.errors import CompileError

_APART = 1e-3
"""How far logits may move, in standard deviations: c is rounded, and so is its inverse."""

_LEAVE = "leave out match_scale"


@torch.no_grad()
def match_scale(model: Any, teacher: Student, samples: Sequence[Sample]) -> float:
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
        samples: texts to measure with; of an encoder-decoder, sources and answers.

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
    pairs = [as_pair(sample) for sample in samples]
    texts = [_texts(teacher, pair) for pair in pairs if len(pair.answer) > 1]
    before = [teacher(ids, source=source) for ids, source in texts]
    rows = torch.cat([teacher.embed(ids)[0, 1:] for ids, _ in texts])
    hidden = torch.cat([result.hidden[0, :-1] for result in before])
    factor = float((rows.square().mean() / hidden.square().mean()).sqrt())
    for parameter in norm:
        parameter.mul_(factor)
    head.weight = nn.Parameter(head.weight / factor)
    if not teacher.encodes:
        # The two embeddings of an encoder-decoder stay tied; a head that is stored is read.
        model.config.tie_word_embeddings = False
    ids, source = texts[0]
    after = Student(model, CompileConfig(), [[0]])(ids, source=source).logits
    wanted = before[0].logits
    if not float((after - wanted).abs().max() / wanted.std()) < _APART:
        raise CompileError(f"scaling this model's last norm and its head changes logits; {_LEAVE}")
    return factor


def _texts(teacher: Student, pair: Pair) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Token ids [1, N], and those of the source [1, S] of an encoder-decoder."""
    ids, source = (torch.tensor([list(text)]) for text in (pair.answer, pair.source))
    return ids, source if teacher.encodes else None
