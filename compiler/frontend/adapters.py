"""Merges a PEFT adapter, such as LoRA, into its base model."""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.sources import read_settings

ADAPTER = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "adapter_"


def check_adapter(folder: Path) -> None:
    """Raise CompileError if the adapter in a folder cannot be merged here."""
    if not (folder / _WEIGHTS).is_file():
        raise CompileError(
            f"{folder} holds an adapter ({ADAPTER}) without {_WEIGHTS}; save it again with peft"
        )
    if read_settings(folder / ADAPTER).get("megatron_config"):
        raise CompileError(
            f"{folder} holds an adapter that needs Megatron; merge it into its model with peft's "
            "merge_and_unload, and save the result"
        )
    if importlib.util.find_spec("peft") is None:
        raise CompileError(
            f"{folder} holds an adapter ({ADAPTER}), and the package peft, which merges it, is "
            "not installed; run `pip install 'mergec[adapters]'`, or merge the adapter elsewhere "
            "and save the result"
        )


def base_of(folder: Path) -> Path:
    """The folder of the base model of an adapter that stands alone. Raises CompileError."""
    named = read_settings(folder / ADAPTER).get("base_model_name_or_path")
    base = Path(str(named or ""))
    for place in (base, folder / base):
        if named and (place / "config.json").is_file():
            return place
    raise CompileError(
        f"{folder} holds only an adapter, for the model {str(named or 'that it does not name')!r}, "
        "which is not a folder on this machine; merge the adapter into the model with peft's "
        "merge_and_unload, and save the result"
    )


@contextlib.contextmanager
def without_adapter(folder: Path) -> Iterator[Path]:
    """The folder as if it held the base model alone: links to all files but the adapter's."""
    with tempfile.TemporaryDirectory(prefix="mergec-") as name:
        for file in folder.iterdir():
            if not file.name.startswith(_PREFIX):
                (Path(name) / file.name).symlink_to(file.absolute())
        yield Path(name)


def merged(model: Any, folder: Path) -> Any:
    """The model with the adapter in `folder` merged. Raises CompileError unless all is used."""
    from peft import PeftModel, get_peft_model_state_dict

    try:
        adapted = PeftModel.from_pretrained(model, str(folder), local_files_only=True)
        with safe_open(folder / _WEIGHTS, framework="pt") as reader:
            held = set(reader.keys())
        used = set(get_peft_model_state_dict(adapted))
        merge = adapted.merge_and_unload
        result = merge(safe_merge=True)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CompileError(f"the adapter in {folder} cannot be merged: {lines[0]}") from error
    for name in sorted(held ^ used):
        fault = "holds a tensor that its model does not use" if name in held else "lacks"
        raise CompileError(f"the adapter in {folder} {fault}: {name}; check its base model")
    return result
