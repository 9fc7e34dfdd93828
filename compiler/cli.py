"""`mergec compile | adapt | inspect | run | demo`: the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text as RichText

from mergec.compiler.adaptation.config import FORMATS, AdaptConfig
from mergec.compiler.config import PAST, PRESETS
from mergec.runtime.cli import (
    Chat,
    Device,
    DeviceOption,
    Expected,
    MaxTokens,
    Overlap,
    PadPrompt,
    PromptPiece,
    PublicBlocks,
    PublicPrompt,
    Ranks,
    SamplingOptions,
    SpeculationOptions,
    Tokenizer,
    app,
    err,
    grouped,
    main,
    out,
    read_blocks,
    waiting,
    write,
)
from mergec.runtime.core.errors import MergecError, PromptError
from mergec.runtime.core.spec import CHOICES, MAX_DRAFTS, MAX_HEADS, MAX_NOISE

if TYPE_CHECKING:
    from mergec.compiler.program import Program

DEMO_SOURCE = "smollm2"
DEMO_PROMPT = "What is the capital of France?"


class Mode(StrEnum):
    """How the parties compute: mergec's own protocols, or CrypTen's stock ones."""

    mergec = "mergec"
    crypten = "crypten"


class Stage(StrEnum):
    """The graph as captured, or as the parties run it."""

    before = "before"
    after = "after"


ModeOption = Annotated[
    Mode, typer.Option(help="Protocols: mergec's own ones, or CrypTen's stock ones.")
]


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """Options of every command that compiles a model; None and False leave it to CompileConfig."""

    max_length: Annotated[
        int | None, typer.Option(help="Maximum tokens of prompt and answer together.", min=2)
    ] = None
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"Cheaper functions that replace those of the model: {', '.join(PRESETS)}."
        ),
    ] = None
    weights: Annotated[
        str | None,
        typer.Option(
            help="Who holds the weights: the `server`, in the clear, or both parties, as `shared`."
        ),
    ] = None
    reveal: Annotated[
        str | None,
        typer.Option(help="What the client learns: all `logits`, or only the `token`."),
    ] = None
    logit_noise: Annotated[
        float | None,
        typer.Option(
            help="Standard deviation of the server's noise in a revealed logit; 0: none.",
            min=0.0,
            max=MAX_NOISE,
        ),
    ] = None
    network: Annotated[
        str | None,
        typer.Option(help=f"Network to choose protocols for: {', '.join(CHOICES['network'])}."),
    ] = None
    rounding: Annotated[
        str | None,
        typer.Option(
            help="Who sees how values are rounded: both parties, `public`, or, with `exact`, "
            "never the client."
        ),
    ] = None
    speculate_up_to: Annotated[
        int | None,
        typer.Option(
            help="Most drafted tokens that one step checks, for `--speculate` (0: none).",
            min=0,
            max=MAX_DRAFTS,
        ),
    ] = None
    pad_prompt: Annotated[
        bool,
        typer.Option(
            "--pad-prompt",
            help="Let `--pad-prompt` of a client hide how long a prompt is.",
        ),
    ] = False
    enable: Annotated[
        list[str] | None, typer.Option(help="Run this lossy pass, too; may be repeated.")
    ] = None
    disable: Annotated[
        list[str] | None, typer.Option(help="Leave out this pass; may be repeated.")
    ] = None
    ignore_setting: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Leave out this setting of the model's generation_config; may be repeated.",
        ),
    ] = None
    check_passes: Annotated[
        bool,
        typer.Option(
            "--check-passes", help="Run the graph before and after each exact pass; slow."
        ),
    ] = False

    def given(self) -> dict[str, Any]:
        """The options that were given, as arguments of CompileConfig."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["ignore_settings"] = values.pop("ignore_setting")
        return {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in values.items()
            if value is not None and value is not False and value != []
        }


@app.command("compile")
@grouped
def compile_command(
    source: Annotated[str, typer.Argument(help="Folder of a model, a .gguf file, or `smollm2`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the three bundles.")],
    options: CompileOptions,
) -> None:
    """Compile a model into one bundle per role."""
    from mergec.runtime.program.bundle import check_place

    check_place(output)
    with _steps() as step:
        program = _compile(source, options.given(), step)
        program.save(output, step)
    out.print(f"{output}: {program.describe()}", soft_wrap=True)
    if program.deviation:
        said = f"lossy: this program does not compute what the model does; {program.deviation}"
        err.print(said, style="yellow", soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class AdaptOptions:
    """Options of `adapt`; None and False leave it to AdaptConfig."""

    preset: Annotated[
        str | None, typer.Option(help="What to train for: a lossy preset; by default `merge`.")
    ] = None
    enable: Annotated[
        list[str] | None, typer.Option(help="Train for this lossy pass, too; may be repeated.")
    ] = None
    medusa: Annotated[
        int | None,
        typer.Option(
            help=f"Instead of a preset: train so many heads that guess, 1 to {MAX_HEADS}."
        ),
    ] = None
    medusa_layers: Annotated[
        int | None, typer.Option(help="Residual blocks of each head, 1 or 0; by default 1.")
    ] = None
    format: Annotated[
        str | None, typer.Option(help=f"Of the data: {', '.join(FORMATS)}; by default found.")
    ] = None
    separator: Annotated[
        str | None, typer.Option(help="Between prompt and answer; by default a line break.")
    ] = None
    chat: Annotated[bool, typer.Option("--chat", help="Render prompts by the chat template.")] = (
        False
    )
    length: Annotated[int | None, typer.Option(help="Most tokens of a text.")] = None
    steps: Annotated[int | None, typer.Option(help="Steps of the optimizer.")] = None
    batch: Annotated[int | None, typer.Option(help="Texts at a time.")] = None
    accumulate: Annotated[int | None, typer.Option(help="Batches of each step.")] = None
    learning_rate: Annotated[float | None, typer.Option(help="Of AdamW.")] = None
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamW.")] = None
    clip: Annotated[float | None, typer.Option(help="Largest norm of a gradient.")] = None
    warmup: Annotated[
        int | None, typer.Option(help="Steps over which the learning rate rises.")
    ] = None
    schedule: Annotated[
        str | None, typer.Option(help="Of the learning rate: `constant`, or `linear` down to 0.")
    ] = None
    objective: Annotated[
        str | None, typer.Option(help="Learn from the `data`, or from the `teacher`.")
    ] = None
    cosine: Annotated[
        float | None, typer.Option(help="Weight of the cosine term where states are resent.")
    ] = None
    recipe: Annotated[
        str | None,
        typer.Option(help="MERGE as in its `paper`, or `as-run` by its scripts."),
    ] = None
    noise: Annotated[float | None, typer.Option(help="Uniform noise of embeddings.")] = None
    dropout: Annotated[float | None, typer.Option(help="Dropout of embeddings.")] = None
    resent: Annotated[
        int | None, typer.Option(help="Further runs of a step, with its own hidden states.")
    ] = None
    resent_ramp: Annotated[
        float | None,
        typer.Option(help="Share of the steps over which embeddings become resent states."),
    ] = None
    match_scale: Annotated[
        bool,
        typer.Option("--match-scale", help="Scale resent states to the size of embeddings first."),
    ] = False
    freeze: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of parameters that stay as they are; may be repeated."),
    ] = None
    layer_steps: Annotated[
        float | None, typer.Option(help="Share of the steps that learn the teacher's layers.")
    ] = None
    layer_weight: Annotated[
        float | None, typer.Option(help="Weight of the teacher's layers beside the objective.")
    ] = None
    temperature: Annotated[
        float | None, typer.Option(help="Of logits that are compared with the teacher's.")
    ] = None
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Train with products of bfloat16; weights stay float32.")
    ] = False
    seed: Annotated[int | None, typer.Option(help="Of data order, noise and dropout.")] = None
    device: Annotated[str | None, typer.Option(help="`cpu`, `cuda` or `auto`.")] = None
    evaluate_every: Annotated[int | None, typer.Option(help="Steps between validations.")] = None
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None
    log_every: Annotated[int | None, typer.Option(help="Steps between lines of progress.")] = None
    samples: Annotated[int | None, typer.Option(help="Prompts that each validation answers.")] = (
        None
    )
    answer: Annotated[int | None, typer.Option(help="Tokens of each of these answers.")] = None

    def given(self) -> dict[str, Any]:
        """The options that were given, as arguments of AdaptConfig."""
        return {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in asdict(self).items()
            if value is not None and value is not False and value != []
        }


@app.command("adapt")
@grouped
def adapt_command(
    source: Annotated[str, typer.Argument(help="Folder of a model, a .gguf file, or `smollm2`.")],
    data: Annotated[Path, typer.Option("--data", help="File of texts, or of prompts and answers.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the adapted model.")],
    options: AdaptOptions,
    validation: Annotated[
        Path | None, typer.Option(help="File to validate with, instead of a share of the data.")
    ] = None,
) -> None:
    """Train a model for a lossy preset, or heads that guess; `compile` then compiles the folder."""
    from mergec.compiler.adaptation.run import adapt

    config = AdaptConfig(**options.given())
    with _steps() as step:
        report = adapt(source, data, output, config, validation=validation, progress=step)
    sys.stdout.write(report.to_markdown())


@app.command("inspect")
@grouped
def inspect_command(
    source: Annotated[
        str, typer.Argument(help="Folder of the three bundles, or a model to compile.")
    ],
    options: CompileOptions,
    new: Annotated[
        int, typer.Option(help="New tokens of the step; 0: the last step of `merge-er`.", min=0)
    ] = 1,
    past: Annotated[
        int | None,
        typer.Option(help=f"Tokens before the step; by default {PAST}, or what fits.", min=0),
    ] = None,
    source_tokens: Annotated[
        int | None,
        typer.Option(
            "--source", help="Of these, tokens of an encoder-decoder's source; by default all."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    graph: Annotated[bool, typer.Option("--graph", help="Print the instructions as text.")] = False,
    why_not: Annotated[
        str | None, typer.Option(metavar="PASS", help="Show where a pass did not apply, and why.")
    ] = None,
    savings: Annotated[
        bool,
        typer.Option("--savings", help="Show what each pass saves; recompiles often."),
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with graphs, costs and each pass's changes.")
    ] = None,
    dot: Annotated[Path | None, typer.Option(help="Write the graph for Graphviz.")] = None,
    onnx: Annotated[Path | None, typer.Option(help="Write the graph for Netron.")] = None,
    stage: Annotated[
        Stage, typer.Option(help="Graph to print or write: before or after the passes.")
    ] = Stage.after,
) -> None:
    """Show what a program costs, by op and by layer, and what each pass did."""
    from mergec.compiler.program import Program, check_whole

    given = options.given()
    files = [path for path in (html, dot, onnx) if path is not None]
    for path in files:
        _check_file(path)
    with _steps() as step:
        check_whole(Path(source))
        if not Program.stands_at(source):
            if why_not is not None:
                from mergec.compiler.selection import check_names

                check_names([why_not])
            program = _compile(source, given, step, keep_history=True)
        elif given:
            raise MergecError(f"{source} is already compiled; give the model to change options")
        else:
            program = Program.load(source, roles=("client",))
        view = program.captured_graph if stage is Stage.before else program.graph
        if html is not None:
            step("measuring what each pass saves" if savings else "drawing the graphs")
            _write_file(
                html, program.to_html(new, past, source=source_tokens, savings=savings).encode()
            )
        if dot is not None:
            _write_file(dot, view.to_dot().encode())
        if onnx is not None:
            _write_file(onnx, view.to_onnx().SerializeToString())
        if graph or files:
            sys.stdout.write(str(view) if graph else "".join(f"{path}\n" for path in files))
            return
        step("measuring what each pass saves" if savings else "counting rounds and bytes")
        inspection = program.inspect(new, past, source=source_tokens, savings=savings)
    shown = inspection.why_not(why_not) if why_not else inspection
    if as_json:
        sys.stdout.write(shown.to_json() + "\n")
    elif markdown:
        sys.stdout.write(shown.to_markdown())
    else:
        out.print(shown.render())


@app.command("run")
@grouped
def run_command(
    bundles: Annotated[Path, typer.Argument(help="Folder of the three bundles.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The prompt.")],
    choice: SamplingOptions,
    drafting: SpeculationOptions,
    mode: ModeOption = Mode.mergec,
    device: DeviceOption = Device.cpu,
    ranks: Ranks = 1,
    max_tokens: MaxTokens = 32,
    chat: Chat = None,
    public_prompt: PublicPrompt = None,
    public_block: PublicBlocks = None,
    prompt_piece: PromptPiece = 0,
    overlap: Overlap = True,
    pad_prompt: PadPrompt = None,
    tokenizer: Tokenizer = None,
    expect: Expected = None,
    check_plaintext: Annotated[
        bool, typer.Option("--check-plaintext", help="Compute the answer in plaintext, too.")
    ] = False,
) -> None:
    """Run all three roles on this machine, each as a process."""
    from mergec.compiler.program import Program

    with _steps() as step:
        step("reading the bundles")
        program = Program.load(bundles)
        program.check(expect, tokenizer)
    public = None
    if public_prompt is not None:
        from mergec.runtime.session.public_text import read_public_text

        public = read_public_text(public_prompt)
    _run(
        program,
        prompt,
        check_plaintext=check_plaintext,
        mode=mode.value,
        device=device.value,
        ranks=ranks,
        max_tokens=max_tokens,
        chat=chat,
        public_prefix=public,
        public_blocks=read_blocks(public_block),
        prompt_piece=prompt_piece,
        overlap=overlap,
        pad_prompt=pad_prompt or 0,
        **asdict(choice),
        **asdict(drafting),
    )


@app.command("demo")
def demo_command(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The prompt.")] = DEMO_PROMPT,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the bundles.")] = Path(
        "bundles/demo"
    ),
    mode: ModeOption = Mode.mergec,
    device: DeviceOption = Device.cpu,
    max_tokens: MaxTokens = 16,
    reuse: Annotated[
        bool, typer.Option("--reuse", help="Reuse bundles of an earlier run.")
    ] = False,
) -> None:
    """Compile SmolLM2-135M and run it on a prompt."""
    from mergec.compiler.program import Program
    from mergec.runtime.program.bundle import check_place

    _check_prompt(prompt)
    with _steps() as step:
        if not (reuse and Program.stands_at(output)):
            check_place(output)
            program = _compile(DEMO_SOURCE, {}, step)
            program.save(output, step)
            del program
        step("reading the bundles")
        program = Program.load(output)
    _run(
        program,
        prompt,
        check_plaintext=True,
        mode=mode.value,
        device=device.value,
        max_tokens=max_tokens,
    )


def _compile(
    source: str, options: dict[str, Any], step: Step, *, keep_history: bool = False
) -> Program:
    from mergec.compiler.driver import compile_source

    return compile_source(source, options, step, keep_history=keep_history)


def _check_file(path: Path) -> None:
    """Raise MergecError if a file cannot be written, before the work for it begins."""
    folder = path.absolute().parent
    if path.is_dir():
        raise MergecError(f"{path} cannot be written: it is a folder")
    if not folder.is_dir():
        raise MergecError(f"{path} cannot be written: {folder} is not a folder; create it")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise MergecError(f"{path} cannot be written: no permission")


def _write_file(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise MergecError(f"{path} cannot be written: {error.strerror}") from error


def _run(program: Program, prompt: str, *, check_plaintext: bool, **options: Any) -> None:
    _check_prompt(prompt)
    out.print(RichText(f"> {prompt}", style="dim"))
    with waiting("starting client, server and dealer") as first:
        answer = program.generate_local(prompt, on_text=first(write), **options)
    sys.stdout.write("\n\n")
    out.print(answer.table())
    if check_plaintext:
        with _steps() as step:
            step("computing the same in plaintext")
            plain = program.plaintext(answer)
        out.print(plain.comparison(answer))


def _check_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise PromptError("the prompt is empty; give one with --prompt")


class Step:
    """Shows the current step of a long task: with a spinner on a terminal, else as a line."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._task: Any = None

    def __call__(self, what: str) -> None:
        if self._progress is None:
            err.print(f"{what} …", style="dim")
            return
        self.done()
        self._task = self._progress.add_task(what, total=1)

    def done(self) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=1)


@contextmanager
def _steps() -> Iterator[Step]:
    if not err.is_terminal:
        yield Step(None)
        return
    columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), console=err) as progress:
        step = Step(progress)
        yield step
        step.done()


if __name__ == "__main__":
    main()
