"""The reference table of all ops: operands, results, cost and error, for the documentation."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch

from mergec.runtime.core.cases import PUBLIC, Case
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import FRACTIONAL_BITS, Cost, Vis
from mergec.runtime.core.values import Held, Masked, Sent, Shared, Weight
from mergec.runtime.ops import load_all

COLUMNS = (
    "op",
    "parameters",
    "operands",
    "result",
    "sample call",
    "rounds",
    "online",
    "offline",
    "error",
    "domain",
)


def op_table() -> str:
    """A Markdown table with one row per op, in the order of their names.

    rounds, online and offline (bytes, of both parties together) are what `Op.cost` returns for the
    sample call, the first of the op's `cases`. A share whose number of fractional bits is free has
    32 of them there, as a product does. error: the largest absolute error that the tests allow.
    """
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    return "\n".join([*lines, *(_line(_row(op)) for _, op in sorted(load_all().items()))]) + "\n"


def sample_cost(op: type[Op], case: Case) -> Cost:
    """The cost of a call, from the op's own formula on the shapes of its arguments."""
    parameters = inspect.signature(op.reference).parameters
    forms = _forms(op, case)
    given = [_ghost(arg, forms.get(name)) for name, arg in zip(parameters, case.args, strict=False)]
    return op.cost(*given, fixed=FRACTIONAL_BITS)


def _forms(op: type[Op], case: Case) -> dict[str, str]:
    """The form of each tensor argument of a call."""
    parameters = inspect.signature(op.reference).parameters
    known = [
        _known(arg, case.forms.get(name)) for name, arg in zip(parameters, case.args, strict=False)
    ]
    return {**dict.fromkeys(op.tensors, "fixed"), **op.forms(*known), **case.forms}


def _known(arg: Any, form: str | None) -> Any:
    if not isinstance(arg, torch.Tensor):
        return arg
    return {"weight": Vis.SERVER, "held": Vis.SERVER, PUBLIC: Vis.PUBLIC}.get(
        form or "", Vis.SHARED
    )


def _ghost(arg: Any, form: str | None) -> Any:
    """A value that has only a shape, in the form in which the protocol expects the argument."""
    if not isinstance(arg, torch.Tensor) or form == PUBLIC:
        return arg
    words = torch.empty(arg.shape, dtype=torch.int64, device="meta")
    if form in ("masked", "cache", "shared"):
        return Masked(words, words, FRACTIONAL_BITS)
    if form == "sent":
        return Sent(words, words, FRACTIONAL_BITS)
    if form == "weight":
        return Weight(words, words, words, FRACTIONAL_BITS)
    if form == "held":
        return Held(Vis.SERVER if arg.is_floating_point() else Vis.CLIENT, words)
    return Shared(words, FRACTIONAL_BITS if form == "fixed" else 2 * FRACTIONAL_BITS)


def _row(op: type[Op]) -> list[str]:
    case = next(case for case in op.cases() if case.error is not None)
    parameters = inspect.signature(op.reference).parameters
    used = dict(zip(parameters, case.args, strict=False))
    forms = _forms(op, case)
    call = ", ".join(f"{name} {_text(value)}" for name, value in used.items())
    taken = [f"{name}: {forms[name]}" for name in op.tensors if used.get(name) is not None]
    cost = sample_cost(op, case)
    low, high = op.domain
    bounded = math.isfinite(low) or math.isfinite(high)
    return [
        f"`mpc.{op.name}`",
        f"`{op.schema.removesuffix(' -> Tensor')}`",
        ", ".join(taken),
        op.result,
        call,
        str(cost.rounds),
        str(cost.online),
        str(cost.offline),
        f"{case.error:g}",
        f"{_power(low)} to {_power(high)}" if bounded else "any",
    ]


def _power(end: float) -> str:
    """A bound of a domain, as a power of two if it is one."""
    mantissa, exponent = math.frexp(abs(end))
    if mantissa != 0.5:
        return f"{end:g}"
    return f"{'-' if end < 0 else ''}2^{exponent - 1}"


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "×".join(map(str, value.shape)) or "scalar"
    return f"= {value:g}" if isinstance(value, float) else f"= {value}"


def _line(cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
