"""What the products of normalized rows share; see `rms_norm_linear` and `layer_norm_linear`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import Kind, Op, Positions
from mergec.runtime.core.spec import FRACTIONAL_BITS, Cost
from mergec.runtime.core.values import Held, Shared, Weight
from mergec.runtime.ops.linear import Linear
from mergec.runtime.ops.rms_norm import row_bound
from mergec.runtime.protocols.columns import factors
from mergec.runtime.protocols.deferred import (
    Deferred,
    deferred_norm,
    deferred_norm_cost,
    deferred_norm_wide,
    fits_wide_product,
)
from mergec.runtime.protocols.normalize import SCALED_FRAC, RowNorm, normalize, normalize_cost
from mergec.runtime.protocols.truncate import truncate, truncate_cost
from mergec.runtime.protocols.weights import Constant, add_held, linear, move, move_cost
from mergec.runtime.protocols.wide import added_wide


class NormedLinear(Op, abstract=True):
    """norm(x) @ weight.T + bias, where the norm has neither gain nor bias.

    x [..., I], shared at any number of fractional bits; weight [O, I] and bias [O], constants of
    the server's, held or shared. The result [..., O] is shared, with the fractional bits of a
    normalized row and of the weight. bound: as in `rms_norm`; bits, parts: as in `mpc.linear`.

    There are two protocols. A step of up to `rows` rows runs `deferred_norm`, which scales the
    product instead of the row. Any other step normalizes the rows, opens them for the product, and
    multiplies, as `rms_norm` and `linear` do: fewer bytes, and a round more. The number of rows is
    public. fine: whether the second way opens normalized rows with their 32 fractional bits; if
    not, it truncates them to 16 first, in one more round. The first never does, and returns as many
    bits. kept: the most fractional bits that a row has in the product of the first way, so that the
    product fits into the ring before it is scaled.

    columns: as in `rms_norm`, for the product after it; empty for a LayerNorm. wide: whether the
    first way returns shares modulo 2**128, which are truncated without a message. It takes more
    dealt bytes, and a weight and a bias that the server holds; with exact rounding it is not used.

    Error of the first way: that of the row with `kept` bits times the weight as it is rounded,
    times the row's scale; 2**-14 of the result; and two units of 2**-16. What each party sees:
    `deferred_norm`; and `normalize`, `truncate` and `weights.move`.
    """

    schema = (
        "(Tensor x, Tensor weight, Tensor? bias, float eps, float bound=0.0, int bits=0, "
        "int[] parts=[], bool fine=True, int kept=0, int rows=0, int[] columns=[], "
        "bool wide=False) -> Tensor"
    )
    operands = {"x": "share"}
    weights = ("weight",)
    positions = Positions.ROWS
    kind = Kind.LINEAR

    norm: ClassVar[type[Op]]
    """The op of the norm alone."""

    @staticmethod
    def centred(rows: torch.Tensor) -> torch.Tensor:
        """The rows whose size the norm divides by, up to a factor of `factor`; exact and local."""
        raise NotImplementedError

    @staticmethod
    def factor(size: int) -> int:
        """By how much `centred` multiplies rows of this size."""
        raise NotImplementedError

    @classmethod
    def reference(
        cls,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
        bound: float = 0.0,
        bits: int = 0,
        parts: Sequence[int] = (),
        fine: bool = True,
        kept: int = 0,
        rows: int = 0,
        columns: Sequence[int] = (),
        wide: bool = False,
    ) -> torch.Tensor:
        named = {"columns": columns} if columns else {}
        return Linear.reference(cls.norm.reference(x, *cls._nothing(), eps, **named), weight, bias)

    @classmethod
    def inner_bits(cls, shape: Sequence[int]) -> float:
        return cls.norm.inner_bits(shape)

    @classmethod
    def measure(cls, arguments: Mapping[str, Any]) -> dict[str, float]:
        """Of rows and products before they are scaled, and of the factor that scales them.

        Columns are shrunk only after this was measured.
        """
        x, weight = arguments["x"], arguments["weight"]
        rows = cls.centred(x.double()) / cls.factor(x.shape[-1])
        squares = rows.square().mean(-1)
        return {
            "mean_square": float(squares.max()),
            "unscaled": float((rows.to(weight.dtype) @ weight.T).abs().max()),
            "factor": float((squares + arguments["eps"]).rsqrt().max()),
        }

    @classmethod
    def calibrate(cls, measured: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
        return row_bound(measured)

    @classmethod
    def scale(
        cls,
        x: int,
        weight: object,
        bias: object = None,
        eps: float = 0.0,
        bound: float = 0.0,
        bits: int = 0,
        parts: Sequence[int] = (),
        fine: bool = True,
        kept: int = 0,
        rows: int = 0,
        columns: Sequence[int] = (),
        wide: bool = False,
        *,
        fixed: int,
    ) -> int:
        return (SCALED_FRAC if fine else fixed) + fixed + bits

    @classmethod
    def rounded(cls, fracs: Mapping[str, int], arguments: Mapping[str, Any]) -> torch.Tensor:
        x, weight, bias = arguments["x"], arguments["weight"], arguments["bias"]
        rows, columns, size = arguments["rows"], arguments["columns"], x.shape[-1]
        spec = cls._norm(size, fracs["x"], arguments["eps"], arguments["bound"])
        words = (cls.centred(x.double()) * 2.0 ** fracs["x"]).round()
        if columns:
            words *= factors(columns)
        squares = (words * 2.0**-spec.square_shift).round().square().sum(-1, keepdim=True)
        scale = ((squares + spec.eps_units).clamp(min=1.0) / size).rsqrt()
        drop = cls._drop(spec, arguments["kept"]) if rows else 0
        moved = (words * 2.0**-drop).floor() * 2.0 ** (drop - spec.square_shift)
        if not rows:
            unit = 2.0**-FRACTIONAL_BITS
            moved, scale = (moved * scale / unit).round() * unit, torch.ones_like(scale)
        result = ((moved @ weight.double().T) * scale).to(x.dtype)
        return result if bias is None else result + bias

    @classmethod
    def variants(cls, arguments: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
        return ({"rows": most} for most in sorted({0, arguments["rows"]}))

    @classmethod
    def cost(
        cls,
        x: Shared,
        weight: Constant,
        bias: Held | Shared | None,
        eps: float,
        bound: float = 0.0,
        bits: int = 0,
        parts: Sequence[int] = (),
        fine: bool = True,
        kept: int = 0,
        rows: int = 0,
        columns: Sequence[int] = (),
        wide: bool = False,
        *,
        fixed: int,
    ) -> Cost:
        count = math.prod(x.shape[:-1])
        norm = cls._norm(x.shape[-1], x.frac, eps, bound)
        if count <= rows:
            spec = cls._deferred(norm, weight, parts, fine, kept, fixed)
            return deferred_norm_cost(spec, count, weight, columns, wide)
        size = count * x.shape[-1]
        opened = truncate_cost(size, 0 if fine else SCALED_FRAC - fixed) + move_cost(size, weight)
        product = Cost(offline=8 * count * weight.shape[0])
        return normalize_cost(norm, count, columns) + opened + product

    @classmethod
    def protocol(
        cls,
        ctx: Context,
        x: Shared,
        weight: Constant,
        bias: Held | Shared | None,
        eps: float,
        bound: float = 0.0,
        bits: int = 0,
        parts: Sequence[int] = (),
        fine: bool = True,
        kept: int = 0,
        rows: int = 0,
        columns: Sequence[int] = (),
        wide: bool = False,
    ) -> Protocol:
        """Centre the rows locally, then one of the two ways; adding the bias is local."""
        norm = cls._norm(x.shape[-1], x.frac, eps, bound)
        share = x.share if x.share.is_meta else cls.centred(x.share)
        frac = (SCALED_FRAC if fine else ctx.fixed) + weight.frac
        if math.prod(x.shape[:-1]) <= rows:
            spec = cls._deferred(norm, weight, parts, fine, kept, ctx.fixed)
            if wide and not ctx.exact:
                found = yield from deferred_norm_wide(ctx, share, weight, spec, columns)
                return found if bias is None else added_wide(found, bias, parts)
            share = yield from deferred_norm(ctx, share, weight, spec, columns)
        else:
            share = yield from normalize(ctx, share, norm, columns)
            if not fine:
                share = yield from truncate(ctx, share, SCALED_FRAC - ctx.fixed)
            opened = yield from move(ctx, Shared(share, frac - weight.frac), weight)
            share = linear(ctx, opened, weight)
        return Shared(share if bias is None else add_held(share, bias, frac, parts), frac)

    @classmethod
    def returns_wide(cls, arguments: Mapping[str, Any]) -> bool:
        count = math.prod(arguments["x"].shape[:-1])
        return bool(arguments["wide"]) and count <= arguments["rows"]

    @classmethod
    def fits_wide(cls, arguments: Mapping[str, Any], fixed: int) -> bool:
        """Whether the first way runs on these operands and could return shares modulo 2**128."""
        x, weight = arguments["x"], arguments["weight"]
        if math.prod(x.shape[:-1]) > arguments["rows"] or not isinstance(weight, Weight):
            return False
        norm = cls._norm(x.shape[-1], x.frac, arguments["eps"], arguments["bound"])
        parts, fine, kept = (arguments[name] for name in ("parts", "fine", "kept"))
        spec = cls._deferred(norm, weight, parts, fine, kept, fixed)
        shared = isinstance(arguments["bias"], Shared)
        return not shared and fits_wide_product(spec, weight.shape[0])

    @classmethod
    def stock(
        cls, x: Any, weight: Any, bias: Any, eps: float, bound: float = 0.0, **ways: Any
    ) -> Any:
        """CrypTen's functions for the norm, then for the product, whatever the `ways` of ours."""
        named = {"bound": bound} if "bound" in cls.norm.schema else {}
        return Linear.stock(cls.norm.stock(x, *cls._nothing(), eps, **named), weight, bias)

    @classmethod
    def _nothing(cls) -> list[None]:
        """In place of the norm's gain, and of its bias if it can have one."""
        return [None] * (len(cls.norm.tensors) - 1)

    @classmethod
    def _norm(cls, size: int, frac: int, eps: float, bound: float) -> RowNorm:
        return RowNorm(size, frac + math.log2(cls.factor(size)), eps, bound)

    @staticmethod
    def _drop(norm: RowNorm, kept: int) -> int:
        """Bits that are dropped off the centred row, whose factor counts as fractional bits."""
        return max(0, math.ceil(norm.frac) - kept)

    @classmethod
    def _deferred(
        cls,
        norm: RowNorm,
        weight: Constant,
        parts: Sequence[int],
        fine: bool,
        kept: int,
        fixed: int,
    ) -> Deferred:
        finer = weight.frac if fine else weight.frac + fixed - SCALED_FRAC
        return Deferred(norm, cls._drop(norm, kept), weight.frac, finer, tuple(parts))
