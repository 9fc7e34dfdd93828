"""Errors that a user of a compiled program can act on."""

from __future__ import annotations

from typing import ClassVar


class MergecError(Exception):
    """Base of every error that is reported as one line, without a traceback.

    distance: where several roles fail together, the error of the least distance tells the cause.
    """

    distance: ClassVar[int] = 0


class BundleError(MergecError):
    """A bundle is missing, damaged, of another version, or of another program."""


class OpError(MergecError):
    """The class of an op is wrong, or an op of another package cannot be loaded."""


class PromptError(MergecError):
    """The prompt cannot be run: empty, too long, or holding unknown tokens."""


class LimitError(PromptError):
    """The server answers no more for now; `wait` seconds later it may again."""

    def __init__(self, message: str, wait: int) -> None:
        super().__init__(message)
        self.wait = wait


class PartyError(MergecError):
    """A peer is missing, disagrees about the program, or went away."""


class PeerSilentError(PartyError):
    """A peer sent nothing in time: it may have failed, or wait for a third."""

    distance = 1


class PeerEndedError(PartyError):
    """A peer went away, or told that it ends the session: it knows why."""

    distance = 2


class RangeError(MergecError):
    """A value cannot be represented in the ring with the chosen fractional bits."""
