"""Imports what roles load; imported once, by the process that test roles are forked from."""

from __future__ import annotations

from mergec.runtime.cli.commands import commands as cli  # noqa: F401
from mergec.runtime.roles import (
    client,  # noqa: F401
    dealer,  # noqa: F401
    server,  # noqa: F401
)
from mergec.runtime.roles.service import prepare_to_fork

prepare_to_fork()
