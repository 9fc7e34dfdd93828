"""Functions that are not dialect ops: data movement on any value, and arithmetic on public values.

An instruction names one of these functions. Nothing else can be called, and no code is evaluated.
Data movement acts on each share and mask separately, so it needs no communication.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

MOVES = (
    "reshape.default", "view.default", "_unsafe_view.default", "permute.default", "transpose.int",
    "t.default", "unsqueeze.default", "squeeze.dim", "squeeze.default", "expand.default",
    "slice.Tensor", "select.int", "cat.default", "stack.default", "index.Tensor",
    "index_select.default", "gather.default", "repeat.default", "repeat_interleave.self_int",
    "flatten.using_ints", "alias.default", "clone.default", "unflatten.int", "narrow.default",
)  # fmt: skip
"""Data movement, allowed on secret values."""

PUBLIC = (
    "sym_size.int", "arange.default", "arange.start", "arange.start_step", "full.default",
    "zeros.default", "ones.default", "new_ones.default", "new_zeros.default", "new_full.default",
    "ones_like.default", "zeros_like.default", "full_like.default", "scalar_tensor.default",
    "add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Scalar", "mul.Tensor",
    "mul.Scalar", "div.Tensor", "div.Scalar", "neg.default", "pow.Tensor_Scalar", "pow.Scalar",
    "pow.Tensor_Tensor", "sqrt.default", "rsqrt.default", "reciprocal.default", "exp.default",
    "log.default", "sin.default", "cos.default", "tanh.default", "sigmoid.default", "abs.default",
    "floor.default", "floor_divide.default", "remainder.Scalar", "maximum.default",
    "minimum.default", "min.other", "max.other", "clamp.default", "cumsum.default",
    "sum.dim_IntList", "amax.default",
    "eq.Tensor", "eq.Scalar", "ne.Tensor", "ne.Scalar", "le.Tensor", "le.Scalar", "lt.Tensor",
    "lt.Scalar", "ge.Tensor", "ge.Scalar", "gt.Tensor", "gt.Scalar", "logical_and.default",
    "logical_or.default", "logical_not.default", "bitwise_and.Tensor", "bitwise_or.Tensor",
    "bitwise_not.default", "__and__.Tensor", "__or__.Tensor", "where.self", "where.Scalar",
    "where.ScalarOther", "where.ScalarSelf", "masked_fill.Scalar", "tril.default", "triu.default",
    "to.dtype", "to.dtype_layout", "to.device", "_to_copy.default", "type_as.default",
    "outer.default", "matmul.default", "mm.default", "bmm.default", "embedding.default",
    "split.Tensor", "split_with_sizes.default", "chunk.default", "unbind.int",
)  # fmt: skip
"""Allowed on values that are public or known to one party."""

_SYMBOLIC: dict[str, Callable[..., Any]] = {
    "sym.add": operator.add,
    "sym.sub": operator.sub,
    "sym.mul": operator.mul,
    "sym.floordiv": operator.floordiv,
    "sym.mod": operator.mod,
    "sym.neg": operator.neg,
    "sym.getitem": operator.getitem,
    "sym.max": max,
    "sym.min": min,
}


def _overload(name: str) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    result: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload)
    return result


TABLE: dict[str, Callable[..., Any]] = {
    **{f"aten.{name}": _overload(name) for name in (*MOVES, *PUBLIC)},
    **_SYMBOLIC,
}
# The same functions through a shorter path into torch, as each step calls them hundreds of times.
TABLE["aten.reshape.default"] = torch.reshape
TABLE["aten.permute.default"] = torch.permute
TABLE["aten.transpose.int"] = torch.transpose
TABLE["aten.unsqueeze.default"] = torch.unsqueeze
# A view of a share may not be contiguous where the model's own tensor was.
TABLE["aten.view.default"] = TABLE["aten._unsafe_view.default"] = torch.reshape

MOVE_NAMES = frozenset({*(f"aten.{name}" for name in MOVES), "sym.getitem"})

SIZE = "aten.sym_size.int"
"""A length: public, whatever tensor it is the length of."""

_SPLITS = ("split.Tensor", "split_with_sizes.default", "chunk.default", "unbind.int")
SECRET_MOVES = MOVE_NAMES | {f"aten.{name}" for name in _SPLITS} | {SIZE}
"""What a program may call on shares and masks. Anything else would compute with single shares."""

_VALUE_DEPENDENT = {
    "aten.index.Tensor": {"indices"},
    "aten.index_select.default": {"index"},
    "aten.gather.default": {"index"},
    "aten.embedding.default": {"indices"},
    "aten.floor_divide.default": {"other"},
}
"""Parameters whose values decide the result's shape, or whether the call fails. These must be
public: lengths and failures are visible to the other party."""


def secret_parameters(target: str) -> set[int | str]:
    """Which arguments of a function may be secret, as positions and names.

    All others must be public: numbers, lists of numbers and flags, because a tensor in their place
    is read as a number; tensors whose values decide the shape of the result or whether the call
    fails; and arguments that the function does not have. So the shape of the result follows from
    shapes and public values alone, and no secret value makes the call fail. Raises KeyError if the
    target is not allowed.
    """
    function(target)
    if not target.startswith("aten."):
        # A list or a tensor may be secret, its index not; all else here is arithmetic on lengths.
        return {0} if target == "sym.getitem" else set()
    named = _VALUE_DEPENDENT.get(target, set())
    overload: Any = _overload(target.removeprefix("aten."))
    return {
        key
        for place, argument in enumerate(overload._schema.arguments)
        if "Tensor" in str(argument.type) and argument.name not in named
        for key in (place, argument.name)
    }


_NAMES: dict[Any, str] = {_overload(name): f"aten.{name}" for name in (*MOVES, *PUBLIC)}
_NAMES |= {call: name for name, call in _SYMBOLIC.items()}
_NAMES |= {torch.sym_max: "sym.max", torch.sym_min: "sym.min"}

_LITERALS = {
    f"torch.{name}": getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
        "bool", "strided", "contiguous_format", "preserve_format",
    )
}  # fmt: skip
_DEVICE = "torch.device"


def function(target: str) -> Callable[..., Any]:
    """The callable for an instruction's target. Raises KeyError if the target is not allowed."""
    try:
        return TABLE[target]
    except KeyError:
        raise KeyError(f"{target} is not a function that a program may call") from None


def target_name(call: Any) -> str:
    """The target of an instruction for a graph node's callable."""
    if call in _NAMES:
        return _NAMES[call]
    if isinstance(call, torch._ops.OpOverload) and call.namespace == "mpc":
        return f"mpc.{call._schema.name.partition('::')[2]}"
    return str(call)


def encode_literal(value: Any) -> Any:
    """A literal argument in a form that JSON can store: dtypes and devices become strings.

    Raises TypeError if the value has no such form.
    """
    if isinstance(value, torch.device):
        return _DEVICE
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    raise TypeError(f"{value!r} cannot be part of a program")


def decode_literal(value: Any, device: torch.device) -> Any:
    """The argument that a stored literal represents; any device becomes the party's own."""
    if isinstance(value, str):
        return device if value == _DEVICE else _LITERALS.get(value, value)
    return value
