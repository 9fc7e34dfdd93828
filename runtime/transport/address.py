"""Network addresses that roles listen on."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from mergec.runtime.core.errors import PartyError


@dataclass(frozen=True)
class Address:
    """A host, by name or IP address, and a TCP port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Parse `host:port`; an IPv6 host needs brackets. Raises PartyError for other forms."""
        try:
            parts = urlsplit(f"tcp://{text}")
            host, port = parts.hostname, parts.port
        except ValueError:
            host = port = None
        if host is None or port is None or "/" in text:
            raise PartyError(f"the address {text!r} is not of the form host:port")
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
