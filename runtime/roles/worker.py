"""A session's process: its line to the process that forked it, and how it ends."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

from mergec.runtime.core.errors import BusyError, MergecError, PartyError, PeerStoppedError

DATAGRAM = 1 << 16
"""Maximum size of a message between a session's process and its parent, in bytes."""


class StoppingError(PartyError):
    """The role was told to stop."""


class Parent:
    """A session's line to its parent process, and its part in a shutdown.

    At the first SIGTERM, a session that is `idle` ends at once, any other one at its next `check`.
    At the second SIGTERM, every session ends at once.
    """

    def __init__(self, line: socket.socket) -> None:
        self.line = line
        self._idle = False
        self._stopping = False
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent passes it on

    def tell(self, **message: Any) -> None:
        """Send a message."""
        with suppress(OSError):
            self.line.send(json.dumps(message).encode())

    def hear(self) -> tuple[dict[str, Any], list[int]]:
        """The parent's next message, and the descriptors that come with it."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self.line, DATAGRAM, 1)
        except ConnectionError:  # the parent left something unread
            data, descriptors = b"", []
        if not data:
            raise StoppingError("the process that listens has ended; start it again")
        message: dict[str, Any] = json.loads(data)
        return message, descriptors

    def ask(self, **message: Any) -> tuple[dict[str, Any], list[int]]:
        """Send a message and return the parent's answer."""
        self.tell(**message)
        return self.hear()

    @property
    def idle(self) -> bool:
        """Whether the session may be ended at any moment; set between answers."""
        return self._idle

    @idle.setter
    def idle(self, value: bool) -> None:
        self._idle = value
        if value:
            self.check()

    def check(self) -> None:
        """End the session if the role was told to stop."""
        if self._stopping:
            raise StoppingError("it is shutting down; try again later")

    def _stop(self, number: int, frame: FrameType | None) -> None:
        again, self._stopping = self._stopping, True
        if self._idle or again:
            self.check()


def played(session: Callable[[], None], fail: Callable[..., None], log: Callable[[], Any]) -> str:
    """Run a session; returns how it ended: "done", "stopped", "refused" or "failed".

    What ends it is logged, and sent to the peer with `fail`, as in `Channel.fail`. The peer gets
    the text of a PartyError only: other errors may name files of this machine.
    """
    try:
        session()
        return "done"
    except StoppingError as error:
        log().info("session stopped")
        fail(str(error))
        return "stopped"
    except PeerStoppedError as error:
        log().info("session stopped", reason=str(error))
        fail(str(error), stopped=True)
        return "stopped"
    except BusyError as error:
        log().warning("session refused", reason=str(error))
        fail(str(error), wait=error.wait)
        return "refused"
    except PartyError as error:
        log().warning("session failed", reason=str(error))
        fail(str(error))
    except MergecError as error:
        log().error("session failed", reason=str(error))
        fail("it cannot go on; see its log")
    except MemoryError:
        log().error("session failed", reason="out of memory")
        fail("it is out of memory; try again later")
    except Exception as error:  # noqa: BLE001  (a bug of ours: the other sessions go on)
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        place = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else ""
        # The message is not logged: it might contain values.
        log().error("session failed", reason=f"internal error: {type(error).__name__}", place=place)
        fail("it cannot go on; see its log")
    return "failed"
