"""What every role of a test loads; imported once, by the process that roles are forked from."""

from __future__ import annotations

from runtime import cli, client, dealer, server  # noqa: F401
from runtime.service import prepare_to_fork

prepare_to_fork()
