"""What the parts of `gpu_check` say: lines, from one process to another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple


class Seen(NamedTuple):
    """A line of what was seen. bad: whether it tells of something that is wrong."""

    text: str
    bad: bool = False


def read(text: str) -> Iterator[Seen]:
    """The lines of a part; the rest of what it prints is of no matter."""
    for line in text.splitlines():
        with suppress(ValueError, TypeError):
            yield Seen(*json.loads(line))


def brief(error: BaseException) -> str:
    """An error in one line. That of a compiler has the cause at its end, below the code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^~")]
    return f"{type(error).__name__}: {lines[-1] if lines else 'without a word'}"
