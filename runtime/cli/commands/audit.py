"""`mergec audit`: shows what `mergec.runtime.engine.audit` finds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mergec.runtime.cli.application import app


@app.command("audit")
def audit_command(
    bundle: Annotated[
        Path, typer.Argument(help="Bundle of any role, or the folder of all three bundles.")
    ],
    queries: Annotated[
        int, typer.Option(help="Steps that a client is assumed to ask for.", min=1)
    ] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what each role learns from a program: every message, its mask, and what it tells.

    It runs the program's protocols on shapes, so it needs neither weights nor the other roles.
    """
    from mergec.runtime.core.spec import ROLES
    from mergec.runtime.engine.audit import audit
    from mergec.runtime.program.bundle import check_alike, load_bundle, read_manifest, role_path

    check_alike(bundle)
    inner = [role_path(bundle, role) for role in ROLES if role_path(bundle, role).is_dir()]
    folder = inner[0] if inner else bundle
    found = audit(load_bundle(folder, read_manifest(folder).role), queries)
    sys.stdout.write(found.to_json() + "\n" if as_json else found.to_text())
