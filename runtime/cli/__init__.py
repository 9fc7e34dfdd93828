"""The command line of the parties; `compiler.cli` adds the commands that need a compiler.

Importing it loads neither torch nor anything else that is slow: each command imports what it needs.
"""

from mergec.runtime.cli import commands  # noqa: F401  (registers them)
from mergec.runtime.cli.application import app
from mergec.runtime.cli.console import err, out, waiting, write
from mergec.runtime.cli.exits import DEBUG, FAILED, INTERRUPTED, USAGE, main, run
from mergec.runtime.cli.options import (
    Chat,
    Device,
    DeviceOption,
    Expected,
    MaxTokens,
    Overlap,
    PadPrompt,
    Prompt,
    PromptPiece,
    PublicBlocks,
    PublicPrompt,
    Ranks,
    SamplingOptions,
    SpeculationOptions,
    Tokenizer,
    grouped,
    read_blocks,
)

__all__ = [
    "DEBUG",
    "FAILED",
    "INTERRUPTED",
    "USAGE",
    "Chat",
    "Device",
    "DeviceOption",
    "Expected",
    "MaxTokens",
    "Overlap",
    "PadPrompt",
    "Prompt",
    "PromptPiece",
    "PublicBlocks",
    "PublicPrompt",
    "Ranks",
    "SamplingOptions",
    "SpeculationOptions",
    "Tokenizer",
    "app",
    "err",
    "grouped",
    "main",
    "out",
    "read_blocks",
    "run",
    "waiting",
    "write",
]
