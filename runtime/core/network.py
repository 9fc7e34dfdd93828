"""Network profiles: the time that rounds and bytes cost on the links between the three roles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mergec.runtime.core.spec import Cost

MAKING = {"client": 1.1e8, "server": 5e8}
"""Bytes of correlated randomness per second of the three roles' work for them, by who receives
them. What the client is sent are keys, which all roles expand; most of what only the server is sent
are words minus a stream of the client's."""


_FAR_LATENCY = 5e-3


@dataclass(frozen=True)
class Link:
    """A link between two roles. latency: seconds, one way. bandwidth: bytes per second each way."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Waiting:
    """Seconds that a step waits for a network, without anybody's computation.

    latencies: of the messages between the parties, with what their machines spend on these. online:
    transfer of their bytes. to_client, to_server: transfer of the dealer's bytes.
    """

    latencies: float
    online: float
    to_client: float
    to_server: float

    @property
    def total(self) -> float:
        """Seconds of the step; the dealer's bytes arrive while the parties exchange messages."""
        return max(self.prepared, self.to_client, self.to_server)

    @property
    def prepared(self) -> float:
        """The same if everything of the dealer's arrived before the step."""
        return self.latencies + self.online


@dataclass(frozen=True)
class Network:
    """The three links between client, server and dealer.

    parties: between client and server. to_client, to_server: from the dealer. overhead: seconds
    that the parties' own machines spend on a round, on any network.
    """

    parties: Link
    to_client: Link
    to_server: Link
    overhead: float = 5e-5

    @property
    def far(self) -> bool:
        """Whether a message between the parties takes longer than the work of a few ops."""
        return self.parties.latency >= _FAR_LATENCY

    def waiting(
        self,
        cost: Cost,
        dealt: Mapping[str, int],
        latencies: int | None = None,
        transfer: float | None = None,
    ) -> Waiting:
        """Estimated seconds of a step, or of a call. dealt: bytes that the dealer sends, by role.

        latencies, transfer: one-way latencies, and seconds for the bytes between the parties, where
        all messages of a step are known (`engine.rehearsal.StepCost`). Without these each round
        takes a latency, and both directions carry half of the bytes at the same time.
        """
        if latencies is None:
            latencies = cost.rounds
        if transfer is None:
            transfer = cost.online / 2 / self.parties.bandwidth
        return Waiting(
            latencies * self.parties.latency + cost.rounds * self.overhead,
            transfer,
            self.to_client.latency + dealt["client"] / self.to_client.bandwidth,
            self.to_server.latency + dealt["server"] / self.to_server.bandwidth,
        )

    @staticmethod
    def making(dealt: Mapping[str, int]) -> float:
        """Seconds of the roles' work for dealt bytes, by role."""
        return sum(dealt[role] / rate for role, rate in MAKING.items())

    def weight(self, cost: Cost, dealt: Mapping[str, int], *, waits: bool = True) -> float:
        """Seconds used to compare protocols: rounds, bytes of all links, and work for dealt bytes.

        Single calls are compared, so each round counts a latency (`waiting`). waits: whether a step
        waits for the dealer's bytes; if not, only the work for them counts.
        """
        seconds = self.waiting(cost, dealt).prepared + self.making(dealt)
        if waits:
            seconds += dealt["client"] / self.to_client.bandwidth
            seconds += dealt["server"] / self.to_server.bandwidth
        return seconds


_SAME_MACHINE = Link(0.0, math.inf)
"""What moving the dealer's bytes costs there is part of `MAKING`."""

_LAN = Link(2.5e-4, 1.25e8)
_FAR = Link(2e-2, 1.25e7)
_REGION = Link(5e-4, 1.25e9)

NETWORKS = {
    "loopback": Network(Link(0.0, 2e9), _SAME_MACHINE, _SAME_MACHINE),
    "lan": Network(_LAN, _LAN, _LAN),
    "wan": Network(_FAR, _FAR, _REGION),
    "wan3": Network(_FAR, _FAR, _FAR),
}
"""loopback: processes of one machine. lan: 1 Gbit/s, 0.25 ms one way. wan: a client far away, over
100 Mbit/s and 20 ms, and a dealer in the server's region, over 10 Gbit/s and 0.5 ms. wan3: three
roles far from each other, over 100 Mbit/s and 20 ms.
"""
