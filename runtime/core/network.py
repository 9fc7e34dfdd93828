"""Network profiles: the time that a round and a byte between the parties cost."""

from __future__ import annotations

from dataclasses import dataclass

from mergec.runtime.core.spec import Cost

MAKING = 5e8
"""Bytes of correlated randomness that a dealer generates per second, ahead of the steps."""


@dataclass(frozen=True)
class Network:
    """A network between the two parties.

    latency: seconds, one way. bandwidth: bytes per second, each way. overhead: seconds that the
    parties' own machines spend on a round, on any network.
    """

    latency: float
    bandwidth: float
    overhead: float = 5e-5

    def seconds(self, cost: Cost) -> float:
        """Estimated network time in seconds, without the parties' computation.

        A round takes the latency plus the overhead. Online bytes are summed over both directions,
        which transfer at the same time, so half of them are divided by the bandwidth.
        """
        return cost.rounds * (self.latency + self.overhead) + cost.online / 2 / self.bandwidth

    def weight(self, cost: Cost) -> float:
        """Seconds used to compare protocols: network time plus the dealer's work."""
        return self.seconds(cost) + cost.offline / MAKING


NETWORKS = {
    "loopback": Network(latency=0.0, bandwidth=2e9),
    "lan": Network(latency=2.5e-4, bandwidth=1.25e8),
    "wan": Network(latency=2e-2, bandwidth=1.25e7),
}
"""loopback: two processes of one machine. lan: 1 Gbit/s, 0.25 ms one way. wan: 100 Mbit/s, 20 ms.
"""
