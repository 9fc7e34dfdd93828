"""Writes lowered programs to a folder of three bundles. It makes no decisions."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import fx

from mergec.compiler.backend.onnx_export import ValueType, to_onnx
from mergec.compiler.errors import CompileError
from mergec.runtime.core.errors import BundleError
from mergec.runtime.core.spec import ROLES
from mergec.runtime.engine.weights import words_to_store
from mergec.runtime.program.bundle import GRAPH, TOKENIZER, File, replacing, save_bundle
from mergec.runtime.program.encoding import dtype_name
from mergec.runtime.program.manifest import tokenizer_digest
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.session.text import VOCABULARY, Text

Progress = Callable[[str], object]


def emit(
    programs: Mapping[str, RoleProgram],
    types: Mapping[str, ValueType],
    path: str | Path,
    tokenizer_files: Mapping[str, bytes] | None = None,
    progress: Progress = lambda _: None,
) -> Path:
    """Write the bundles of all roles to the folder `path`, all or none; return the folder.

    types: dtypes and shapes of results, for the ONNX graphs. tokenizer_files: content by file name,
    for the client's bundle. Raises BundleError if `path` cannot be written, or exists and is not a
    folder of bundles.
    """
    target = Path(path)
    with replacing(target) as folder:
        digest = tokenizer_digest(file_digests(tokenizer_files or {}))
        for role in ROLES:
            progress(f"writing the {role}'s bundle")
            program = programs[role]
            program.manifest = replace(program.manifest, tokenizer=digest)
            files: dict[str, File] = {GRAPH: partial(_graph, program, types)}
            if role == "client":
                files |= {f"{TOKENIZER}/{k}": v for k, v in (tokenizer_files or {}).items()}
            save_bundle(program, folder / role, files, words_to_store(program))
            onnx.checker.check_model(str(folder / role / GRAPH))
    return target


def _graph(program: RoleProgram, types: Mapping[str, ValueType], folder: Path) -> bytes:
    return bytes(to_onnx(program, types, folder).SerializeToString())


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """The files that a Hugging Face tokenizer's `save_pretrained` writes, by name; {} for None.

    Raises CompileError if it is none, or if the client could not read the files.
    """
    if tokenizer is None:
        return {}
    kind = type(tokenizer).__name__
    if not callable(getattr(tokenizer, "save_pretrained", None)) or not callable(tokenizer):
        raise CompileError(
            f"the tokenizer is of the class {kind}; give one of Hugging Face, as "
            "AutoTokenizer.from_pretrained returns"
        )
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise CompileError(f"the tokenizer {kind} cannot be saved: {said[:200]}") from error
        place = Path(folder)
        files = {
            file.relative_to(place).as_posix(): file.read_bytes()
            for file in sorted(place.rglob("*"))
            if file.is_file()
        }
    if VOCABULARY not in files:
        raise CompileError(
            f"the tokenizer {kind} is saved without a {VOCABULARY}, which the client reads; give a "
            "fast one, or compile without a tokenizer"
        )
    try:
        Text.from_files(files, f"the tokenizer {kind}")
    except BundleError as error:
        raise CompileError(str(error)) from error
    return files


def file_digests(files: Mapping[str, bytes]) -> dict[str, str]:
    """The SHA-256 of each file by its name, in hexadecimal."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def value_types(
    graph_module: fx.GraphModule, names: Mapping[fx.Node, str], lengths: Mapping[str, str]
) -> dict[str, ValueType]:
    """dtype and shape of each value from meta["val"]; `lengths` names the symbolic sizes."""
    types: dict[str, ValueType] = {}
    for node in graph_module.graph.nodes:
        value = node.meta.get("val")
        if node in names and isinstance(value, torch.Tensor):
            shape = tuple(_length(size, lengths) for size in value.shape)
            types[names[node]] = ValueType(dtype_name(value.dtype), shape)
    return types


def _length(size: Any, lengths: Mapping[str, str]) -> int | str:
    if isinstance(size, int):
        return size
    text = str(size)
    for symbol, name in lengths.items():
        text = text.replace(symbol, name)
    return text


def shapes(program: RoleProgram, types: Mapping[str, ValueType]) -> dict[str, Any]:
    """dtypes and shapes of inputs and outputs, for `Manifest.shapes`."""
    return {
        "inputs": {i.name: {"dtype": i.dtype, "shape": list(i.shape)} for i in program.inputs},
        "outputs": {
            name: {"dtype": types[name].dtype, "shape": list(types[name].shape)}
            for name in program.outputs
            if name in types
        },
    }
