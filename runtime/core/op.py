"""The `mpc` dialect: the base class of its ops, and their registry."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from functools import reduce
from typing import Any, ClassVar

import torch

from mergec.runtime.core.spec import Cost, Vis

_LIBRARY = torch.library.Library("mpc", "DEF")

REGISTRY: dict[str, type[Op]] = {}
"""Every op of the dialect by its name, without the `mpc.` prefix."""


class Op:
    """One op of the dialect. A subclass registers itself as `torch.ops.mpc.<name>`.

    name, schema: as torch.library takes them.
    reference: the meaning in the clear on ordinary tensors; shapes come from it on fake tensors.
    visibility: who may know the result, from who knows the tensor operands.
    operands: for each tensor operand that is shared, the form the protocol takes it in:
        "share" (any number of fractional bits), "window" (a share with no more than
        `runtime.protocols.saturate.MAX_INPUT_FRAC` of them), "fixed" (a share truncated to the
        program's fractional bits), "masked" (opened to both under a mask, fixed), "sent" (opened to
        the server under a mask that the client knows, with as many as its products have room for).
        `forms` says it where it depends on the arguments.
    weights: operands that, when they are constants of the server's, held or shared, go under a
        static mask.
    domain: the inputs, of the first operand, that the protocol is made for; beyond them the result
        may be that of another input. The compiler refuses a program whose calibration comes near.
    measure: what calibration has to know of a call, besides the size of its values.
    scale: fractional bits of the result; in place of a shared operand it gets
        that operand's, in place of any other tensor its visibility.
    cost: rounds and bytes from operand values that carry shapes (see `runtime.core.values`).
    protocol: the two-party protocol, a generator that yields messages (`runtime.core.messages`).
    stock: the same op by CrypTen's own protocols, on CrypTen tensors.
    """

    name: ClassVar[str]
    schema: ClassVar[str]
    operands: ClassVar[dict[str, str]] = {}
    weights: ClassVar[tuple[str, ...]] = ()
    domain: ClassVar[tuple[float, float]] = (-math.inf, math.inf)

    @staticmethod
    def reference(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    @classmethod
    def visibility(cls, *operands: Vis) -> Vis:
        return reduce(Vis.join, operands, Vis.PUBLIC)

    @classmethod
    def known_to(cls, *operands: Vis) -> Vis | None:
        """Who can compute the op alone, in the clear; None if that takes the protocol."""
        vis = cls.visibility(*operands)
        return None if vis is Vis.SHARED else vis

    @classmethod
    def forms(cls, *args: Any, **kwargs: Any) -> dict[str, str]:
        """`operands`, for a call with these arguments; in place of a tensor its visibility."""
        return cls.operands

    @classmethod
    def scale(cls, *args: Any, **kwargs: Any) -> int:
        """Fractional bits of the result; the keyword `fixed` gives the program's own."""
        return int(kwargs["fixed"])

    @classmethod
    def cost(cls, *args: Any, **kwargs: Any) -> Cost:
        raise NotImplementedError(f"mpc.{cls.name} has no cost formula")

    @classmethod
    def measure(cls, *args: Any) -> dict[str, float]:
        """Numbers by name, from the operands in the clear; over all calls the largest counts."""
        return {}

    @classmethod
    def variants(cls, *args: Any, **kwargs: Any) -> Iterable[dict[str, Any]]:
        """Settings of its literals that compute the same at different cost, for the compiler."""
        return ()

    @classmethod
    def protocol(cls, ctx: Any, *args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        raise NotImplementedError(f"mpc.{cls.name} has no protocol")

    @classmethod
    def stock(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"mpc.{cls.name} has no stock CrypTen protocol")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name in REGISTRY:
            raise TypeError(f"mpc.{cls.name} is defined by {REGISTRY[cls.name].__module__} already")
        REGISTRY[cls.name] = cls
        _LIBRARY.define(cls.name + cls.schema)
        _LIBRARY.impl(cls.name, cls.reference, "CompositeExplicitAutograd")


def target(name: str) -> Callable[..., Any]:
    """The `torch.ops.mpc.<name>.default` overload, for building and matching graph nodes."""
    overload: Callable[..., Any] = getattr(torch.ops.mpc, name).default
    return overload
