"""What `mergec adapt` adds to a model's folder: its preset, and the trained constants."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mergec.compiler.config import PRESETS
from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.sources import read_settings

FILE = "mergec_adaptation.json"
TENSORS = "mergec_adaptation.safetensors"

_FORMAT = 1
_AGAIN = "copy the folder again, or adapt the model again"


@dataclass(frozen=True)
class Adaptation:
    """How a model was adapted.

    preset, enable: the lossy passes that it was trained for. constants: those that take trained
    constants find them here, by name. calibration: prompts of the text that it was adapted to, as
    token numbers. deviation: the distance of the lossy program from the model
    before it was adapted, as `Manifest.deviation`; empty if it was not measured.
    """

    preset: str
    enable: tuple[str, ...] = ()
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    calibration: tuple[tuple[int, ...], ...] = ()
    deviation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passes(self) -> tuple[str, ...]:
        """The lossy passes, by name."""
        return (*PRESETS[self.preset], *self.enable)


def stands_at(folder: Path) -> bool:
    """Whether a folder holds an adapted model."""
    return (folder / FILE).is_file()


def read_adaptation(folder: str | Path) -> Adaptation:
    """The adaptation in a folder. Raises CompileError if there is none, or a damaged one."""
    path = Path(folder)
    if not stands_at(path):
        raise CompileError(f"{path} holds no adapted model; make one with `mergec adapt`")
    settings = read_settings(path / FILE)
    if settings.get("format") != _FORMAT:
        raise CompileError(
            f"{path / FILE} has the format {settings.get('format')!r}, and this version of mergec "
            f"reads {_FORMAT}; adapt the model again"
        )
    preset, enable = settings.get("preset"), settings.get("enable")
    prompts, deviation = settings.get("calibration"), settings.get("deviation")
    if (
        preset not in PRESETS
        or not isinstance(enable, list)
        or not all(isinstance(name, str) for name in enable)
        or not isinstance(prompts, list)
        or not all(_is_prompt(prompt) for prompt in prompts)
        or not isinstance(deviation, dict)
    ):
        raise CompileError(f"{path / FILE} is damaged; {_AGAIN}")
    try:
        constants = load_file(path / TENSORS)
    except (OSError, SafetensorError) as error:
        raise CompileError(f"{path / TENSORS} cannot be read ({error}); {_AGAIN}") from error
    bad = [name for name, value in constants.items() if not bool(value.isfinite().all())]
    if bad:
        raise CompileError(f"{path / TENSORS}: {bad[0]} is NaN or infinite; adapt the model again")
    return Adaptation(preset, tuple(enable), constants, tuple(map(tuple, prompts)), deviation)


def _is_prompt(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def write_adaptation(folder: Path, adaptation: Adaptation) -> None:
    """Write an adaptation beside a model; replaces one that is there."""
    tensors = {name: value.contiguous() for name, value in adaptation.constants.items()}
    save_file(tensors, folder / TENSORS)
    settings = {
        "format": _FORMAT,
        "preset": adaptation.preset,
        "enable": list(adaptation.enable),
        "calibration": [list(prompt) for prompt in adaptation.calibration],
        "deviation": dict(adaptation.deviation),
    }
    (folder / FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
