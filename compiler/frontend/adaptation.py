"""What `mergec adapt` adds to a model's folder: its preset, and the trained constants or heads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mergec.compiler.config import PRESETS, Pair
from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.heads import PREFIX, Heads
from mergec.compiler.frontend.sources import read_settings
from mergec.runtime.core.spec import MAX_HEADS

FILE = "mergec_adaptation.json"
TENSORS = "mergec_adaptation.safetensors"

_FORMAT = 1
_AGAIN = "copy the folder again, or adapt the model again"


@dataclass(frozen=True)
class Adaptation:
    """How a model was adapted.

    preset, enable: the lossy passes that it was trained for. constants: those that take trained
    constants find them here, by name. calibration: prompts of the text that it was adapted to, as
    token numbers; of an encoder-decoder, pairs. deviation: the distance of the lossy program from
    the model before it was adapted, as `Manifest.deviation`; empty if it was not measured. medusa:
    how many heads the folder holds that guess the tokens after the next one; `read_heads` reads
    them. base: `digest` of the model's own head, beside which they were trained; "" without heads.
    """

    preset: str
    enable: tuple[str, ...] = ()
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    calibration: tuple[tuple[int, ...] | Pair, ...] = ()
    deviation: Mapping[str, Any] = field(default_factory=dict)
    medusa: int = 0
    base: str = ""

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
    medusa, base = settings.get("medusa", 0), settings.get("base", "")
    if (
        preset not in PRESETS
        or not isinstance(enable, list)
        or not all(isinstance(name, str) for name in enable)
        or not isinstance(prompts, list)
        or not all(_is_prompt(prompt) or _is_pair(prompt) for prompt in prompts)
        or not isinstance(deviation, dict)
        or type(medusa) is not int
        or not 0 <= medusa <= MAX_HEADS
        or not isinstance(base, str)
    ):
        raise CompileError(f"{path / FILE} is damaged; {_AGAIN}")
    constants = _tensors(path, heads=False)
    prompts = tuple(map(_sample, prompts))
    return Adaptation(preset, tuple(enable), constants, prompts, deviation, medusa, base)


def read_heads(folder: str | Path) -> Heads | None:
    """The heads in a folder; None if it holds none. Raises CompileError if they are damaged."""
    found = read_adaptation(folder)
    if not found.medusa:
        return None
    return Heads(found.medusa, _tensors(Path(folder), heads=True), found.base)


def _tensors(folder: Path, *, heads: bool) -> dict[str, torch.Tensor]:
    """The tensors of the heads, which are large, or all others; by name."""
    file = folder / TENSORS
    try:
        with safe_open(file, framework="pt") as reader:
            names = [name for name in reader.keys() if name.startswith(PREFIX) is heads]  # noqa: SIM118
            found = {name: reader.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise CompileError(f"{file} cannot be read ({error}); {_AGAIN}") from error
    bad = [name for name, value in found.items() if not bool(value.isfinite().all())]
    if bad:
        raise CompileError(f"{file}: {bad[0]} is NaN or infinite; adapt the model again")
    return found


def _is_prompt(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_prompt, value))


def _sample(value: list[Any]) -> tuple[int, ...] | Pair:
    return Pair(*map(tuple, value)) if _is_pair(value) else tuple(value)


def _as_json(sample: tuple[int, ...] | Pair) -> list[Any]:
    """Of a pair, source and answer."""
    if isinstance(sample, Pair):
        return [list(sample.source), list(sample.answer)]
    return list(sample)


def write_adaptation(folder: Path, adaptation: Adaptation, heads: Heads | None = None) -> None:
    """Write an adaptation beside a model; replaces one that is there. heads: those it tells of."""
    tensors = {**adaptation.constants, **(heads.tensors if heads is not None else {})}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / TENSORS)
    settings = {
        "format": _FORMAT,
        "preset": adaptation.preset,
        "enable": list(adaptation.enable),
        "calibration": [_as_json(sample) for sample in adaptation.calibration],
        "deviation": dict(adaptation.deviation),
        "medusa": adaptation.medusa,
        "base": adaptation.base,
    }
    (folder / FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
