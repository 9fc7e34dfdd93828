"""`mergec certs`: an authority, and the certificates that roles know each other by."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mergec.runtime.cli.application import app
from mergec.runtime.cli.console import err, out

_CREATE = "create"


class _Group(TyperGroup):
    """`mergec certs FOLDER` is short for `mergec certs create FOLDER`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:
            args = ["--help"]
        elif args[0] not in self.commands and args[0] != "--help":
            args = [_CREATE, *args]
        return super().parse_args(ctx, args)


certs = typer.Typer(
    cls=_Group,
    help="Create certificates, or a request for one; sign requests, and revoke certificates.",
    rich_markup_mode=None,
)
app.add_typer(certs, name="certs")

Days = Annotated[int, typer.Option(help="Days that certificates are valid.", min=1, max=3650)]
Authority = Annotated[Path, typer.Argument(help="Folder of the authority.")]
RoleName = Annotated[str, typer.Option("--role", help="client, server or dealer.")]
ClientName = Annotated[
    str, typer.Option("--name", help="Name of the client; only clients have one.")
]


@certs.command(_CREATE)
def create_command(
    folder: Annotated[Path, typer.Argument(help="Folder to write the certificates to.")],
    client: Annotated[
        list[str] | None, typer.Option(help="Name of a client; may be repeated.")
    ] = None,
    days: Days = 365,
) -> None:
    """Create an authority, and keys and certificates for every role, in one place.

    `mergec certs FOLDER` is short for this. It is for trying things out: whoever runs it has every
    key. Use `request` and `sign` where the roles belong to different people.
    """
    from mergec.runtime.transport.authority import AUTHORITY_KEY, FIRST_CLIENT, make_certificates

    made = make_certificates(folder, tuple(client or (FIRST_CLIENT,)), days)
    for place in made:
        out.print(str(place), soft_wrap=True)
    secret = folder / AUTHORITY_KEY
    err.print(f"give each role its own folder only; keep {secret} secret", soft_wrap=True)


@certs.command("authority")
def authority_command(folder: Authority, days: Days = 3650) -> None:
    """Create an authority alone, to sign requests with."""
    from mergec.runtime.transport.authority import AUTHORITY_KEY, make_authority

    out.print(str(make_authority(folder, days)), soft_wrap=True)
    err.print(
        f"keep {folder / AUTHORITY_KEY} secret, on none of the roles' machines", soft_wrap=True
    )


@certs.command("request")
def request_command(
    folder: Annotated[Path, typer.Argument(help="Folder of this party's key and certificate.")],
    role: RoleName,
    name: ClientName = "",
) -> None:
    """Create a key on the machine that uses it, and a request for a certificate for this key."""
    from mergec.runtime.transport.authority import make_request

    request, key = make_request(folder, role, name)
    out.print(f"{request}: key {key}", soft_wrap=True)
    err.print(
        f"have the authority sign the request, and put what it gives you into {folder}",
        soft_wrap=True,
    )


@certs.command("sign")
def sign_command(
    folder: Authority,
    request: Annotated[Path, typer.Argument(help="File that `mergec certs request` made.")],
    role: RoleName,
    name: ClientName = "",
    days: Days = 365,
) -> None:
    """Sign a request, if it asks for this role and name."""
    from mergec.runtime.transport.authority import sign_request

    place, key = sign_request(folder, request, role, name, days)
    out.print(f"{place}: key {key}", soft_wrap=True)
    err.print(
        f"ask the sender whether its key has this fingerprint, and send it the files in {place}",
        soft_wrap=True,
    )


@certs.command("revoke")
def revoke_command(
    folder: Authority,
    names: Annotated[list[str], typer.Argument(help="Names of clients or roles, or files.")],
) -> None:
    """Revoke certificates, and write the list that roles check."""
    from mergec.runtime.transport.authority import revoke

    listed = revoke(folder, names)
    out.print(str(listed), soft_wrap=True)
    err.print(
        "give this file to every role, as revoked.pem in its folder of certificates or with "
        "--revoked; it counts from the next handshake on",
        soft_wrap=True,
    )


@certs.command("show")
def show_command(
    folder: Annotated[Path, typer.Argument(help="A role's folder, or a certificate.")],
) -> None:
    """Print a certificate's role and name, its end, and the fingerprint of its key."""
    from mergec.runtime.transport.certificates import (
        CERTIFICATE,
        fingerprint,
        name_of,
        read_certificate,
        role_of,
    )

    found = read_certificate(folder / CERTIFICATE if folder.is_dir() else folder)
    out.print(
        f"{role_of(found) or 'no role'} {name_of(found)}, until "
        f"{found.not_valid_after_utc:%Y-%m-%d}: key {fingerprint(found.public_key())}",
        soft_wrap=True,
    )
