"""The application that every command registers with."""

from __future__ import annotations

from typing import Annotated

import typer

from mergec.runtime.cli.console import out
from mergec.runtime.core.version import VERSION

app = typer.Typer(
    name="mergec",
    help="Compile a decoder into a program that a client and a server run together.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        out.print(f"mergec {VERSION}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit
