"""Applies instructions to values, as far as no protocol is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import Vis
from mergec.runtime.core.values import Held, Masked, Sent, Shared, Weight, Wide, visibility
from mergec.runtime.engine.plan import Planned
from mergec.runtime.protocols.local import as_share
from mergec.runtime.protocols.weights import Constant

_PARTS: dict[type[Any], tuple[str, ...]] = {
    Shared: ("share",),
    Wide: ("low", "high"),
    Masked: ("opened", "mask"),
    Sent: ("opened", "mask"),
}
"""The tensors that make up a secret value, in the order of its constructor."""

_SECRET = tuple(_PARTS)


@dataclass(slots=True)
class Call:
    """An op that no party can compute alone, with its arguments by parameter name."""

    op: type[Op]
    bound: dict[str, Any]


def evaluate(
    context: Context,
    planned: Planned,
    operands: Sequence[Any],
    weights: Mapping[str, Constant],
) -> Any:
    """The result of an instruction; a `Call` if it takes a protocol to compute it.

    operands: in the order of `planned.refs`. weights: constants under static masks, by name; they
    take the places of the operands of that name. Arguments of a `Call` are in the forms that the
    op asks for (`Op.forms`).
    """
    op = planned.op
    if op is None:
        return apply_function(context, planned.call, operands)
    known = op.known_to(*[visibility(value) for value in operands if is_tensor(value)])
    if known is not None:
        return apply_locally(known, planned.call, operands)
    bound = dict(zip(planned.parameters, planned.arguments(operands), strict=True))
    masked = {name: value for name, value in bound.items() if isinstance(value, Masked)}
    if masked:
        forms = op.forms(*[visibility(v) if is_tensor(v) else v for v in bound.values()])
        for name, value in masked.items():
            if forms.get(name) in ("share", "fixed", "window"):
                bound[name] = Shared(as_share(context, value, value.frac), value.frac)
    for parameter, name in planned.constants:
        if name in weights:
            bound[parameter] = weights[name]
    return Call(op, bound)


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor, public or secret."""
    return isinstance(value, (torch.Tensor, Shared, Wide, Masked, Sent, Held, Weight))


def apply_locally(vis: Vis, call: Callable[..., Any], operands: Sequence[Any]) -> Any:
    """Run a plaintext function on public operands and on operands that one party holds.

    vis: who knows the result. At the other roles the operands are meta tensors, and so is the
    result.
    """
    if vis is Vis.PUBLIC:
        return call(*operands)
    away = any(isinstance(value, Held) and value.value.is_meta for value in operands)

    def strip(value: Any) -> Any:
        if isinstance(value, Held):
            return value.value
        if isinstance(value, list):
            return [strip(item) for item in value]
        return value.to("meta") if away and isinstance(value, torch.Tensor) else value

    return _wrap(call(*map(strip, operands)), lambda tensor: Held(vis, tensor))


def apply_function(context: Context, call: Callable[..., Any], operands: Sequence[Any]) -> Any:
    """Run a structural or public function; on a secret value, run it on each of its tensors.

    An operand may be a list of values, such as the result of a split. Secret operands of different
    forms or fractional bits are first converted to shares with the most fractional bits.
    """
    flat = [v for operand in operands for v in (operand if type(operand) is list else [operand])]
    secret = [value for value in flat if isinstance(value, _SECRET)]
    held = [value for value in flat if isinstance(value, Held)]
    if not secret:
        return apply_locally(held[0].vis if held else Vis.PUBLIC, call, operands)
    kind, frac = type(secret[0]), secret[0].frac
    if held or any(type(value) is not kind for value in secret):
        kind, frac = Shared, max(value.frac for value in secret)

        def unify(value: Any) -> Any:
            if isinstance(value, list):
                return [unify(item) for item in value]
            if isinstance(value, (Shared, Masked, Held)):
                return Shared(as_share(context, value, frac), frac)
            return value

        operands = [unify(operand) for operand in operands]
    results = [call(*[_part(v, name) for v in operands]) for name in _PARTS[kind]]
    return _joined(kind, results, frac)


def _part(value: Any, name: str) -> Any:
    if isinstance(value, _SECRET):
        return getattr(value, name)
    return [_part(item, name) for item in value] if type(value) is list else value


def _joined(kind: type[Any], results: Sequence[Any], frac: int) -> Any:
    """The secret value, or list of them, from the results of a function on each of its tensors."""
    if isinstance(results[0], torch.Tensor):
        return kind(*results, frac)
    if isinstance(results[0], (list, tuple)):
        return [_joined(kind, parts, frac) for parts in zip(*results, strict=True)]
    return results[0]


def _wrap(result: Any, wrap: Callable[[torch.Tensor], Any]) -> Any:
    if isinstance(result, torch.Tensor):
        return wrap(result)
    if isinstance(result, (list, tuple)):
        return [_wrap(item, wrap) for item in result]
    return result
