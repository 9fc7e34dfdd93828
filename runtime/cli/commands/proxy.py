"""`mergec proxy`: the client as an endpoint for programs on its machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mergec.runtime.cli.application import app
from mergec.runtime.cli.console import err
from mergec.runtime.cli.options import (
    AheadOptions,
    Grace,
    MetricsAt,
    PublicBlocks,
    SessionOptions,
    SpeculationOptions,
    address,
    grouped,
    read_blocks,
)
from mergec.runtime.core.errors import MergecError


@app.command("proxy")
@grouped
def proxy_command(
    options: SessionOptions,
    drafting: SpeculationOptions,
    ahead: AheadOptions,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen at; 0 chooses a free one.", min=0, max=65535)
    ] = 8000,
    expose: Annotated[
        bool, typer.Option("--expose", help="Answer requests from other machines, too.")
    ] = False,
    origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin of a web page elsewhere that may send requests: https://host."),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with a key that requests must show; by default MERGEC_API_KEY holds it, if "
            "any."
        ),
    ] = None,
    sessions: Annotated[int, typer.Option(help="Number of sessions with the server.", min=1)] = 1,
    queue: Annotated[int, typer.Option(help="Maximum number of waiting requests.", min=0)] = 16,
    grace: Grace = 5.0,
    metrics: MetricsAt = None,
    public_block: PublicBlocks = None,
) -> None:
    """Offer OpenAI's API and a chat page on this machine."""
    if options.store is not None and sessions > 1:
        raise MergecError("a store serves one session at a time; leave out --sessions")
    from mergec.runtime.proxy.key import read_api_key
    from mergec.runtime.proxy.serve import ProxySettings, proxy
    from mergec.runtime.transport.address import Address

    public, plan = options.public(), ahead.plan(drafting)
    blocks = read_blocks(public_block)
    proxy(
        lambda: options.connection(public, ahead=plan, blocks=blocks),
        ProxySettings(
            listen=Address(host, port),
            exposed=expose,
            origins=tuple(origin or ()),
            sessions=sessions,
            queue=queue,
            grace=grace,
            metrics=address(metrics) if metrics else None,
            stores=options.store,
            key=read_api_key(api_key_file),
            **asdict(drafting),
        ),
        lambda url: err.print(f"chat page: {url}; OpenAI API for apps: {url}/v1", soft_wrap=True),
    )
