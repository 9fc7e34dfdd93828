"""Where a role listens."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from runtime.errors import PartyError


@dataclass(frozen=True)
class Address:
    """A host, by name or number, and a TCP port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """From `host:port`; an IPv6 host stands in brackets."""
        found = cls._split(f"tcp://{text}")
        if found is None or "/" in text:
            raise PartyError(f"the address {text!r} is not of the form host:port")
        return found

    @classmethod
    def rendezvous(cls, text: str) -> Address:
        """From `tcp://host:port`."""
        found = cls._split(text)
        if found is None:
            raise PartyError(f"the rendezvous {text!r} is not of the form tcp://127.0.0.1:29500")
        return found

    @classmethod
    def _split(cls, text: str) -> Address | None:
        try:
            parts = urlsplit(text)
            host, port = parts.hostname, parts.port
        except ValueError:
            return None
        if host is None or port is None or parts.scheme != "tcp":
            return None
        return cls(host, port)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False
