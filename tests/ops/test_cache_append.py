"""Caches that grow in place, and what is never written to."""

from __future__ import annotations

import pytest
import torch

from mergec.runtime.core.context import ShapeContext
from mergec.runtime.core.values import Masked, Sent
from mergec.runtime.ops.cache_append import CacheAppend
from mergec.runtime.protocols.local import ghost

GENERATOR = torch.Generator().manual_seed(3)


def entries(rows: int, kind: type[Masked | Sent] = Masked, hidden: str = "") -> Masked | Sent:
    """New entries of random words; without data in the part named `hidden`."""
    words = torch.randint(-(2**63), 2**63 - 1, (2, 1, 3, rows, 5), generator=GENERATOR)
    opened, mask = (
        ghost(part.shape) if name == hidden else part
        for name, part in zip(("opened", "mask"), words, strict=True)
    )
    return kind(opened, mask, 16)


def append(past: Masked | Sent, new: Masked | Sent) -> Masked | Sent:
    """What one role has after the protocol, which has no messages."""
    with pytest.raises(StopIteration) as stop:
        next(CacheAppend.protocol(ShapeContext(), past, new))
    result: Masked | Sent = stop.value.value
    return result


def test_many_steps_give_what_one_concatenation_does() -> None:
    steps = [entries(rows) for rows in (0, 7, 1, 1, 90, 1, 1, 200, *[1] * 60)]
    cache, copies = steps[0], 0
    for step in steps[1:]:
        before, cache = cache, append(cache, step)
        copies += cache.opened.data_ptr() != before.opened.data_ptr()
    assert torch.equal(cache.opened, torch.cat([step.opened for step in steps], -2))
    assert torch.equal(cache.mask, torch.cat([step.mask for step in steps], -2))
    assert copies < 5


def test_a_cache_can_be_continued_in_two_ways() -> None:
    """As in a step that is taken again: the first continuation stays what it was."""
    first, new = entries(7), [entries(rows) for rows in (1, 1, 2, 1)]
    cache = append(first, new[0])
    one, other = append(cache, new[1]), append(cache, new[2])
    longer = append(one, new[3])
    for found, parts in (
        (cache, (first, new[0])),
        (one, (first, new[0], new[1])),
        (other, (first, new[0], new[2])),
        (longer, (first, new[0], new[1], new[3])),
    ):
        assert torch.equal(found.opened, torch.cat([part.opened for part in parts], -2))
        assert torch.equal(found.mask, torch.cat([part.mask for part in parts], -2))


def test_the_beginning_of_a_cache_is_continued_in_a_copy() -> None:
    cache, new = append(entries(7), entries(3)), entries(1)
    whole = cache.opened.clone()
    beginning = Masked(cache.opened[..., :8, :], cache.mask[..., :8, :], 16, cache.room)
    found = append(beginning, new)
    assert torch.equal(found.opened, torch.cat([whole[..., :8, :], new.opened], -2))
    assert torch.equal(cache.opened, whole)


@pytest.mark.parametrize(("kind", "hidden"), [(Masked, "opened"), (Sent, "opened"), (Sent, "mask")])
def test_roles_that_know_one_part(kind: type[Masked | Sent], hidden: str) -> None:
    known = "mask" if hidden == "opened" else "opened"
    steps = [entries(rows, kind, hidden) for rows in (4, 1, 80, 1)]
    cache = steps[0]
    for step in steps[1:]:
        cache = append(cache, step)
    assert type(cache) is kind
    assert getattr(cache, hidden).is_meta
    assert getattr(cache, hidden).shape == (1, 3, 86, 5)
    parts = [getattr(step, known) for step in steps]
    assert torch.equal(getattr(cache, known), torch.cat(parts, -2))
