"""Errors that a user of a compiled program can act on."""

from __future__ import annotations


class MergecError(Exception):
    """Base of every error that is reported as one line, without a traceback."""


class BundleError(MergecError):
    """A bundle is missing, damaged, of another version, or of another program."""


class PromptError(MergecError):
    """The prompt cannot be run: empty, too long, or holding unknown tokens."""


class LimitError(PromptError):
    """The server answers no more for now; `wait` seconds later it may again."""

    def __init__(self, message: str, wait: int) -> None:
        super().__init__(message)
        self.wait = wait


class PartyError(MergecError):
    """A peer is missing, disagrees about the program, or went away."""


class RangeError(MergecError):
    """A value cannot be represented in the ring with the chosen fractional bits."""
