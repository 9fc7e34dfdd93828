"""`mergec prepare`, `generate` and `chat`: a client at the terminal."""

from __future__ import annotations

import signal
import sys
from dataclasses import asdict
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text as RichText

from mergec.runtime.cli.application import app
from mergec.runtime.cli.console import err, out, waiting, write
from mergec.runtime.cli.options import (
    AheadOptions,
    Chat,
    ClientOptions,
    FixedLength,
    MaxTokens,
    Prompt,
    PublicBlocks,
    SamplingOptions,
    SessionOptions,
    SpeculationOptions,
    StoreKey,
    grouped,
    read_blocks,
)
from mergec.runtime.core.errors import MergecError, PromptError

if TYPE_CHECKING:
    from mergec.runtime.roles.client import Connection


@app.command("prepare")
@grouped
def prepare_command(
    options: ClientOptions,
    store: Annotated[Path, typer.Option("--store", help="Folder for the stores of this party.")],
    tokens: Annotated[int, typer.Option(help="Tokens to prepare for, over all answers.", min=1)],
    answer: Annotated[int, typer.Option(help="Tokens per answer.", min=1)] = 64,
    prompt: Annotated[
        int, typer.Option(help="Tokens of the prompt that the first step takes.", min=1)
    ] = 16,
    store_key: StoreKey = None,
    speculate_fixed: Annotated[
        float | None,
        typer.Option(
            metavar="N", help="Prepare for --speculate, with N tokens of each step kept.", min=1.0
        ),
    ] = None,
    speculate_tokens: Annotated[
        int | None,
        typer.Option(help="Drafted tokens of such a step; by default as many as fit.", min=1),
    ] = None,
) -> None:
    """Precompute and store randomness, so that later answers need no dealer.

    A stored answer needs a prompt of at least --prompt tokens. The first step takes that many; each
    further token of the prompt takes a step of its own, and one token off --answer. With
    --speculate-fixed, further steps take several tokens, of the prompt or drafted. The source of an
    encoder-decoder has exactly --prompt tokens.
    """
    from mergec.runtime.session.drafting.speculation import steady
    from mergec.runtime.session.requests import Plan
    from mergec.runtime.session.stores.format import read_key

    key, connection = read_key(store_key), options.connection()
    if speculate_tokens is not None and speculate_fixed is None:
        raise MergecError("--speculate-tokens needs --speculate-fixed")
    paced = steady(connection.program.manifest, speculate_tokens, speculate_fixed)
    lengths = (paced.drafts, paced.pace) if paced is not None else (0, 0)
    plan = Plan(-(-tokens // answer), prompt, answer, *lengths)
    with err.status("precomputing") as status:
        place, size = connection.prepare(
            plan,
            store,
            key,
            lambda done, size: status.update(
                f"{done} of {plan.answers} answers, {size / 1e6:.0f} MB"
            ),
        )
    out.print(
        f"{place}: {plan.answers} answers of {answer} tokens; {size / 1e6:.1f} MB at both parties "
        f"together, {size / plan.answers / answer / 1e6:.3f} MB per token",
        soft_wrap=True,
    )


@app.command("generate")
@grouped
def generate_command(
    prompt: Prompt,
    options: SessionOptions,
    choice: SamplingOptions,
    drafting: SpeculationOptions,
    ids: Annotated[
        bool, typer.Option("--ids", help="The prompt is a list of token numbers.")
    ] = False,
    max_tokens: MaxTokens = 32,
    chat: Chat = None,
    fixed_length: FixedLength = False,
    public_block: PublicBlocks = None,
) -> None:
    """Send one prompt to a server and stream the answer."""
    text, public = sys.stdin.read() if prompt == "-" else prompt, options.public()
    blocks: list[Any] = read_blocks(public_block)
    known: Any = public
    if ids:
        blocks = [_numbers(block) for block in blocks]
        known = _numbers(public) if public is not None else None
    connection = options.connection(known, chat, blocks=blocks)
    if ids:
        asked = [*(known or ()), *chain(*blocks), *_numbers(text)]
    else:
        asked = connection.encode(text, chat, public)
    connection.speculation(**asdict(drafting))
    with connection:
        templated = connection.text is not None and connection.text.has_chat
        alone = (templated if chat is None else chat) or connection.program.encodes
        _, stopped = _answer(
            connection,
            asked,
            show_ids=ids,
            continues=not alone,
            max_tokens=max_tokens,
            sampling=choice.sampling(),
            fixed_length=fixed_length,
            **asdict(drafting),
        )
    if stopped:
        raise KeyboardInterrupt


@app.command("chat")
@grouped
def chat_command(
    options: SessionOptions,
    choice: SamplingOptions,
    drafting: SpeculationOptions,
    ahead: AheadOptions,
    max_tokens: MaxTokens = 128,
    fixed_length: FixedLength = False,
    public_block: PublicBlocks = None,
) -> None:
    """Chat with a server. Ctrl-C ends an answer; an empty line or Ctrl-D ends the chat."""
    sampling = choice.sampling()
    public = options.public()
    turns = [{"role": "system", "content": public}] if public is not None else []
    blocks = read_blocks(public_block)
    connection = options.connection(public, ahead=ahead.plan(drafting, fixed_length), blocks=blocks)
    connection.check_chat()
    connection.speculation(**asdict(drafting))
    with connection:
        while True:
            try:
                said = out.input("[bold]> [/bold]" if out.is_terminal else "").strip()
            except EOFError:
                return
            if not said:
                return
            turns.append({"role": "user", "content": said})
            try:
                asked = connection.encode_chat(turns)
                text, _ = _answer(
                    connection,
                    asked,
                    max_tokens=max_tokens,
                    sampling=sampling,
                    fixed_length=fixed_length,
                    **asdict(drafting),
                )
                turns.append({"role": "assistant", "content": text})
            except MergecError as error:
                turns.pop()
                err.print(RichText(f"error: {error}", style="red"), soft_wrap=True)


def _answer(
    connection: Connection,
    asked: list[int],
    *,
    show_ids: bool = False,
    continues: bool = False,
    **options: Any,
) -> tuple[str, bool]:
    """Stream an answer and print its cost; returns its text, and whether Ctrl-C ended it.

    continues: whether the text continues the prompt's, as it does without a chat template.

    Ctrl-C ends the answer after the current step, so that the session stays usable; a second one
    ends it at once.
    """
    from mergec.runtime.session.text import Stream

    stream = None
    if connection.text and not show_ids:
        stream = Stream(connection.text, write, asked if continues else ())
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True

    before = signal.signal(signal.SIGINT, stop)
    reports: list[Any] = []
    try:
        with waiting("computing the first token") as first:
            show = first(write)
            for token in connection.generate(asked, **options):
                reports += token.reports
                if stream is None:
                    show(f"{token.token} ")
                else:
                    show("")
                    stream.token(token.token)
                if stopped:
                    break
        text = stream.end() if stream is not None else ""
    finally:
        signal.signal(signal.SIGINT, before)
        if reports:
            write("\n")  # also if the answer fails: an error starts a line of its own
    seconds, count = sum(r.seconds for r in reports), len(reports)
    online = sum(r.sent + r.received for r in reports)
    rounds = sum(r.rounds for r in reports)
    drafted = sum(r.drafted for r in reports)
    right = f"; {sum(r.accepted for r in reports)} of {drafted} drafts were right" * bool(drafted)
    extra = sum(one.past == other.past for one, other in pairwise(reports))
    if drafted and extra:
        right += f", which took {extra} extra steps"
    err.print(
        f"{count} steps; per step {seconds / count:.2f} s, {online / count / 1e6:.2f} MB and "
        f"{rounds / count:.0f} rounds{right}",
        style="dim",
    )
    return text, stopped


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.strip("[] \n").replace(",", " ").split()]
    except ValueError as error:
        raise PromptError("--ids takes whole numbers, as in --prompt '17 4 9'") from error
