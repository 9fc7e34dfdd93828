"""The application that every command registers with."""

from __future__ import annotations

from typing import Annotated

import typer

from mergec.runtime.cli.console import out
from mergec.runtime.core.version import VERSION

app = typer.Typer(
    name="mergec",
    help="Compile a decoder into a program that a client and a server run together.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        out.print(f"mergec {VERSION}")
        raise typer.Exit
