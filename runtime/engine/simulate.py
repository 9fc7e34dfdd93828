"""Runs the three roles of a protocol in one process, for tests and bit-exact simulation.

Messages, shares and bytes are those of a real session; only the separate processes are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mergec.runtime.core.context import ClientContext, Context, DealerContext, ServerContext
from mergec.runtime.core.messages import (
    Message,
    Protocol,
    Swap,
    ToClient,
    ToServer,
    as_reply,
    as_tuple,
)
from mergec.runtime.core.spec import CLIENT, DEALER, SERVER, Cost
from mergec.runtime.core.values import Shared, decode, encode
from mergec.runtime.correlations.prg import Prg, new_seed


class Corrections:
    """The dealer's byte stream to a party, in memory."""

    def __init__(self) -> None:
        self._data: list[np.ndarray] = []
        self.total = 0

    def write(self, data: torch.Tensor) -> None:
        self.total += data.numel()
        self._data.append(data.numpy().copy())

    def read(self, nbytes: int) -> torch.Tensor:
        parts = []
        while nbytes:
            head = self._data[0]
            parts.append(head[:nbytes])
            if len(head) > nbytes:
                self._data[0] = head[nbytes:]
            else:
                self._data.pop(0)
            nbytes -= len(parts[-1])
        joined = np.concatenate(parts) if parts else np.empty(0, np.uint8)
        return torch.from_numpy(joined)


@dataclass
class Simulation:
    """A session of three contexts in one process."""

    fixed: int = 16
    exact: bool = False
    to_client: Corrections = field(default_factory=Corrections)
    to_server: Corrections = field(default_factory=Corrections)
    cost: Cost = field(default_factory=Cost)
    transcript: list[torch.Tensor] = field(default_factory=list)
    """Every payload that a party received, in order; filled only if `record` is set."""
    record: bool = False

    def __post_init__(self) -> None:
        client, server = new_seed(), new_seed()
        options: dict[str, Any] = {"fixed": self.fixed, "exact": self.exact}
        self.contexts: tuple[Context, Context, Context] = (
            ClientContext(client, self.to_client, **options),
            ServerContext(server, self.to_server, **options),
            DealerContext(client, server, self.to_client, self.to_server, **options),
        )
        self._prg = Prg(new_seed())

    @property
    def dealt(self) -> int:
        """Bytes that the dealer has sent to both parties so far."""
        return self.to_client.total + self.to_server.total

    def share(self, value: torch.Tensor, frac: int | None = None) -> list[Shared]:
        """Share real numbers, or integers with frac=0; return the views of the three roles."""
        bits = self.fixed if frac is None else frac
        words = encode(value, bits)
        mask = torch.from_numpy(self._prg.read(8 * words.numel())).view(torch.int64)
        mask = mask.reshape(words.shape)
        return [Shared(mask, bits), Shared(words - mask, bits), Shared(words.to("meta"), bits)]

    def run(self, build: Callable[[Context, int], Protocol]) -> list[Any]:
        """Run `build(ctx, party)` at the three roles in lockstep; return the three results.

        Raises RuntimeError if the roles disagree on the number of rounds or on a message.
        """
        before = self.dealt
        protocols = [build(self.contexts[party], party) for party in (CLIENT, SERVER, DEALER)]
        results: list[Any] = [None] * 3
        replies: list[Any] = [None] * 3
        rounds = online = 0
        while True:
            waiting: list[Any] = [None] * 3
            for party in (DEALER, CLIENT, SERVER):
                try:
                    waiting[party] = protocols[party].send(replies[party])
                except StopIteration as stop:
                    results[party] = stop.value
            client, server, dealer = waiting[CLIENT], waiting[SERVER], waiting[DEALER]
            if client is None or server is None or dealer is None:
                if (client, server, dealer) != (None, None, None):
                    raise RuntimeError("the three roles do not run the same number of rounds")
                break
            rounds += 1
            received, sent = self._deliver(as_tuple(client), as_tuple(server))
            online += sent
            ghosts = [_as_meta(message.payload) for message in as_tuple(dealer)]
            replies = [
                as_reply(yielded, reply)
                for yielded, reply in zip(waiting, (*received, ghosts), strict=True)
            ]
        self.cost += Cost(rounds, online, self.dealt - before)
        return results

    def _deliver(
        self, client: Sequence[Message], server: Sequence[Message]
    ) -> tuple[tuple[list[Any], list[Any]], int]:
        to_client: list[Any] = []
        to_server: list[Any] = []
        sent = 0
        for mine, theirs in zip(client, server, strict=True):
            if type(mine) is not type(theirs) or mine.payload.shape != theirs.payload.shape:
                raise RuntimeError("the two parties disagree on a message")
            size = mine.payload.numel() * mine.payload.element_size()
            if isinstance(mine, (Swap, ToServer)):
                sent += size
            if isinstance(mine, (Swap, ToClient)):
                sent += size
            to_server.append(mine.payload if not isinstance(mine, ToClient) else None)
            to_client.append(theirs.payload if not isinstance(mine, ToServer) else None)
        if self.record:
            self.transcript += [t.clone() for t in to_client + to_server if t is not None]
        return (to_client, to_server), sent

    def reveal(self, views: Sequence[Shared]) -> torch.Tensor:
        """Decode the sum of the client's and the server's share."""
        return decode(views[CLIENT].share + views[SERVER].share, views[CLIENT].frac)


def _as_meta(payload: torch.Tensor) -> torch.Tensor:
    return torch.empty(payload.shape, dtype=payload.dtype, device="meta")
