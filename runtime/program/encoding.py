"""A program as JSON, and the hash that parties compare before they run it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator
from typing import Any, cast

import torch

from mergec.runtime.core.errors import BundleError
from mergec.runtime.core.spec import RING_BITS, Vis
from mergec.runtime.program.json_values import canonical, is_a
from mergec.runtime.program.program import (
    DECODE,
    FINISH,
    PROMPT,
    InputSpec,
    Instruction,
    Phase,
    Ref,
    RoleProgram,
    TensorSpec,
)

RECOMPILE = "compile the model again"

FORMS = ("masked", "sent", "share")
"""Forms of an input: opened under a mask to both parties, to the server alone, or not opened."""

LENGTHS = frozenset({"new", "past", "past+new", "source"})
"""The lengths of a step, which are known only when it runs."""


def program_hash(program: RoleProgram, version: int | None = None) -> str:
    """SHA-256 of everything that all roles must agree on, in hexadecimal; equal in all bundles.

    It covers the public tensors but no others; how values are rounded; and what decides how long
    prompts, answers and steps are: the digest of the tokenizer, the number of tokens, the limits
    of lengths and of drafts, the stop tokens and the generation settings. It omits the places in
    the user's model that instructions come from, which are only informative. version: of the
    bundle's format; by default that of the manifest.
    """
    manifest = program.manifest
    version = manifest.format_version if version is None else version
    encoded = encode_program(program)
    for instruction in encoded["instructions"]:
        del instruction["module"], instruction["source"]
    shared = {
        "format_version": version,
        "ring_bits": RING_BITS,
        "fractional_bits": manifest.fractional_bits,
        "public": {
            spec.name: _tensor_digest(program.tensors[spec.name])
            for spec in program.constants
            if spec.vis is Vis.PUBLIC and spec.name in program.tensors
        },
        **encoded,
    }
    if version > 1:
        limits = ("vocab_size", "max_length", "speculate_up_to")
        keys = ("rounding", "tokenizer", "stop_tokens", *limits)
        shared |= {key: getattr(manifest, key) for key in keys}
        shared["generation"] = manifest.generation.to_dict()
    if program.encodes:
        shared["answer_start"] = manifest.answer_start
    if program.pads:
        shared["pad_token"] = manifest.pad_token
    return hashlib.sha256(canonical(shared)).hexdigest()


def encode_program(program: RoleProgram) -> dict[str, Any]:
    """The program as JSON values, without its role, which is in the manifest."""
    return {
        "constants": [
            {"name": c.name, "vis": c.vis.value, "dtype": c.dtype, "shape": list(c.shape)}
            for c in program.constants
        ],
        "inputs": [_encode_input(i) for i in program.inputs],
        "instructions": [
            {
                "name": i.name,
                "target": i.target,
                "args": [encode_literal(a, i.name) for a in i.args],
                "kwargs": {k: encode_literal(v, i.name) for k, v in i.kwargs.items()},
                "vis": i.vis.value,
                "frac": i.frac,
                "module": i.module,
                "source": i.source,
            }
            for i in program.instructions
        ],
        "outputs": list(program.outputs),
        "phases": [
            {
                "name": p.name,
                "inputs": [_encode_input(i) for i in p.inputs],
                "outputs": list(p.outputs),
            }
            for p in program.phases
        ],
    }


def _encode_input(spec: InputSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "vis": spec.vis.value,
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "frac": spec.frac,
        "cache_output": spec.cache_output,
        "form": spec.form,
    }


def decode_program(data: object, role: str, where: str) -> RoleProgram:
    """The inverse of `encode_program`. Raises BundleError, which names the first wrong field."""
    top = _Record(data, where, "the program")
    top.only("constants", "inputs", "instructions", "outputs", "phases")
    constants = [
        TensorSpec(r.text("name"), r.vis(), r.dtype(), cast(tuple[int, ...], r.shape(frozenset())))
        for r in top.records("constants")
    ]
    inputs = [r.input_spec() for r in top.records("inputs")]
    instructions = [
        Instruction(
            r.text("name"),
            r.text("target"),
            tuple(decode_literal(a, r) for a in r.items("args")),
            {str(k): decode_literal(v, r) for k, v in r.mapping("kwargs").items()},
            r.vis(),
            r.whole("frac"),
            r.text("module"),
            r.text("source"),
        )
        for r in top.records("instructions")
    ]
    phases = [
        Phase(
            r.one_of("name", (PROMPT, DECODE, FINISH)),
            tuple(i.input_spec() for i in r.records("inputs")),
            tuple(r.names("outputs")),
        )
        for r in top.records("phases")
    ]
    outputs = top.names("outputs")
    return RoleProgram(role, instructions, inputs, outputs, constants, phases=phases)


def encode_literal(value: object, owner: str) -> Any:
    """One argument as a JSON value. Raises BundleError, which names `owner`, for other types."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Ref):
        return {"ref": value.name}
    if isinstance(value, (list, tuple)):
        return [encode_literal(item, owner) for item in value]
    raise BundleError(
        f"{owner!r} has an argument of type {type(value).__name__}, which a bundle cannot store; "
        "use numbers, strings, lists and references"
    )


def decode_literal(value: Any, owner: _Record) -> Any:
    """The inverse of `encode_literal`; tuples come back as lists."""
    if isinstance(value, list):
        return [decode_literal(item, owner) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((key, text),) = value.items()
        if isinstance(text, str):
            if key == "ref":
                return Ref(text)
            if key == "float" and text in ("inf", "-inf", "nan"):
                return float(text)
    raise owner.wrong(f"unknown argument {json.dumps(value)[:60]}")


class _Record:
    """A JSON object whose getters check the types of the fields."""

    def __init__(self, data: object, where: str, what: str) -> None:
        self.where, self.what = where, what
        if not isinstance(data, dict):
            raise self.wrong("must be an object")
        self.data = data
        self.what = f"{what} {data['name']!r}" if isinstance(data.get("name"), str) else what

    def wrong(self, message: str) -> BundleError:
        return BundleError(f"{self.where}: {self.what}: {message}; {RECOMPILE}")

    def only(self, *keys: str) -> None:
        if set(self.data) != set(keys):
            raise self.wrong(f"must have the fields {', '.join(keys)}")

    def get(self, key: str) -> Any:
        if key not in self.data:
            raise self.wrong(f"the field {key!r} is missing")
        return self.data[key]

    def typed(self, key: str, kind: type) -> Any:
        value = self.get(key)
        if not is_a(value, kind):
            raise self.wrong(f"the field {key!r} must be {kind.__name__}")
        return value

    def text(self, key: str) -> str:
        return cast(str, self.typed(key, str))

    def whole(self, key: str) -> int:
        return cast(int, self.typed(key, int))

    def items(self, key: str) -> list[Any]:
        return cast(list[Any], self.typed(key, list))

    def mapping(self, key: str) -> dict[str, Any]:
        return cast(dict[str, Any], self.typed(key, dict))

    def records(self, key: str) -> list[_Record]:
        return [_Record(item, self.where, f"{key}[{n}]") for n, item in enumerate(self.items(key))]

    def names(self, key: str) -> list[str]:
        items = self.items(key)
        if not all(isinstance(item, str) for item in items):
            raise self.wrong(f"{key} must be a list of names")
        return items

    def input_spec(self) -> InputSpec:
        cache = self.get("cache_output")
        return InputSpec(
            self.text("name"),
            self.vis(),
            self.dtype(),
            self.shape(LENGTHS),
            self.whole("frac"),
            None if cache is None else self.text("cache_output"),
            self.one_of("form", FORMS),
        )

    def one_of(self, key: str, values: Collection[str]) -> str:
        value = self.text(key)
        if value not in values:
            raise self.wrong(f"the field {key!r} is {value!r}, not one of {', '.join(values)}")
        return value

    def vis(self) -> Vis:
        try:
            return Vis(self.get("vis"))
        except ValueError as error:
            raise self.wrong(f"unknown visibility {self.get('vis')!r}") from error

    def dtype(self) -> str:
        name = self.text("dtype")
        if not isinstance(getattr(torch, dtype_name(name), None), torch.dtype):
            raise self.wrong(f"unknown dtype {name!r}")
        return name

    def shape(self, lengths: frozenset[str]) -> tuple[int | str, ...]:
        shape = tuple(self.items("shape"))
        for size in shape:
            if not (is_a(size, int) and size >= 0) and not (
                isinstance(size, str) and size in lengths
            ):
                raise self.wrong(f"the shape {list(shape)} is not valid")
        return shape


def refs(value: object) -> Iterator[Ref]:
    """Every `Ref` in an argument, at any depth."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from refs(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from refs(item)


def dtype_name(dtype: torch.dtype | str) -> str:
    """A dtype's name without its module: `int64`, `float32`."""
    return str(dtype).removeprefix("torch.")


def _tensor_digest(tensor: torch.Tensor) -> str:
    value = tensor.detach().cpu().contiguous()
    head = f"{dtype_name(value.dtype)} {list(value.shape)} ".encode()
    data = value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return hashlib.sha256(head + data).hexdigest()
