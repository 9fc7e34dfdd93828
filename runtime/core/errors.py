"""Errors that the user of a compiled program can act on."""

from __future__ import annotations

from typing import ClassVar

DEBUG = "MERGEC_DEBUG"
"""Environment variable: if set, failures print their traceback, too."""


class MergecError(Exception):
    """Base class of every error that is reported as one line, without a traceback.

    distance: if several roles fail together, the error with the smallest distance names the cause.
    """

    distance: ClassVar[int] = 0


class BundleError(MergecError):
    """A bundle is missing, damaged, of another version, or of another program."""


class OpError(MergecError):
    """The class of an op is wrong, or an op of another package cannot be loaded."""


class PromptError(MergecError):
    """The prompt cannot be run: it is empty, too long, or contains unknown tokens."""


class LimitError(PromptError):
    """The server accepts no more requests for now; it may again after `wait` seconds."""

    def __init__(self, message: str, wait: int) -> None:
        super().__init__(message)
        self.wait = wait


class RankError(MergecError):
    """A rank of this party has failed, so the party has."""


class PartyError(MergecError):
    """A peer is missing, disagrees about the program, or disconnected."""


class PeerSilentError(PartyError):
    """A peer sent nothing in time: it may have failed, or be waiting for a third role."""

    distance = 1


class PeerEndedError(PartyError):
    """A peer disconnected, or announced that it ends the session; that peer knows the cause."""

    distance = 2


class PeerStoppedError(PeerEndedError):
    """A person stopped the session at a peer: nothing has failed."""


class BusyError(PeerEndedError):
    """A peer has no room for another session; it may have some after `wait` seconds."""

    def __init__(self, message: str, wait: int) -> None:
        super().__init__(message)
        self.wait = wait
