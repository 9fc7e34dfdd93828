"""Exports a role's graph as ONNX, for viewers: one node per instruction, literals as attributes.

The file documents a bundle and is never run. Ops are in the domains `mpc`, `aten` and `sym`. A
constant that the role holds is an initializer stored in the bundle's own tensor file. A constant
that it does not hold is a graph input, so only its name and shape are visible.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import AttributeProto, TensorProto, helper

from mergec.runtime.core.errors import MergecError
from mergec.runtime.core.version import VERSION
from mergec.runtime.program.bundle import TENSORS
from mergec.runtime.program.encoding import dtype_name, refs
from mergec.runtime.program.program import Instruction, Ref, RoleProgram

OPSET = 1
"""Version of each domain; increases when the meaning of an op changes."""

_IR_VERSION = 10
"""The first IR version with metadata on nodes."""

_TYPES = {
    "bool": TensorProto.BOOL,
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
    "int16": TensorProto.INT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
}
_INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True)
class ValueType:
    """Type of a value in the graph: its dtype, and its shape with named lengths."""

    dtype: str
    shape: tuple[int | str, ...]


def to_onnx(
    program: RoleProgram, types: Mapping[str, ValueType], folder: Path | None = None
) -> onnx.ModelProto:
    """The graph of `program`. `types`: types of results; required for outputs, optional for others.

    `folder`: contains the tensor file that initializers refer to; without it there are no
    initializers. Raises MergecError if the type of an output is missing or has no ONNX equivalent.
    """
    missing = [name for name in program.outputs if name not in types]
    if missing:
        raise MergecError(f"the type of the output {missing[0]!r} is unknown; pass it in `types`")
    stored = {} if folder is None else _places(folder / TENSORS)
    initializers, inputs = [], []
    for spec in program.inputs:
        info = _value_info(spec.name, ValueType(spec.dtype, spec.shape))
        _annotate(info, vis=spec.vis.value, frac=spec.frac, cache_output=spec.cache_output)
        inputs.append(info)
    for constant in program.constants:
        place = stored.get(constant.name)
        if constant.name in program.tensors and place is not None:
            initializers.append(_external(constant.name, constant.dtype, constant.shape, place))
        else:
            info = _value_info(constant.name, ValueType(constant.dtype, constant.shape))
            _annotate(info, vis=constant.vis.value, constant="not held by this role")
            inputs.append(info)
    outputs = set(program.outputs)
    graph = helper.make_graph(
        [_node(item) for item in program.instructions],
        str(program.manifest.model or "mergec"),
        inputs,
        [_value_info(name, types[name]) for name in program.outputs],
        initializers,
        doc_string=f"One step as the {program.role} sees it.",
        value_info=[
            _value_info(item.name, types[item.name])
            for item in program.instructions
            if item.name in types and item.name not in outputs
        ],
    )
    domains = sorted({_domain(item)[0] for item in program.instructions} | {"mpc"})
    model = helper.make_model(
        graph,
        producer_name="mergec",
        producer_version=VERSION,
        opset_imports=[helper.make_opsetid(domain, OPSET) for domain in domains],
        ir_version=_IR_VERSION,
    )
    told, manifest = {"role": program.role}, program.manifest
    if manifest.program_hash:
        for key in ("program_hash", "ring_bits", "fractional_bits", "max_length", "lossy"):
            told[key] = str(getattr(manifest, key))
    helper.set_model_props(model, told)
    return model


def read_types(file: Path) -> dict[str, ValueType]:
    """The `types` that were passed to `to_onnx`, read back from its file."""
    dtypes = {number: name for name, number in _TYPES.items()}
    graph = onnx.load(str(file), load_external_data=False).graph
    types = {}
    for info in (*graph.value_info, *graph.output):
        tensor = info.type.tensor_type
        shape = tuple(size.dim_param or size.dim_value for size in tensor.shape.dim)
        types[info.name] = ValueType(dtypes[tensor.elem_type], shape)
    return types


def _domain(item: Instruction) -> tuple[str, str]:
    domain, _, op = item.target.partition(".")
    return domain, op


def _node(item: Instruction) -> onnx.NodeProto:
    domain, op = _domain(item)
    node = onnx.NodeProto()
    node.domain, node.op_type, node.name = domain, op, item.name
    node.output.append(item.name)
    for name, value in _named(item):
        if isinstance(value, Ref):
            node.input.append(value.name)
            continue
        node.input.extend(ref.name for ref in refs(value))
        if value is not None:
            node.attribute.append(_attribute(name, value))
    _annotate(
        node, vis=item.vis.value, frac=item.frac, module=item.module, source=item.source or None
    )
    return node


def _named(item: Instruction) -> Iterator[tuple[str, Any]]:
    """Arguments by their names in the op's schema; `arg0`, `arg1` if there is no schema."""
    names = _argument_names(item.target)
    for position, value in enumerate(item.args):
        yield (names[position] if position < len(names) else f"arg{position}"), value
    yield from item.kwargs.items()


def _argument_names(target: str) -> Sequence[str]:
    found: Any = torch.ops
    for part in target.split("."):
        found = getattr(found, part, None)
    if isinstance(found, torch._ops.OpOverloadPacket):
        found = getattr(found, "default", None)
    schema = getattr(found, "_schema", None)
    return [argument.name for argument in schema.arguments] if schema is not None else []


def _attribute(name: str, value: Any) -> AttributeProto:
    """A literal as an attribute; values without an ONNX attribute type are written as text."""
    if isinstance(value, (list, tuple)):
        if all(_integral(v) for v in value):
            return helper.make_attribute(
                name, [int(v) for v in value], attr_type=AttributeProto.INTS
            )
        if all(isinstance(v, float) or _integral(v) for v in value):
            return helper.make_attribute(
                name, [float(v) for v in value], attr_type=AttributeProto.FLOATS
            )
        return helper.make_attribute(name, _text(value))
    if _integral(value):
        return helper.make_attribute(name, int(value))
    if isinstance(value, float):
        return helper.make_attribute(name, value)
    return helper.make_attribute(name, _text(value))


def _integral(value: object) -> bool:
    return isinstance(value, int) and value in _INT64


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_text(v) for v in value) + "]"
    return f"%{value.name}" if isinstance(value, Ref) else str(value)


def _value_info(name: str, kind: ValueType) -> onnx.ValueInfoProto:
    dtype = _TYPES.get(dtype_name(kind.dtype))
    if dtype is None:
        raise MergecError(f"{name!r} has type {kind.dtype}, which ONNX does not support")
    return helper.make_tensor_value_info(name, dtype, list(kind.shape))


def _external(
    name: str, dtype: str, shape: Sequence[int], place: tuple[int, int]
) -> onnx.TensorProto:
    """An initializer stored in the safetensors file; both formats are little-endian row-major."""
    tensor = onnx.TensorProto()
    tensor.name = name
    tensor.data_type = _TYPES[dtype_name(dtype)]
    tensor.dims.extend(shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", TENSORS), ("offset", place[0]), ("length", place[1])):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    return tensor


def _places(file: Path) -> dict[str, tuple[int, int]]:
    """Offset and length in bytes of each tensor of a safetensors file."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    aliases = header.pop("__metadata__", {})
    places = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        places[name] = (8 + size + start, stop - start)
    return places | {name: places[other] for name, other in aliases.items()}


def _annotate(proto: onnx.NodeProto | onnx.ValueInfoProto, **values: object) -> None:
    for key, value in values.items():
        if value is not None:
            entry = proto.metadata_props.add()
            entry.key, entry.value = key, str(value)
