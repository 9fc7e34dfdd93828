"""The command line, where `typer utils docs` looks for it: typer executes this file by its path."""

from mergec.compiler.cli import app

__all__ = ["app"]
