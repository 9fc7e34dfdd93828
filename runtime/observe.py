"""What a running role tells about itself: log lines as JSON, and metrics for Prometheus.

Neither holds a secret: logs name sessions, peers and lengths, never tokens, weights or shares.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO, cast

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from runtime.errors import PartyError
from runtime.transport.address import Address

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


class _ErrorOutput:
    """Where the log goes. A disk that is full, and so cannot take it, must not end sessions."""

    def write(self, text: str) -> None:
        with suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()


def open_log(role: str) -> Any:
    """A logger that writes one JSON object a line to the error output."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(cast("TextIO", _ErrorOutput())),
        cache_logger_on_first_use=False,
    )
    return structlog.get_logger(role=role)


class Metrics:
    """The counters of a server or a dealer; its workers' reports are added up here."""

    def __init__(self, role: str) -> None:
        self.registry = CollectorRegistry()
        labels: dict[str, Any] = {
            "registry": self.registry,
            "namespace": "mergec",
            "subsystem": role,
        }
        self.running = Gauge("sessions", "Sessions under way.", **labels)
        self.waiting = Gauge("queue", "Clients that wait for a session.", **labels)
        self.ended = Counter("sessions_ended", "Sessions, by how they ended.", ["how"], **labels)
        self.tokens = Counter("tokens", "Tokens that steps took.", ["phase"], **labels)
        self.bytes = Counter("bytes", "Payload bytes.", ["kind"], **labels)
        self.rounds = Counter("rounds", "Rounds between client and server.", **labels)
        self.seconds = Histogram(
            "step_seconds", "Seconds of a step.", ["phase"], buckets=_SECONDS, **labels
        )
        self.stored = Gauge("stored_answers", "Answers that randomness is stored for.", **labels)

    def step(self, report: Mapping[str, Any]) -> None:
        """Count a step, from the fields of a StepReport."""
        phase = report["phase"]
        self.tokens.labels(phase).inc(report["new"])
        self.bytes.labels("sent").inc(report["sent"])
        self.bytes.labels("received").inc(report["received"])
        self.bytes.labels("offline").inc(report["offline_bytes"])
        self.rounds.inc(report["rounds"])
        self.seconds.labels(phase).observe(report["seconds"])

    def serve(self, address: Address) -> None:
        """Answer Prometheus at an address, from a thread."""
        try:
            start_http_server(address.port, address.host, self.registry)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise PartyError(
                f"cannot listen at {address} ({reason}); choose another --metrics"
            ) from error
