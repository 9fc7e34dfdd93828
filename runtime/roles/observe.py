"""Logs as JSON and metrics for Prometheus, by which a running role is observed.

Neither contains a secret: logs name sessions, peers and lengths, never tokens, weights or shares.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, cast

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector

from mergec.runtime.core.errors import PartyError
from mergec.runtime.session.stores.folder import left_below
from mergec.runtime.transport.address import Address

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


class _ErrorOutput:
    """The log's output. Failing writes are ignored: a full disk must not end sessions."""

    def write(self, text: str) -> None:
        with suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()


def open_log(role: str) -> Any:
    """A logger that writes one JSON object per line to the error output."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        # A line is one write: sessions' processes share the output, and their lines must not mix.
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", _ErrorOutput())),
        cache_logger_on_first_use=False,
    )
    return structlog.get_logger(role=role)


class Metrics:
    """Metrics of a role: those of its steps, and gauges and counters that it adds."""

    def __init__(self, role: str) -> None:
        self.registry = CollectorRegistry()
        self._prefix = f"mergec_{role}"
        self._labels: dict[str, Any] = {
            "registry": self.registry,
            "namespace": "mergec",
            "subsystem": role,
        }
        self._tokens = self.counter("tokens", "Tokens that steps processed.", "phase")
        self._bytes = self.counter("bytes", "Payload bytes.", "kind")
        self._seconds = Histogram(
            "step_seconds", "Seconds of a step.", ["phase"], buckets=_SECONDS, **self._labels
        )

    def gauge(self, name: str, told: str) -> Gauge:
        """A gauge of this role."""
        return Gauge(name, told, **self._labels)

    def counter(self, name: str, told: str, *label: str) -> Counter:
        """A counter of this role."""
        return Counter(name, told, label, **self._labels)

    def step(self, report: Mapping[str, Any]) -> None:
        """Count a step, from the fields of a StepReport."""
        self._tokens.labels(report["phase"]).inc(report["new"])
        self._bytes.labels("offline").inc(report["offline_bytes"])
        self._seconds.labels(report["phase"]).observe(report["seconds"])

    def serve(self, address: Address, log: Any) -> None:
        """Serve Prometheus from a thread; logs the address, with the port that 0 chose."""
        try:
            server, _ = start_http_server(address.port, address.host, self.registry)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise PartyError(
                f"cannot listen at {address} ({reason}); choose another --metrics"
            ) from error
        served = str(Address(address.host, server.server_port))
        if not address.loopback:
            reason = "whoever reaches it reads names of clients, lengths and times"
            log.warning("exposed without encryption", address=served, reason=reason)
        log.info("serving metrics", address=served)


class PartyMetrics(Metrics):
    """Metrics of the client or the server, which also have rounds and may have stores."""

    def __init__(self, role: str) -> None:
        super().__init__(role)
        self._rounds = self.counter("rounds", "Rounds between client and server.")

    def step(self, report: Mapping[str, Any]) -> None:
        super().step(report)
        self._bytes.labels("sent").inc(report["sent"])
        self._bytes.labels("received").inc(report["received"])
        self._rounds.inc(report["rounds"])

    def watch(self, stores: Path) -> None:
        """Report what remains in a folder of stores, read from disk at each request."""
        self.registry.register(_Stores(self._prefix, stores))


class _Stores(Collector):
    """Numbers of answers and tokens that randomness is stored for."""

    def __init__(self, prefix: str, root: Path) -> None:
        self._prefix, self._root = prefix, root

    def collect(self) -> Iterable[GaugeMetricFamily]:
        families = [
            GaugeMetricFamily(
                f"{self._prefix}_stored_{what}",
                f"{what.capitalize()} that randomness is stored for.",
                labels=["client"],
            )
            for what in ("answers", "tokens")
        ]
        for client, left in left_below(self._root).items():
            for family, count in zip(families, left, strict=True):
                family.add_metric([client], count)
        return families
