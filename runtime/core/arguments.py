"""Checks the arguments of the public functions: one line that names the argument and its value."""

from __future__ import annotations

import operator
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mergec.runtime.core.errors import MergecError


class Arguments:
    """Checks values, and raises `error` for one that is not allowed.

    Each method returns the value, as the type that it names.

    >>> Arguments(MergecError).whole("max_tokens", 8, least=1)
    8
    """

    def __init__(self, error: type[MergecError]) -> None:
        self._error = error

    def whole(self, name: str, value: Any, least: int, most: int | None = None) -> int:
        """A whole number; those of numpy and torch are taken, too, and a bool is not one."""
        limits = f"{least} or more" if most is None else f"{least} to {most}"
        try:
            if isinstance(value, bool):
                raise TypeError
            number = operator.index(value)
        except TypeError:
            self._refuse(name, value, f"a whole number, {limits}")
        if number < least or (most is not None and number > most):
            raise self._error(f"{name} is {number}; it can be {limits}")
        return number

    def number(self, name: str, value: Any) -> float:
        """A number, as a float."""
        if isinstance(value, bool) or not hasattr(value, "__float__"):
            self._refuse(name, value, "a number")
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            self._refuse(name, value, "a number")

    def flag(self, name: str, value: Any, *, or_none: bool = False) -> Any:
        """True or False; None, too, if `or_none`."""
        if not (isinstance(value, bool) or (or_none and value is None)):
            self._refuse(
                name, value, f"True{',' if or_none else ' or'} False{' or None' * or_none}"
            )
        return value

    def text(self, name: str, value: Any) -> str:
        """A text."""
        if not isinstance(value, str):
            self._refuse(name, value, "a text")
        return value

    def choice(self, name: str, value: Any, allowed: Collection[str]) -> str:
        """One of some texts."""
        if not isinstance(value, str) or value not in allowed:
            raise self._error(f"{name} is {_short(value)}; it can be: {', '.join(allowed)}")
        return value

    def names(self, name: str, value: Any) -> tuple[str, ...]:
        """Several texts, as a tuple. A text alone is not several: its letters would be."""
        if not _several(value) or not all(isinstance(item, str) for item in value):
            example = f", as ({_short(value)},)" if isinstance(value, str) else ""
            self._refuse(name, value, f"a tuple of names{example}")
        return tuple(value)

    def tokens(self, name: str, value: Any) -> list[int]:
        """Token numbers: a sequence of whole numbers, or a tensor of one dimension."""
        if isinstance(value, (str, bytes)) or not hasattr(value, "__len__"):
            self._refuse(name, value, "a sequence of token numbers")
        if hasattr(value, "keys"):
            self._refuse(name, value, "a sequence of token numbers, such as its input_ids")
        found = []
        for position, token in enumerate(value):
            try:
                if isinstance(token, bool) or getattr(token, "ndim", None):
                    raise TypeError
                found.append(operator.index(token))
            except TypeError:
                raise self._error(
                    f"{name} holds {_short(token)} at place {position}; it must hold token "
                    "numbers, and only one text at a time"
                ) from None
        return found

    def function(self, name: str, value: Any) -> Any:
        """Something that can be called."""
        if not callable(value):
            self._refuse(name, value, "a function")
        return value

    def path(self, name: str, value: Any) -> Path:
        """A path, given as a text or as a path."""
        if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
            self._refuse(name, value, "a path")
        return Path(value)

    def instance(self, name: str, value: Any, kind: type, remedy: str) -> Any:
        """An instance of a class."""
        if not isinstance(value, kind):
            raise self._error(f"{name} is {_short(value)}, not a {kind.__name__}; {remedy}")
        return value

    def _refuse(self, name: str, value: Any, wanted: str) -> NoReturn:
        raise self._error(f"{name} is {_short(value)}; it must be {wanted}")


def _several(value: Any) -> bool:
    return isinstance(value, (Sequence, set, frozenset)) and not isinstance(value, (str, bytes))


def _short(value: Any) -> str:
    """A value in an error: itself if it is short, its class otherwise."""
    if value is None or isinstance(value, (bool, int, float, str)):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:60]}…"
    return f"a {getattr(type(value), '__name__', 'value')}"
