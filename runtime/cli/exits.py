"""Runs a command line: every failure becomes one line on the error output, and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

import typer
from rich.text import Text as RichText

from mergec.runtime.cli.application import app
from mergec.runtime.cli.console import err
from mergec.runtime.core.errors import DEBUG, MergecError

FAILED, USAGE, INTERRUPTED = 1, 2, 130

_PROXY_PACKAGES = ("fastapi", "pydantic", "starlette", "uvicorn")

# Since 0.2x, typer ships its own copy of click, so the base class of its errors is taken from it.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]


def run(arguments: list[str] | None = None) -> int:
    """Run a command line, by default this process's, and return its exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    debug = bool(os.environ.get(DEBUG))
    try:
        code = app(args=arguments, prog_name="mergec", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # typer turns Ctrl-C into an exit code
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except MergecError as error:
        return _fail(str(error), FAILED, debug)
    except _UsageError as error:
        return _fail(f"{_message(error)}; see `mergec --help`", USAGE, debug)
    except (KeyboardInterrupt, typer.Abort):
        err.print("stopped", style="red")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of the pipe (head, less) has read all it wanted.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        return _fail(_missing(error), FAILED, debug)
    except Exception as error:  # noqa: BLE001  (a bug of ours, still reported in one line)
        kind = type(error).__name__
        said = " ".join(str(error).split())
        text = f"internal error: {kind}: {said}; set {DEBUG}=1 for the traceback and report it"
        return _fail(text, FAILED, debug)


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run())


def _missing(error: ModuleNotFoundError) -> str:
    """Which package is missing, and the extra that installs it."""
    package = (error.name or "").split(".")[0]
    if package == "mergec":
        return f"internal error: {error}; set {DEBUG}=1 for the traceback and report it"
    extra = "proxy" if package in _PROXY_PACKAGES else "compile"
    return (
        f"this command needs the package {package!r}, which is not installed; "
        f"run `pip install 'mergec[{extra}]'`"
    )


def _message(error: Any) -> str:
    # Newer versions of typer check values with pydantic, which says what kind of error it raised.
    return str(error.format_message()).replace(": Value error, ", ": ").rstrip(".")


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    first, *details = message.strip().splitlines() or ["unknown"]
    err.print(RichText(f"error: {first}", style="red"), soft_wrap=True)
    for line in details:  # the nodes of the user's graph that caused the error, and why
        err.print(RichText(line), soft_wrap=True)
    return code
