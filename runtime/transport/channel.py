"""A connection between two roles: numbered frames of bounded length, over TLS or plain TCP.

Each side knows from the program which kinds of frames (`frames`) may come next and how long they
may be. So a peer cannot make it allocate memory, and a frame that is out of place, repeated or too
long ends the session. Incoming data is never executed or unpickled: payloads are the bytes of
tensors, numbers, or JSON objects.

A timeout measures silence: how long nothing that is due has arrived. A peer that is at work says so
with heartbeats (`Channel.beat`), which may come between any two frames. They are empty, and sent by
the clock alone, so they show that a process runs and nothing else. They extend a wait only while
the peer has a step to do, up to a limit that the receiver sets (`Channel.expect`).
"""

from __future__ import annotations

import json
import select
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from mergec.runtime.core.errors import PartyError, PeerEndedError, PeerSilentError
from mergec.runtime.transport.frames import (
    HEADER,
    MAX_TEXT,
    NOTHING,
    Incoming,
    Kind,
    check_payload,
    ending,
)
from mergec.runtime.transport.sockets import explain
from mergec.runtime.transport.traffic import Traffic

REPLY_TIMEOUT = 600.0
"""Seconds that a party waits for a peer that gives no sign of life."""

HANDSHAKE_TIMEOUT = 10.0
"""Seconds that a new connection may take to authenticate, and then to send its request."""

_PACE = 1 << 16
"""Bytes (or the rest of the frame) that must move within a timeout; an occasional byte is not
progress."""

_AT_ONCE = 1 << 18
_BUFFER = 1 << 16
_SMALL = 1 << 14
"""Bytes that the buffers of a connection take while nobody reads, so that they can be sent before
the peer's are awaited."""

_LINGER = 1.0


class Channel:
    """One end of a connection. One thread may receive while others send.

    peer: the other end's role. name: its identity, from its certificate. proven: whether role and
    name come from a certificate; otherwise they are what was assumed or claimed. traffic: payload
    bytes of rounds, and the rounds; bytes of the dealer's stream and seeds count as offline.
    """

    def __init__(
        self,
        connection: socket.socket,
        peer: str,
        timeout: float = REPLY_TIMEOUT,
        name: str = "",
        proven: bool = False,
    ) -> None:
        connection.setblocking(False)
        self.peer = peer
        self.name = name or peer
        self.proven = proven
        self.timeout = timeout
        self.traffic = Traffic()
        self._socket = connection
        # OpenSSL allows one call at a time on a connection; no call blocks.
        self._lock = threading.Lock()
        self._sent = self._received = 0
        self._buffer = memoryview(bytearray(_BUFFER))
        self._start = self._stop = 0
        self._unsent: list[memoryview] = []
        # Held while a frame is sent: frames of several threads do not mix.
        self._sending = threading.Lock()
        self._reading = threading.Lock()
        self._beats: list[memoryview] = []
        """What the socket has not taken yet of a heartbeat; goes before the next frame."""
        self._gave = self._got = self._alive = self._until = 0.0
        """When bytes were last sent, when a frame or 64 KiB of one last arrived, when a heartbeat
        last arrived, and until when heartbeats count."""

    def fileno(self) -> int:
        """The socket's descriptor, for polling; check `buffered` as well."""
        return self._socket.fileno()

    # ------------------------------------------------------------------------------- frames

    def send(self, kind: Kind, payload: bytes | bytearray | memoryview = b"") -> None:
        """Send one frame. Raises PartyError if the peer does not take it in time."""
        self._transfer((kind, memoryview(payload)), None)

    def send_json(self, kind: Kind, **fields: Any) -> None:
        """Send a frame of JSON."""
        self.send(kind, json.dumps(fields).encode())

    def receive(self, kind: Kind, *, limit: int) -> memoryview:
        """The payload of the next frame, which must be of this kind and at most `limit` long."""
        return self.receive_any((kind,), limit)[1]

    def receive_any(
        self, kinds: Sequence[Kind], limit: int = MAX_TEXT, timeout: float | None = None
    ) -> tuple[Kind, memoryview]:
        """The next frame. Raises PartyError unless it is one of `kinds` and within `limit`."""
        incoming = Incoming(lambda header: self._accept(kinds, 0, limit, header))
        self._transfer(None, incoming, timeout)
        self._check_error(incoming)
        return Kind(incoming.kind), incoming.payload

    def receive_json(
        self, *kinds: Kind, timeout: float | None = None
    ) -> tuple[Kind, dict[str, Any]]:
        """The next frame, one of `kinds`, and the object that it contains."""
        kind, payload = self.receive_any(kinds, timeout=timeout)
        return kind, self.object(payload)

    def object(self, payload: memoryview) -> dict[str, Any]:
        """The JSON object in a payload."""
        try:
            found = json.loads(bytes(payload))
        except (ValueError, RecursionError) as error:
            raise self._strange("sent text that cannot be read") from error
        if not isinstance(found, dict):
            raise self._strange("sent text that cannot be read")
        return found

    def exchange(self, outgoing: torch.Tensor | None, incoming: int) -> torch.Tensor:
        """Send `outgoing` (1-D uint8 on the CPU) while receiving `incoming` bytes; one round.

        Both parties call this for every round. An empty message is not sent.
        """
        self.traffic.rounds += 1
        since, sent = time.monotonic(), self._outgoing(outgoing)
        if 0 < incoming <= _SMALL and (sent is None or sent[1].nbytes <= _SMALL):
            if sent is not None:
                self._transfer(sent, None)
                sent = None
            small = self._small_reply(incoming, since)
            if small is not None:
                return small
        reply, expected = self._expected(incoming)
        self._transfer(sent, expected, since=since)
        if expected is not None:
            self._check_error(expected)
        return reply

    def post(self, outgoing: torch.Tensor | None) -> None:
        """The sending half of `exchange`, while another thread may be in `collect`."""
        sent = self._outgoing(outgoing)
        if sent is not None:
            self._transfer(sent, None)

    def collect(self, incoming: int) -> torch.Tensor:
        """The receiving half of `exchange`, which counts the round."""
        self.traffic.rounds += 1
        reply, expected = self._expected(incoming)
        if expected is not None:
            self._transfer(None, expected)
            self._check_error(expected)
        return reply

    def _outgoing(self, message: torch.Tensor | None) -> tuple[Kind, memoryview] | None:
        """A round's message as a frame, which is counted."""
        if message is None or not message.numel():
            return None
        check_payload(message)
        self.traffic.sent += message.numel()
        return Kind.ROUND, message.numpy().data

    def _expected(self, incoming: int) -> tuple[torch.Tensor, Incoming | None]:
        """Room for a round's message of this size, which is counted, and its frame."""
        reply = torch.empty(incoming, dtype=torch.uint8)
        self.traffic.received += incoming
        if not incoming:
            return reply, None
        into = reply.numpy().data
        return reply, Incoming(
            lambda header: self._accept((Kind.ROUND,), incoming, incoming, header, into)
        )

    def _small_reply(self, incoming: int, since: float) -> torch.Tensor | None:
        """A round's message that arrives whole and alone, as most do, by one read and no copy.

        None if something else came, or nothing in time: `_transfer` goes on from there.
        """
        if not self._reading.acquire(blocking=False):
            return None
        try:
            if self._start < self._stop:
                return None
            if not self.buffered:
                self._wait(select.POLLIN, self.deadline(since, self.timeout))
            room = np.empty(HEADER.size + incoming, np.uint8)
            count = self._take(room.data)
            header = HEADER.unpack_from(room.data) if count == room.nbytes else ()
            if header == (Kind.ROUND, self._received, incoming):
                self._accept((Kind.ROUND,), incoming, incoming, header, room.data)
                self._got = time.monotonic()
                self.traffic.received += incoming
                return torch.from_numpy(room[HEADER.size :])
            self._buffer[:count] = room.data[:count]
            self._start, self._stop = 0, count
            return None
        except OSError as error:
            raise self._lost(error, sending=False) from error
        finally:
            self._reading.release()

    def _frame(self, kind: Kind, payload: memoryview) -> list[memoryview]:
        header = HEADER.pack(kind, self._sent, payload.nbytes)
        self._sent = (self._sent + 1) & 0xFFFFFFFF
        if payload.nbytes <= _BUFFER:
            return [memoryview(header + bytes(payload))]
        return [memoryview(header), payload]

    def _accept(
        self,
        kinds: Sequence[Kind],
        least: int,
        most: int,
        header: tuple[int, int, int],
        into: memoryview | None = None,
    ) -> memoryview:
        """Check a frame's header, and return the buffer for its payload."""
        kind, number, length = header
        if number != self._received:
            raise self._strange("sent a frame twice or out of order")
        self._received = (self._received + 1) & 0xFFFFFFFF
        if kind == Kind.ERROR and length <= MAX_TEXT:
            return memoryview(bytearray(length))
        if kind not in kinds:
            due = " or ".join(known.name for known in kinds)
            raise self._strange(f"sent frame {kind} where {due} was expected")
        if not least <= length <= most:
            due = f"{most}" if least == most else f"at most {most}"
            raise self._strange(f"sent {length} bytes where {due} were expected")
        # No need to zero the buffer: bytes that are not received are not read either.
        return np.empty(length, np.uint8).data if into is None else into

    def _check_error(self, incoming: Incoming) -> None:
        if incoming.kind == Kind.ERROR:
            raise self._told(incoming)

    def _told(self, incoming: Incoming) -> PeerEndedError:
        """The error that an ERROR frame reports."""
        return ending(self.object(incoming.payload), self.peer)

    def _strange(self, what: str) -> PartyError:
        return PartyError(f"the {self.peer} {what}; install the same mergec everywhere")

    # -------------------------------------------------------------------------------- bytes

    def _transfer(
        self,
        outgoing: tuple[Kind, memoryview] | None,
        incoming: Incoming | None,
        timeout: float | None = None,
        since: float | None = None,
    ) -> None:
        """Send and receive at the same time, so that two full buffers cannot deadlock.

        since: when the wait began, if before this call.
        """
        limit = self.timeout if timeout is None else timeout
        sending = reading = False
        since = time.monotonic() if since is None else since
        moved = heard = 0
        try:
            if outgoing is not None:
                sending = self._sending.acquire(timeout=limit)
                if not sending:
                    raise TimeoutError  # another thread's frame is in the way
                self._unsent = [*self._beats, *self._frame(*outgoing)]
                self._beats = []
            if incoming is not None:
                reading = self._reading.acquire(timeout=limit)
                if not reading:
                    raise TimeoutError
            while True:
                if sending and not self._unsent:
                    # Only now: another thread may send while this one waits for the answer.
                    self._sending.release()
                    sending = False
                due = incoming is not None and not incoming.complete
                if not sending and not due:
                    break
                given = taken = 0
                events = select.POLLOUT if sending else 0
                if sending:
                    given = self._give_first(self._unsent)
                if incoming is not None and due:
                    if not (sending or heard or self.buffered):
                        # The peer's message has rarely arrived yet, so poll before reading.
                        self._wait(select.POLLIN, self.deadline(since, limit))
                    taken = self._fill(incoming)
                    events |= select.POLLIN
                elif not given and self._listen():
                    events |= select.POLLIN
                moved += given + taken
                heard += taken
                if moved >= _PACE:
                    since, moved, heard = time.monotonic(), 0, 0
                    if taken:
                        self._got = since
                elif not given + taken:
                    deadline = self.deadline(since, limit)
                    if time.monotonic() >= deadline:
                        raise TimeoutError
                    self._wait(events, deadline)
            if incoming is not None:
                self._got = time.monotonic()
        except TimeoutError as error:
            raise self.silent(since, limit, heard) from error
        except OSError as error:
            raise self._lost(error, sending) from error
        finally:
            if sending:
                self._sending.release()
            if reading:
                self._reading.release()

    def _give_first(self, unsent: list[memoryview]) -> int:
        """Send of the first of some pieces as much as possible; returns the number of bytes."""
        given = self._give(unsent[0][:_AT_ONCE])
        unsent[0] = unsent[0][given:]
        if not unsent[0]:
            unsent.pop(0)
        return given

    def _give(self, data: memoryview) -> int:
        """Send as much of `data` as possible without blocking; returns the number of bytes."""
        try:
            with self._lock:
                count = self._socket.send(data)
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return 0
        self._gave = time.monotonic()
        return count

    def _fill(self, incoming: Incoming) -> int:
        """Read as much of a frame as possible without blocking; returns the number of bytes.

        Heartbeats before it, and a part of a header, count as none.
        """
        taken = 0
        if not incoming.begun:
            if not self._arrived():
                return 0
            incoming.begin(HEADER.unpack_from(self._buffer, self._start))
            self._start += HEADER.size
            taken = HEADER.size
        elif self._start == self._stop:
            if incoming.rest.nbytes >= _BUFFER:
                taken = self._take(incoming.rest)
                incoming.advance(taken)
                return taken
            taken = self._refill()
        count = min(incoming.rest.nbytes, self._stop - self._start)
        incoming.rest[:count] = self._buffer[self._start : self._start + count]
        self._start += count
        incoming.advance(count)
        return taken + count

    def _arrived(self) -> bool:
        """Drop the heartbeats that have arrived; returns whether the next frame's header has."""
        self._drop_beats()
        if self._stop - self._start < HEADER.size:
            # Once: a flood of heartbeats must not keep this thread from looking at the clock.
            self._refill()
            self._drop_beats()
        return self._stop - self._start >= HEADER.size

    def _drop_beats(self) -> None:
        while self._stop - self._start >= HEADER.size:
            if HEADER.unpack_from(self._buffer, self._start) != (Kind.ALIVE, self._received, 0):
                return
            self._received = (self._received + 1) & 0xFFFFFFFF
            self._start += HEADER.size
            self._alive = time.monotonic()

    def _listen(self) -> bool:
        """Take heartbeats while sending; returns whether to look for more.

        Another frame is left to whoever receives it next, but an error ends the session.
        """
        if not self._reading.acquire(blocking=False):
            return False  # the thread that receives notes the heartbeats
        try:
            if not self._arrived():
                return True
            if self._buffer[self._start] == Kind.ERROR:
                raise ConnectionAbortedError  # `_lost` reads why
            return False
        finally:
            self._reading.release()

    def _refill(self) -> int:
        """Read more bytes into the buffer, which holds less than a header; returns their number."""
        left = self._buffer[self._start : self._stop].tobytes()
        self._buffer[: len(left)] = left
        self._start, self._stop = 0, len(left)
        count = self._take(self._buffer[len(left) :] if left else self._buffer)
        self._stop += count
        return count

    def _take(self, into: memoryview) -> int:
        try:
            with self._lock:
                count = self._socket.recv_into(into)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0
        if not count:
            raise ConnectionResetError("closed by the peer")
        return count

    def _wait(self, events: int, deadline: float) -> None:
        # Not kept between calls: two threads may wait at once, each for its own direction.
        poll = select.poll()
        descriptor = self.fileno()
        if descriptor < 0:
            raise ConnectionAbortedError  # another thread has closed it
        poll.register(descriptor, events)
        poll.poll(1000 * max(0.0, deadline - time.monotonic()))

    def _lost(self, error: OSError, sending: bool) -> PartyError:
        """The connection broke. If this end was sending, the peer may have said why before."""
        if sending:
            with suppress(OSError, PartyError):
                incoming = Incoming(lambda header: self._accept((), 0, 0, header))
                while not incoming.complete and self._fill(incoming):
                    pass
                if incoming.complete and incoming.kind == Kind.ERROR:
                    return self._told(incoming)
        if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
            # With TLS 1.3 a party learns only here that its certificate was rejected.
            return PartyError(explain(error, self.peer))
        return PeerEndedError(f"the {self.peer} went away; see its error message, and start again")

    @property
    def buffered(self) -> bool:
        """Whether bytes have arrived that polling the socket would not show."""
        if self._start < self._stop:
            return True
        return isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0

    def readable(self, seconds: float, *others: int) -> set[int]:
        """Wait for a frame here or data at other file descriptors; returns those that have some.

        Heartbeats are taken, and count as nothing.
        """
        deadline, mine = time.monotonic() + seconds, self.fileno()
        poll = select.poll()
        for descriptor in (mine, *others):
            poll.register(descriptor, select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            here = self._has_frame()
            found = {d for d, _ in poll.poll(0 if here else 1000 * max(0.0, left))} - {mine}
            if here:
                return found | {mine}
            if found or left <= 0:
                return found

    def _has_frame(self) -> bool:
        try:
            return self._arrived()
        except OSError:
            return True  # whoever receives next finds out what happened

    # --------------------------------------------------------------------------- heartbeats

    def expect(self, seconds: float) -> None:
        """Let the peer's heartbeats extend waits for up to `seconds` from now on.

        Each party calls this when a step begins, with what the step may take at most: a peer that
        sends heartbeats for ever holds nobody up for longer.
        """
        self._until = time.monotonic() + seconds

    def beat(self, quiet: float = 0.0) -> None:
        """Tell the peer that this party is at work, if it sent nothing for `quiet` seconds.

        May be called from any thread. Neither blocks nor raises: a heartbeat that cannot be sent at
        once is not needed, as what is in its way shows the same.
        """
        if time.monotonic() - self._gave < quiet or not self._sending.acquire(blocking=False):
            return
        try:
            if self._unsent:
                return  # an error has ended the session within a frame
            if not self._beats:
                self._beats = self._frame(Kind.ALIVE, NOTHING)
            self._give_first(self._beats)
        except OSError:
            pass  # whoever waits for the peer finds out
        finally:
            self._sending.release()

    def deadline(self, since: float, limit: float) -> float:
        """When the peer, which has been waited for `since` then, has been silent for too long."""
        return max(max(since, self._got) + limit, min(self._alive + limit, self._until))

    def silent(self, since: float, limit: float, heard: int = 0) -> PeerSilentError:
        """The error for a deadline that has passed; `heard`: bytes of a message that arrived."""
        if heard:
            what = f"sent only {heard} bytes in {limit:g} s"
        elif self._alive > since and time.monotonic() < self._alive + limit:
            what = f"says that it is at work, but sent nothing for {time.monotonic() - since:.3g} s"
        else:
            what = f"sent nothing for {limit:g} s"
        return PeerSilentError(f"the {self.peer} {what}; check what it is doing")

    # ---------------------------------------------------------------------------------- end

    def fail(self, reason: str, stopped: bool = False, wait: int = 0) -> None:
        """Send the peer the reason why the session ends here, and close. Takes at most 2 s.

        stopped: whether a person stopped the session, so that nothing has failed. wait: seconds
        after which there may be room for a session, if that is why; otherwise 0.
        """
        self._until = 0.0
        with suppress(OSError, PartyError):
            if self._unsent:
                raise ConnectionAbortedError  # within a frame, nothing else can be sent
            fields: dict[str, Any] = {"reason": reason}
            fields |= {"stopped": True} if stopped else {"wait": wait} if wait else {}
            self._transfer((Kind.ERROR, memoryview(json.dumps(fields).encode())), None, _LINGER)
            self._socket.shutdown(socket.SHUT_WR)
            # Closing with unread data would make the kernel drop what was just sent.
            deadline = time.monotonic() + _LINGER
            while time.monotonic() < deadline:
                if not self._take(self._buffer):
                    self._wait(select.POLLIN, deadline)
        self.close()

    def close(self) -> None:
        """Close the connection; a thread that waits for a frame raises PeerEndedError at once."""
        if self._reading.acquire(blocking=False):
            # What is unread, such as a heartbeat, would make the kernel drop what was just sent.
            try:
                while self._take(self._buffer):
                    pass
            except OSError:
                pass  # it has ended the connection already
            finally:
                self._reading.release()
        else:
            # Closing alone would leave the thread that waits for a frame in its poll. Not the TLS
            # socket's own method, which would let that thread read ciphertext as frames.
            with suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        with suppress(OSError):
            self._socket.close()
