"""`mergec datastore`: texts that drafts are made from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergec.runtime.cli.application import app
from mergec.runtime.cli.console import out

datastore = typer.Typer(
    help="Build a datastore of texts that `--speculate retrieve:DIR` drafts from.",
    rich_markup_mode=None,
)
app.add_typer(datastore, name="datastore")


@datastore.callback()
def _datastore() -> None:
    """Build a datastore of texts that `--speculate retrieve:DIR` drafts from."""


@datastore.command("build")
def build_command(
    files: Annotated[
        list[Path],
        typer.Argument(help="Text files; of a .jsonl file, the `text` of each line."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the datastore.")],
    bundle: Annotated[
        Path,
        typer.Option(
            help="The program to draft for: the client's bundle, or the folder of all three; or "
            "its tokenizer."
        ),
    ],
) -> None:
    """Build a datastore from text files. It stays with the client, and is never sent."""
    from mergec.runtime.program.bundle import TOKENIZER
    from mergec.runtime.session.drafting.datastore import Datastore, read_texts
    from mergec.runtime.session.text import Text

    inner = [bundle / "client" / TOKENIZER, bundle / TOKENIZER]
    text = Text.given(next((place for place in inner if place.is_dir()), bundle))
    tokens = [text.encode(content) for content in read_texts(files)]
    made = Datastore.of(tokens, text.vocabulary_hash)
    made.save(output)
    out.print(f"{output}: {made.size:,} tokens of {len(tokens):,} texts", soft_wrap=True)
