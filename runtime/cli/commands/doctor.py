"""`mergec doctor`: shows what `mergec.runtime.cli.doctor` finds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text as RichText

from mergec.runtime.cli.application import app
from mergec.runtime.cli.console import out
from mergec.runtime.cli.options import Certs
from mergec.runtime.core.errors import MergecError


@app.command("doctor")
def doctor_command(
    bundle: Annotated[
        Path | None, typer.Argument(help="Bundle of a role, to be checked as well.")
    ] = None,
    certs: Certs = None,
    listen: Annotated[
        list[str] | None, typer.Option(help="host:port that should be free; may be repeated.")
    ] = None,
) -> None:
    """Check this machine and, if given, a bundle, certificates and ports."""
    from mergec.runtime.cli.doctor import BAD, POOR, examine

    styles = {BAD: "red", POOR: "yellow"}
    bad = 0
    for finding in examine(bundle, certs, tuple(listen or ())):
        line = f"{finding.state:<5} {finding.what}: {finding.said}"
        out.print(RichText(line, style=styles.get(finding.state, "")), soft_wrap=True)
        bad += finding.state == BAD
    if bad:
        raise MergecError(f"{bad} of these checks failed")
