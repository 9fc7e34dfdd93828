"""`mergec compile | inspect | run | demo`: the command line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text as RichText

from mergec.compiler.config import PAST, PRESETS
from mergec.runtime.cli import Device, DeviceOption, MaxTokens, app, err, main, out, waiting, write
from mergec.runtime.core.errors import MergecError, PromptError
from mergec.runtime.core.spec import CHOICES

if TYPE_CHECKING:
    from mergec.compiler.program import Program

DEMO_SOURCE = "smollm2"
DEMO_PROMPT = "What is the capital of France?"


class Mode(StrEnum):
    """How the parties compute: mergec's own protocols, or CrypTen's stock ones."""

    mergec = "mergec"
    crypten = "crypten"


class Stage(StrEnum):
    """A graph as it was captured, or as the parties run it."""

    before = "before"
    after = "after"


MaxLength = Annotated[
    int | None, typer.Option(help="Most tokens of prompt and answer together.", min=2)
]
Weights = Annotated[
    str | None, typer.Option(help="Weights in the clear at the `server`, or `shared` by the two.")
]
Reveal = Annotated[
    str | None, typer.Option(help="What the client learns: all `logits`, or the `token` alone.")
]
NetworkOption = Annotated[
    str | None,
    typer.Option(help=f"Network to choose protocols for: {', '.join(CHOICES['network'])}."),
]
Preset = Annotated[
    str | None,
    typer.Option(help=f"Cheaper functions in place of the model's: {', '.join(PRESETS)}."),
]
Enable = Annotated[
    list[str] | None, typer.Option(help="Run a lossy pass, too; may be given more than once.")
]
Disable = Annotated[
    list[str] | None, typer.Option(help="Leave out a pass; may be given more than once.")
]
CheckPasses = Annotated[
    bool,
    typer.Option("--check-passes", help="Run the graph around each exact pass, too; slow."),
]
ModeOption = Annotated[Mode, typer.Option(help="Protocols: our own, or CrypTen's stock ones.")]


@app.command("compile")
def compile_command(
    source: Annotated[str, typer.Argument(help="Model folder, .gguf file, or `smollm2`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the three bundles.")],
    max_length: MaxLength = None,
    preset: Preset = None,
    weights: Weights = None,
    reveal: Reveal = None,
    network: NetworkOption = None,
    enable: Enable = None,
    disable: Disable = None,
    check_passes: CheckPasses = False,
) -> None:
    """Compile a model into one bundle per role."""
    from mergec.runtime.program.bundle import check_place

    check_place(output)
    options = _options(
        max_length=max_length,
        preset=preset,
        weights=weights,
        reveal=reveal,
        network=network,
        enable=enable,
        disable=disable,
        check_passes=check_passes,
    )
    with _steps() as step:
        program = _compile(source, options, step)
        program.save(output, step)
    out.print(f"{output}: {program.describe()}", soft_wrap=True)
    if program.deviation:
        said = f"lossy: it does not compute what the model does; {program.deviation}"
        err.print(said, style="yellow", soft_wrap=True)


@app.command("inspect")
def inspect_command(
    source: Annotated[str, typer.Argument(help="Folder of bundles, or a model to compile.")],
    new: Annotated[
        int, typer.Option(help="Tokens of the step; 0 for the end of `merge-er`.", min=0)
    ] = 1,
    past: Annotated[
        int | None,
        typer.Option(help=f"Tokens before it; by default {PAST}, or what fits.", min=0),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As Markdown.")] = False,
    graph: Annotated[bool, typer.Option("--graph", help="The instructions as text.")] = False,
    why_not: Annotated[
        str | None, typer.Option(metavar="PASS", help="Where a pass did not fire, and why.")
    ] = None,
    savings: Annotated[
        bool, typer.Option("--savings", help="What each pass saves; recompiles the model often.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write a page: graphs, costs, changes of each pass.")
    ] = None,
    dot: Annotated[Path | None, typer.Option(help="Write the graph for Graphviz.")] = None,
    onnx: Annotated[Path | None, typer.Option(help="Write the graph for Netron.")] = None,
    stage: Annotated[
        Stage, typer.Option(help="The graph to print or write: before the passes, or after.")
    ] = Stage.after,
    max_length: MaxLength = None,
    preset: Preset = None,
    weights: Weights = None,
    reveal: Reveal = None,
    network: NetworkOption = None,
    enable: Enable = None,
    disable: Disable = None,
    check_passes: CheckPasses = False,
) -> None:
    """Show what a program costs, by op and by layer, and what each pass did."""
    from mergec.compiler.program import Program, check_whole

    options = _options(
        max_length=max_length,
        preset=preset,
        weights=weights,
        reveal=reveal,
        network=network,
        enable=enable,
        disable=disable,
        check_passes=check_passes,
    )
    with _steps() as step:
        check_whole(Path(source))
        if not Program.stands_at(source):
            program = _compile(source, options, step, keep_history=True)
        elif options:
            raise MergecError(f"{source} is compiled already; give the model for other options")
        else:
            program = Program.load(source, roles=("client",))
        view = program.captured_graph if stage is Stage.before else program.graph
        if html is not None:
            step("trying what each pass saves" if savings else "drawing the graphs")
            _write_file(html, program.to_html(new, past, savings=savings).encode())
        if dot is not None:
            _write_file(dot, view.to_dot().encode())
        if onnx is not None:
            _write_file(onnx, view.to_onnx().SerializeToString())
        if graph or (files := [path for path in (html, dot, onnx) if path is not None]):
            sys.stdout.write(str(view) if graph else "".join(f"{path}\n" for path in files))
            return
        step("trying what each pass saves" if savings else "counting rounds and bytes")
        inspection = program.inspect(new, past, savings=savings)
    shown = inspection.why_not(why_not) if why_not else inspection
    if as_json:
        sys.stdout.write(shown.to_json() + "\n")
    elif markdown:
        sys.stdout.write(shown.to_markdown())
    else:
        out.print(shown.render())


@app.command("run")
def run_command(
    bundles: Annotated[Path, typer.Argument(help="Folder of the three bundles.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to ask.")],
    mode: ModeOption = Mode.mergec,
    device: DeviceOption = Device.cpu,
    max_tokens: MaxTokens = 32,
    temperature: Annotated[float, typer.Option(help="0 takes the best token.", min=0.0)] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k best; 0 for all.", min=0)] = 0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the best that sum to p.", min=0.0, max=1.0)
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling, not of masks.")] = None,
    chat: Annotated[
        bool | None, typer.Option(help="Use the chat template; by default where there is one.")
    ] = None,
    check_plaintext: Annotated[
        bool, typer.Option("--check-plaintext", help="Print plaintext's answer, too.")
    ] = False,
) -> None:
    """Run the three roles here, a process each."""
    from mergec.compiler.program import Program

    with _steps() as step:
        step("reading the bundles")
        program = Program.load(bundles)
    _run(
        program,
        prompt,
        check_plaintext=check_plaintext,
        mode=mode.value,
        device=device.value,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        chat=chat,
    )


@app.command("demo")
def demo_command(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to ask.")] = DEMO_PROMPT,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the bundles.")] = Path(
        "bundles/demo"
    ),
    mode: ModeOption = Mode.mergec,
    device: DeviceOption = Device.cpu,
    max_tokens: MaxTokens = 16,
    reuse: Annotated[bool, typer.Option("--reuse", help="Take bundles made before.")] = False,
) -> None:
    """Compile SmolLM2-135M and ask it something."""
    from mergec.compiler.program import Program

    _check_prompt(prompt)
    with _steps() as step:
        if not (reuse and Program.stands_at(output)):
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


def _options(**given: Any) -> dict[str, Any]:
    """What was given on the command line; the rest is CompileConfig's to decide."""
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in given.items()
        if value
    }


def _compile(
    source: str, options: dict[str, Any], step: Step, *, keep_history: bool = False
) -> Program:
    from mergec.compiler.driver import compile_source

    return compile_source(source, options, step, keep_history=keep_history)


def _write_file(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise MergecError(f"{path} cannot be written: {error.strerror}") from error


def _run(program: Program, prompt: str, *, check_plaintext: bool, **options: Any) -> None:
    _check_prompt(prompt)
    out.print(RichText(f"> {prompt}", style="dim"))
    with waiting("client, server and dealer are starting") as first:
        answer = program.generate_local(prompt, on_text=first(write), **options)
    sys.stdout.write("\n\n")
    out.print(answer.table())
    if check_plaintext:
        with _steps() as step:
            step("the same in plaintext")
            plain = program.plaintext(answer)
        out.print(plain.comparison(answer))


def _check_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise PromptError("the prompt is empty; say something with --prompt")


class Step:
    """Names the step of a long work that is under way; a spinner on a terminal, else a line."""

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
