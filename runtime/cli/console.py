"""Output on the terminal: answers on the standard output, everything else on the error output."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def write(text: str) -> None:
    """Print text at once, without ending the line."""
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def waiting(what: str) -> Iterator[Callable[[Callable[[str], None]], Callable[[str], None]]]:
    """Show a spinner until the first text is written.

    Yields a function that wraps a writer of text: the wrapped writer stops the spinner first.
    """
    spinner = err.status(what)

    def first(write: Callable[[str], None]) -> Callable[[str], None]:
        def stop_and_write(text: str) -> None:
            spinner.stop()
            write(text)

        return stop_and_write

    if err.is_terminal:
        spinner.start()
    try:
        yield first
    finally:
        spinner.stop()
