"""Imports what roles load; imported once, by the process that test roles are forked from."""

from __future__ import annotations

from mergec.runtime import cli  # noqa: F401
from mergec.runtime.roles import (
    client,  # noqa: F401
    dealer,  # noqa: F401
    server,  # noqa: F401
)
from mergec.runtime.roles.fork import prepare_to_fork

prepare_to_fork()
