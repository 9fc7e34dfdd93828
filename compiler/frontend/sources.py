"""Checks the files of a model before a library reads them: custom code, damage, quantization."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mergec.compiler.errors import CompileError

_POINTER = b"version https://git-lfs"
"""How a file begins that stands for a large one in a git repository."""

_AGAIN = "copy or download it again"


def read_settings(file: Path) -> dict[str, Any]:
    """A JSON file of settings. Raises CompileError if it cannot be read."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CompileError(f"{file} cannot be read ({error.strerror}); check the file") from error
    except (ValueError, RecursionError) as error:
        raise CompileError(
            f"{file.parent} cannot be loaded as a decoder: {file.name} is not JSON; {_AGAIN}"
        ) from error
    if not isinstance(settings, dict):
        raise CompileError(
            f"{file.parent} cannot be loaded as a decoder: {file.name} holds no settings; {_AGAIN}"
        )
    return settings


def check_folder(folder: Path) -> None:
    """Raise CompileError if a model's folder needs custom code, is quantized, or is damaged."""
    config = read_settings(folder / "config.json")
    _check_code(folder, config)
    settings = config.get("quantization_config")
    if settings:
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        raise CompileError(
            f"{folder} holds weights that are quantized ({method or 'by an unnamed method'}); "
            "mergec reads floating-point weights, so give the model from before it was quantized"
        )
    for file in sorted(folder.iterdir()):
        if file.is_file():
            _check_file(file)
    _check_shards(folder)


def _check_code(folder: Path, config: dict[str, Any]) -> None:
    from transformers import CONFIG_MAPPING

    tokenizer = folder / "tokenizer_config.json"
    named = {"config.json": config}
    if tokenizer.is_file():
        named["tokenizer_config.json"] = read_settings(tokenizer)
    known = config.get("model_type") in CONFIG_MAPPING
    for name, settings in named.items():
        # A family that transformers has is loaded by its own code, whatever the folder brings.
        if settings.get("auto_map") and not known:
            raise CompileError(
                f"{folder} needs code of its own ({name} names it in auto_map), which mergec "
                "never runs; load the model yourself, if you trust it, and pass it to "
                "compile_decoder"
            )


def _check_file(file: Path) -> None:
    """Raise CompileError if a weight file is a pointer to one, cut, or damaged."""
    if file.suffix not in (".safetensors", ".bin", ".gguf"):
        return
    where = f"{file.parent} cannot be loaded as a decoder: {file.name}"
    try:
        with file.open("rb") as stream:
            start = stream.read(len(_POINTER))
    except OSError as error:
        raise CompileError(f"{where} cannot be read ({error.strerror}); check the file") from error
    if start == _POINTER:
        raise CompileError(f"{where} is a pointer to the real file; run `git lfs pull` there")
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as reader:
                reader.keys()
        except (SafetensorError, OSError, ValueError) as error:
            raise CompileError(f"{where} is cut or damaged ({error}); {_AGAIN}") from error
    # Before 2020 torch wrote a pickle of another form, which begins with this opcode.
    if file.suffix == ".bin" and not zipfile.is_zipfile(file) and not start.startswith(b"\x80\x02"):
        raise CompileError(f"{where} is cut or damaged; {_AGAIN}")


def _check_shards(folder: Path) -> None:
    for index in sorted(folder.glob("*.index.json")):
        shards = read_settings(index).get("weight_map")
        names = {str(name) for name in shards.values()} if isinstance(shards, dict) else set()
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CompileError(
                f"{folder} cannot be loaded as a decoder: {missing[0]}{more} is missing, which "
                f"{index.name} lists; copy or download it, too"
            )
