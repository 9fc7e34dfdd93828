"""`mergec certs`: an authority, and the certificates that roles know each other by."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergec.runtime.cli.application import app
from mergec.runtime.cli.console import err, out


@app.command("certs")
def certs_command(
    folder: Annotated[Path, typer.Argument(help="Folder to write the certificates to.")],
    client: Annotated[
        list[str] | None, typer.Option(help="Name of a client; may be repeated.")
    ] = None,
    days: Annotated[
        int, typer.Option(help="Days that the certificates are valid.", min=1, max=3650)
    ] = 365,
) -> None:
    """Create a certificate authority, and certificates for every role."""
    from mergec.runtime.transport.certificates import AUTHORITY_KEY, make_certificates

    made = make_certificates(folder, tuple(client or ("client",)), days)
    for place in made:
        out.print(str(place), soft_wrap=True)
    secret = folder / AUTHORITY_KEY
    err.print(f"give each role its own folder only; keep {secret} secret", soft_wrap=True)
