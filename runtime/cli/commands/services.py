"""`mergec serve` and `mergec deal`: the roles that serve sessions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergec.runtime.cli.application import app
from mergec.runtime.cli.exits import INTERRUPTED
from mergec.runtime.cli.options import (
    DEALER_ADDRESS,
    SERVER_ADDRESS,
    DealerAt,
    Device,
    DeviceOption,
    PrepareDisk,
    ServiceOptions,
    address,
    grouped,
    size_of,
)
from mergec.runtime.core.errors import MergecError
from mergec.runtime.roles.rate_limit import DEFAULT_RATE
from mergec.runtime.session.conversations import MOST_CONVERSATIONS


@app.command("serve")
@grouped
def serve_command(
    service: ServiceOptions,
    listen: Annotated[str, typer.Option(help="host:port to listen at.")] = SERVER_ADDRESS,
    dealer: DealerAt = DEALER_ADDRESS,
    sessions: Annotated[int, typer.Option(help="Maximum number of sessions at once.", min=1)] = 4,
    client_sessions: Annotated[
        int, typer.Option(help="Maximum number of sessions at once per client.", min=1)
    ] = 2,
    queue: Annotated[
        int, typer.Option(help="Maximum number of clients that wait for a session.", min=0)
    ] = 16,
    length: Annotated[
        int, typer.Option(help="Maximum tokens of prompt and answer together; 0: any.", min=0)
    ] = 0,
    tokens: Annotated[int, typer.Option(help="Maximum tokens of an answer; 0: any.", min=0)] = 0,
    rate: Annotated[
        int, typer.Option(help="Maximum tokens per client and minute; 0: any.", min=0)
    ] = DEFAULT_RATE,
    conversations: Annotated[
        int,
        typer.Option(
            help="Maximum number of conversations whose caches a session keeps.",
            min=1,
            max=MOST_CONVERSATIONS,
        ),
    ] = 4,
    device: DeviceOption = Device.cpu,
    stores: Annotated[
        Path | None,
        typer.Option(help="Folder for randomness that clients have precomputed with `prepare`."),
    ] = None,
    store_key: Annotated[
        Path | None,
        typer.Option(
            help="File with the key of the stores, and of the static masks under which clients "
            "may keep masked weights; MERGEC_STORE_KEY holds it for stores only."
        ),
    ] = None,
    store_bytes: Annotated[
        int, typer.Option(help="Maximum size of one store in bytes.", min=1)
    ] = 16 << 30,
    public_prompt: Annotated[
        list[Path] | None,
        typer.Option(
            help="File of public text that clients may begin their prompts with; may be repeated. "
            "Text, or a list of token numbers."
        ),
    ] = None,
    public_block: Annotated[
        list[Path] | None,
        typer.Option(
            help="File of a public block, such as an example, that clients may combine with others "
            "behind a public text; may be repeated. Text, or a list of token numbers."
        ),
    ] = None,
    prepare_disk: PrepareDisk = "0",
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="The model's tokenizer, to read public text with; by default that of a client's "
            "bundle in the same folder."
        ),
    ] = None,
) -> None:
    """Serve a model to clients until SIGTERM."""
    from mergec.runtime.roles.server import serve
    from mergec.runtime.roles.settings import Limits, ServerSettings
    from mergec.runtime.session.stores.format import read_key

    interrupted = serve(
        ServerSettings(
            bundle=service.folder("server"),
            listen=address(listen),
            security=service.security("server"),
            dealer=address(dealer) if dealer else None,
            limits=Limits(
                *(sessions, client_sessions, queue, length, tokens, rate, conversations),
                size_of(prepare_disk),
            ),
            device=device.value,
            timeout=service.timeout,
            idle_timeout=service.idle_timeout,
            grace=service.grace,
            metrics=address(service.metrics) if service.metrics else None,
            threads=service.threads,
            ranks=service.ranks,
            stores=stores,
            store_key=read_key(store_key) if stores or store_key else b"",
            store_bytes=store_bytes,
            public=tuple(public_prompt or ()),
            blocks=tuple(public_block or ()),
            tokenizer=tokenizer,
        )
    )
    if interrupted:
        raise typer.Exit(INTERRUPTED)


@app.command("deal")
@grouped
def deal_command(
    service: ServiceOptions,
    listen: Annotated[str, typer.Option(help="host:port to listen at.")] = DEALER_ADDRESS,
    sessions: Annotated[
        int, typer.Option(help="Maximum number of sessions at once, of all servers.", min=1)
    ] = 16,
    device: DeviceOption = Device.cpu,
    expand_masks: Annotated[
        bool,
        typer.Option(
            "--expand-masks",
            help="Expand the static masks of weights whenever they are used instead of keeping "
            "them: 8 bytes less memory per weight and session, and slower steps.",
        ),
    ] = False,
) -> None:
    """Deal correlated randomness to sessions until SIGTERM."""
    from mergec.runtime.roles.dealer import deal
    from mergec.runtime.roles.settings import DealerSettings

    if expand_masks and service.ranks > 1:
        raise MergecError(
            "--expand-masks keeps no masks that ranks could share; give one of it and --ranks"
        )
    interrupted = deal(
        DealerSettings(
            bundle=service.folder("dealer"),
            expand_masks=expand_masks,
            listen=address(listen),
            security=service.security("dealer"),
            sessions=sessions,
            device=device.value,
            timeout=service.timeout,
            idle_timeout=service.idle_timeout,
            grace=service.grace,
            metrics=address(service.metrics) if service.metrics else None,
            threads=service.threads,
            ranks=service.ranks,
        )
    )
    if interrupted:
        raise typer.Exit(INTERRUPTED)
