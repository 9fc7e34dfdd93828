"""A datastore of token sequences in a folder, with a suffix array to find any of their parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mergec.runtime.core.errors import MergecError, PromptError

FILE = "datastore.safetensors"
_FORMAT = "1"
_END = 0
"""Stands between two texts. A token is stored as its number plus one."""


class Datastore:
    """Token sequences and the order of all their ends.

    vocabulary: identifies the tokens, as `Text.vocabulary_hash`.
    """

    def __init__(self, tokens: np.ndarray, order: np.ndarray, vocabulary: str) -> None:
        """tokens: each plus one, with 0 between texts. order: their suffix array."""
        self._tokens, self._order = tokens, order
        self.vocabulary = vocabulary

    @property
    def size(self) -> int:
        """Number of tokens."""
        return int((self._tokens != _END).sum())

    @classmethod
    def of(cls, texts: Iterable[Sequence[int]], vocabulary: str) -> Self:
        """A datastore of token sequences.

        Raises MergecError if the package `pydivsufsort` is missing, and PromptError if there are no
        tokens.
        """
        try:
            from pydivsufsort import divsufsort
        except ImportError as error:
            raise MergecError(
                "building a datastore needs the package pydivsufsort; run "
                "`pip install 'mergec[datastore]'`"
            ) from error
        parts: list[np.ndarray] = []
        for text in texts:
            parts += [np.asarray(text, np.uint32) + 1, np.full(1, _END, np.uint32)]
        tokens = np.concatenate(parts) if parts else np.empty(0, np.uint32)
        if not (tokens != _END).any():
            raise PromptError("these files hold no text; give files to draft from")
        return cls(tokens, np.array(divsufsort(tokens)), vocabulary)

    def save(self, folder: Path) -> None:
        """Write it to a folder, which is created. Raises MergecError if that is not possible."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(
                {"tokens": self._tokens, "order": self._order},
                folder / FILE,
                {"format": _FORMAT, "vocabulary": self.vocabulary},
            )
        except OSError as error:
            raise MergecError(f"{folder} cannot be written: {error.strerror}") from error

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote. Raises PromptError if there is none, or if it is damaged."""
        file = folder / FILE
        if not file.is_file():
            raise PromptError(
                f"{folder} holds no datastore; build one with `mergec datastore build`"
            )
        try:
            with safe_open(file, framework="np") as reader:
                told = reader.metadata() or {}
                tokens, order = reader.get_tensor("tokens"), reader.get_tensor("order")
        except (SafetensorError, OSError, ValueError) as error:
            raise PromptError(f"{file}: cannot be read ({error}); build it again") from error
        sound = (
            told.get("format") == _FORMAT
            and tokens.dtype == np.uint32
            and order.dtype in (np.int32, np.int64)
            and tokens.shape == order.shape == (len(tokens),)
            and len(tokens) > 0
            and int(order.min()) >= 0
            and int(order.max()) < len(tokens)
        )
        if not sound:
            raise PromptError(f"{file}: is not a datastore of this version; build it again")
        return cls(tokens, order, str(told.get("vocabulary", "")))

    def followers(self, end: Sequence[int], least: int, most: int, places: int) -> np.ndarray:
        """Where the text goes on after the longest part of `end`, its last tokens, that occurs.

        least, most: fewest and most tokens of that part. Returns up to `places` positions in the
        stored tokens, spread evenly over all occurrences; none if no part occurs.
        """
        wanted = np.asarray(end[-most:], np.uint32) + 1
        # If an end of some length occurs, so do all shorter ones.
        low, high, found = least, len(wanted), (0, 0)
        length = 0
        while low <= high:
            middle = (low + high) // 2
            first, last = self._range(wanted[-middle:])
            if first < last:
                length, found, low = middle, (first, last), middle + 1
            else:
                high = middle - 1
        first, last = found
        step = max(1, (last - first) // places)
        return np.sort(self._order[first:last:step][:places]) + length

    def after(self, positions: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens `step` places after positions, and which of these places hold one."""
        at = positions + step
        inside = at < len(self._tokens)
        found = self._tokens[np.minimum(at, len(self._tokens) - 1)]
        return found.astype(np.int64) - 1, inside & (found != _END)

    def _range(self, wanted: np.ndarray) -> tuple[int, int]:
        """The part of the order whose ends begin with these stored tokens."""
        whole = wanted.tolist()

        def begins(place: int) -> list[int]:
            start = int(self._order[place])
            part: list[int] = self._tokens[start : start + len(whole)].tolist()
            return part

        first = _first(len(self._order), lambda place: begins(place) >= whole)
        last = _first(len(self._order), lambda place: begins(place) > whole)
        return first, last


def _first(count: int, holds: Callable[[int], bool]) -> int:
    """The first number below `count` for which a monotone condition holds; `count` if none."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def read_texts(files: Iterable[Path]) -> list[str]:
    """The texts of files, each one text; of a .jsonl file, one for the `text` of each line.

    Raises PromptError that names a file which is not readable text.
    """
    texts: list[str] = []
    for file in files:
        try:
            content = file.read_text(encoding="utf-8")
            if file.suffix == ".jsonl":
                texts += [str(json.loads(line)["text"]) for line in content.splitlines() if line]
            else:
                texts.append(content)
        except OSError as error:
            raise PromptError(f"{file}: cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError) as error:
            raise PromptError(f"{file}: is not text, or not lines with a `text`") from error
    return texts
