"""The ONNX graph of a bundle: valid, complete, and without what the role may not know."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from mergec.compiler.backend.onnx_export import ValueType, to_onnx
from mergec.runtime.core.errors import MergecError
from mergec.runtime.core.spec import ROLES
from mergec.runtime.program.bundle import GRAPH, save_bundle
from mergec.runtime.program.program import RoleProgram
from tests.fixtures import VOCAB, WIDTH, tiny, weights

TYPES = {
    "logits": ValueType("float32", (1, "new", VOCAB)),
    "cache.out": ValueType("float32", (1, 1, "past + new", WIDTH)),
    "norm": ValueType("float32", (1, "new", WIDTH)),
}


def export(program: RoleProgram, folder: Path) -> Path:
    """A bundle that contains its graph."""
    data = lambda place: to_onnx(program, TYPES, place).SerializeToString()  # noqa: E731
    return save_bundle(program, folder, {GRAPH: data}) / GRAPH


@pytest.mark.parametrize("role", ROLES)
def test_checks_and_loads(tmp_path: Path, role: str) -> None:
    program = tiny(role)
    file = export(program, tmp_path / role)
    onnx.checker.check_model(str(file))
    model = onnx.load(str(file))
    assert [node.name for node in model.graph.node] == [i.name for i in program.instructions]
    assert {node.domain for node in model.graph.node} == {"aten", "mpc", "sym"}
    assert [o.name for o in model.graph.output] == program.outputs
    props = {p.key: p.value for p in model.metadata_props}
    assert props["role"] == role


@pytest.mark.parametrize("role", ["client", "dealer"])
def test_weights_are_inputs_where_they_are_not_held(tmp_path: Path, role: str) -> None:
    file = export(tiny(role), tmp_path / role)
    graph = onnx.load(str(file)).graph
    assert [i.name for i in graph.initializer] == ["cos"]
    inputs = {i.name: i for i in graph.input}
    assert set(weights()) <= set(inputs)
    assert [d.dim_value for d in inputs["embed.weight"].type.tensor_type.shape.dim] == [11, 8]
    assert file.stat().st_size < 4096


def test_initializers_lie_in_the_tensor_file(tmp_path: Path) -> None:
    file = export(tiny("server"), tmp_path / "server")
    bare = onnx.load(str(file), load_external_data=False).graph
    assert all(i.data_location == TensorProto.EXTERNAL for i in bare.initializer)
    loaded = {i.name: numpy_helper.to_array(i) for i in onnx.load(str(file)).graph.initializer}
    for name, value in weights().items():
        assert np.array_equal(loaded[name], value.numpy())
    assert torch.equal(torch.from_numpy(loaded["cos"].copy()), torch.linspace(0.0, 1.0, 4))


def test_lengths_literals_and_origin(tmp_path: Path) -> None:
    model = to_onnx(tiny("client"), TYPES)
    onnx.checker.check_model(model)
    inputs = {i.name: i for i in model.graph.input}
    assert [d.dim_param or d.dim_value for d in inputs["cache"].type.tensor_type.shape.dim] == [
        1, 1, "past", WIDTH,
    ]  # fmt: skip
    nodes = {node.name: node for node in model.graph.node}
    norm = nodes["norm"]
    assert list(norm.input) == ["embed", "norm.weight"]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in norm.attribute}
    assert attributes["eps"] == pytest.approx(1e-6)
    assert {p.key: p.value for p in norm.metadata_props} == {
        "vis": "shared",
        "frac": "16",
        "module": "model.layers.0",
        "source": "modeling.py:7",
    }
    low = {a.name: onnx.helper.get_attribute_value(a) for a in nodes["low"].attribute}
    assert low == {"amount": float("-inf")}
    mixed = {a.name: onnx.helper.get_attribute_value(a) for a in nodes["heads"].attribute}
    assert mixed == {"b": b"[%norm, 1, x, True, None]"}
    assert list(nodes["heads"].input) == ["up", "norm"]
    view = {a.name: onnx.helper.get_attribute_value(a) for a in nodes["rows"].attribute}
    assert view == {"size": b"[1, %n, 8]"}
    assert list(nodes["rows"].input) == ["up", "n"]
    twice = {a.name: onnx.helper.get_attribute_value(a) for a in nodes["twice"].attribute}
    assert twice == {"arg1": 2}
    assert [v.name for v in model.graph.value_info] == ["norm"]


def test_an_output_of_unknown_type_is_refused() -> None:
    with pytest.raises(MergecError, match="'logits'"):
        to_onnx(tiny("client"), {})
