"""The `mpc` dialect: the base class of its ops, and their registry."""

from __future__ import annotations

import enum
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, ClassVar, Final, Literal, get_args

import torch

from mergec.runtime.core.cases import Case
from mergec.runtime.core.errors import OpError
from mergec.runtime.core.spec import SHARE_FRAC, WINDOW_FRAC, Cost, Vis
from mergec.runtime.core.values import Wide

_LIBRARY = torch.library.Library("mpc", "DEF")
_LIBRARIES: dict[str, torch.library.Library] = {}
"""What torch.library knows of each op; it forgets an op whose library is dropped."""

REGISTRY: dict[str, type[Op]] = {}
"""Every op of the dialect by its name, without the `mpc.` prefix."""

Form = Literal["share", "window", "fixed", "masked", "sent", "cache", "held"]
FORMS: tuple[str, ...] = get_args(Form)
"""The forms in which a protocol can take an operand; see `Op.operands`."""

FINEST: Mapping[str, int] = {"share": SHARE_FRAC, "window": WINDOW_FRAC}
"""Most fractional bits of an operand in the forms that leave them open. A test runs every case of
every op at every number of them, up to this one; the compiler truncates what has more."""

Result = Literal["share", "masked", "sent", "cache", "revealed"]
RESULTS: tuple[str, ...] = get_args(Result)
"""The forms in which a protocol can return its result; see `Op.result`."""


class Positions(enum.Enum):
    """Along which dimensions of its result the compiler may treat each index alone.

    ALL: along all; tensor operands broadcast, as in an element-wise op.
    ROWS: along all but the last; the first operand has the rows, all others serve every row alike.
    MIXED: along none, unless `Op.last_position` says otherwise.
    """

    ALL = "all"
    ROWS = "rows"
    MIXED = "mixed"


class Kind(enum.StrEnum):
    """What an op does for a model. The inspection page draws each kind in a colour of its own."""

    LINEAR = "linear"
    ATTENTION = "attention"
    NORM = "norm"
    ACTIVATION = "activation"
    OPENING = "opening"
    ARITHMETIC = "arithmetic"
    MOVEMENT = "movement"


class Last(enum.Enum):
    """Marks an operand, in `Op.last_position`, of which only the last position is needed."""

    LAST = "last"


LAST: Final = Last.LAST


class Op:
    """One op of the dialect: what it means, who may know its result, its cost, and its protocol.

    A subclass registers itself as `torch.ops.mpc.<name>` when its class statement is executed. A
    mistake in it raises OpError, which names the file and the class, and registers nothing. A class
    that only holds what several ops share is declared `class Base(Op, abstract=True)` and is not
    registered. The ops of mergec are the files of `runtime/ops`; another package offers ops as
    entry points of the group `mergec.ops`.

    An op has to state:

    name: what follows `mpc.` in a graph and in a program.
    schema: the parameters, as torch.library takes them. Names, order and defaults must be those of
        `reference`. An op returns one tensor.
    reference: the meaning in the clear, on ordinary tensors. The compiler also runs it on fake
        tensors, to learn the shape of the result.
    cost: rounds and bytes of a call, from operand values that carry shapes alone
        (`runtime.core.values`). A test compares it with what the protocol sends, exactly.
    protocol: the two-party protocol: a generator that yields messages (`runtime.core.messages`).
        All three roles run it, and yield messages of the same kinds, types and shapes: both parties
        run each step on shapes first, and send no message that differs.
    stock, or no_stock: the op by CrypTen's stock protocols, on CrypTen tensors; or in one sentence
        why CrypTen has none.
    cases: sample calls with the largest error of each protocol. Tests run them.

    The remaining attributes have defaults:

    operands: the form in which the protocol takes each tensor operand that is shared. An operand
        that is not named is taken as "fixed".
            "share": a share with up to `FINEST["share"]` fractional bits.
            "window": a share with up to `FINEST["window"]` of them.
            "fixed": a share truncated to the program's fractional bits.
            "masked": opened to both parties under a mask, at the program's fractional bits.
            "sent": opened to the server under a mask that the client knows, with as many
                fractional bits as its products have room for.
            "cache": "masked" or "sent", whichever all readers of the cache take.
            "held": known to one party, never shared.
        Where the form depends on the arguments, override `forms`.
    weights: operands that go under a static mask, opened once in a session, if they are constants
        of the server's, held or shared.
    result: the form of the result: "share", "masked", "sent", "cache" (that of the operands), or
        "revealed" (the client knows it). An op with a "revealed" result is the only kind that may
        make a shared value known; it overrides `visibility` and `known_to`.
    local: True if no call sends a message or needs anything of the dealer, and each party maps its
        own shares linearly. The compiler then may truncate the operands instead of the result.
    positions: along which dimensions each index is worked on alone (`Positions`); a prompt's last
        position is selected before such an op, not after it.
    domain: lower and upper end of the first operand's values that the protocol supports. Beyond
        them the result may be that of another input. The compiler rejects a program whose
        calibration comes near to an end.
    kind: how the inspection page draws the op (`Kind`).
    prepares: the operand, if any, that the op only brings into shape for its consumer. The text of
        a graph names a chain of such ops after their result: `layers.0.attn.q.rotary`.
    parts: operands after which the text of a graph names the values that lead to them, such as "q".
    choosers: operands whose values choose entries of another operand, so that `reference` fails for
        some values. One party's secret may not choose where that party computes the op alone, as
        the other would see the failure; the protocol has to accept every value.

    A bundle refers to an op by its name alone and holds none of its code. All three roles need the
    package that offers the op, in the same version: the handshake compares the version of mergec
    and the hash of the program, not the versions of other packages.

    Example:
        >>> class Triple(Op):
        ...     \"\"\"3 x, element by element; local.\"\"\"
        ...
        ...     name = "triple"
        ...     schema = "(Tensor x) -> Tensor"
        ...     operands = {"x": "share"}
        ...     local = True
        ...     positions = Positions.ALL
        ...     no_stock = "a product with 3 is not worth one"
        ...
        ...     @staticmethod
        ...     def reference(x):
        ...         return 3 * x
        ...
        ...     @staticmethod
        ...     def cases():
        ...         return [Case([torch.tensor([1.0, -2.5])], error=1e-4)]
        ...
        ...     @classmethod
        ...     def scale(cls, x, *, fixed):
        ...         return x
        ...
        ...     @classmethod
        ...     def cost(cls, x, *, fixed):
        ...         return Cost()
        ...
        ...     @classmethod
        ...     def protocol(cls, ctx, x):
        ...         yield from ()
        ...         return Shared(3 * x.share, x.frac)
        >>> torch.ops.mpc.triple(torch.tensor(2.0))
        tensor(6.)
    """

    name: ClassVar[str]
    schema: ClassVar[str]
    operands: ClassVar[Mapping[str, Form]] = {}
    weights: ClassVar[tuple[str, ...]] = ()
    result: ClassVar[Result] = "share"
    local: ClassVar[bool] = False
    positions: ClassVar[Positions] = Positions.MIXED
    domain: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    kind: ClassVar[Kind] = Kind.ARITHMETIC
    prepares: ClassVar[str] = ""
    parts: ClassVar[tuple[str, ...]] = ()
    choosers: ClassVar[tuple[str, ...]] = ()
    no_stock: ClassVar[str] = ""

    tensors: ClassVar[tuple[str, ...]]
    """The tensor operands in the order of the schema; set by the registration."""

    @staticmethod
    def reference(*args: Any, **kwargs: Any) -> Any:
        """The result in the clear."""
        raise NotImplementedError

    @staticmethod
    def cases() -> Sequence[Case]:
        """Sample calls, of which at least one has an `error`, and one a `stock` if there is one."""
        return ()

    @classmethod
    def visibility(cls, *operands: Vis) -> Vis:
        """Who may know the result, from who knows each tensor operand."""
        return reduce(Vis.join, operands, Vis.PUBLIC)

    @classmethod
    def known_to(cls, *operands: Vis) -> Vis | None:
        """Who can compute the op alone, in the clear; None if it needs the protocol."""
        vis = cls.visibility(*operands)
        return None if vis is Vis.SHARED else vis

    @classmethod
    def forms(cls, *args: Any, **kwargs: Any) -> Mapping[str, Form]:
        """`operands` for a call with these arguments, each tensor replaced by its visibility."""
        return cls.operands

    @classmethod
    def scale(cls, *args: Any, **kwargs: Any) -> int:
        """Fractional bits of the result; by default the program's, which is the keyword `fixed`.

        A shared operand is replaced by its number of fractional bits, any other tensor by its
        visibility.
        """
        return int(kwargs["fixed"])

    @classmethod
    def inner_bits(cls, shape: Sequence[int]) -> float:
        """Bits that the protocol adds to a first operand of this shape before it truncates it."""
        return 0.0

    @classmethod
    def last_position(cls, dim: int) -> Mapping[str, Any] | None:
        """How to compute the result's last position along `dim` alone; None if that cannot be.

        dim counts from the end: -1 is the last dimension. Returns by parameter what changes: LAST
        for an operand of which only the last position is needed, along the dimension that
        broadcasts to `dim`; any other value replaces the argument.
        """
        if cls.positions is Positions.ALL:
            return dict.fromkeys(cls.tensors, LAST)
        if cls.positions is Positions.ROWS and dim < -1:
            return {cls.tensors[0]: LAST}
        return None

    @classmethod
    def cost(cls, *args: Any, **kwargs: Any) -> Cost:
        """Rounds and bytes of a call; the keyword `fixed` is the program's fractional bits."""
        raise NotImplementedError

    @classmethod
    def measure(cls, arguments: Mapping[str, Any]) -> dict[str, float]:
        """What calibration must know about a call in addition to the range of its result, by name.

        arguments: all of the call, in the clear. Of all calls calibration keeps the largest of each
        number.
        """
        return {}

    @classmethod
    def calibrate(cls, measured: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments to set in a call, from what `measure` returned in calibration."""
        return {}

    @classmethod
    def refusal(cls, measured: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
        """Why the protocol cannot run a call with the numbers of `measure`; empty if it can."""
        return ""

    @classmethod
    def rounded(cls, fracs: Mapping[str, int], arguments: Mapping[str, Any]) -> Any:
        """`reference` with the roundings inside of the protocol, for `compiler.backend.rounding`.

        Needed only if the protocol rounds more than operands and result, or coarser. fracs:
        fractional bits of each tensor operand, by name. arguments: all of the call, in the clear.
        """
        return cls.reference(**arguments)

    @classmethod
    def inexact(cls, arguments: Mapping[str, Any]) -> str:
        """Why a call cannot keep its roundings from the client; empty if it can."""
        return ""

    @classmethod
    def variants(cls, arguments: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
        """Arguments that compute the same at another cost; the compiler picks the cheapest.

        arguments: all of the call, operands as in `cost`.
        """
        return ()

    @classmethod
    def far_variants(cls, arguments: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
        """Further ones that save rounds for local work, which costs do not count.

        The compiler looks at them where messages take so long that such work does not matter
        (`Network.far`).
        """
        return ()

    @classmethod
    def supplies(cls, arguments: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
        """Arguments that compute the same with the same messages, from other dealt bytes.

        They differ in how many bytes the dealer sends to which party. The compiler chooses among
        them where the client's link to the dealer is the narrow one. The first is the default.
        """
        return ()

    @classmethod
    def returns_wide(cls, arguments: Mapping[str, Any]) -> bool:
        """Whether a call returns shares modulo 2**128 (`values.Wide`)."""
        return cls.local and any(isinstance(value, Wide) for value in arguments.values())

    @classmethod
    def protocol(cls, ctx: Any, *args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        """The op on the values of one role; the generator yields messages and gets the replies."""
        raise NotImplementedError

    @classmethod
    def stock(cls, *args: Any, **kwargs: Any) -> Any:
        """The op by CrypTen's stock protocols."""
        raise NotImplementedError(
            f"CrypTen has no stock protocol for mpc.{cls.name}: {cls.no_stock}"
        )

    def __init_subclass__(cls, *, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not abstract:
            _register(cls)


def unregister(name: str) -> None:
    """Forget an op, as if its class had never been defined."""
    del REGISTRY[name]
    del _LIBRARIES[name]


def target(name: str) -> Callable[..., Any]:
    """The `torch.ops.mpc.<name>.default` overload, for building and matching graph nodes."""
    overload: Callable[..., Any] = getattr(torch.ops.mpc, name).default
    return overload


def _register(op: type[Op]) -> None:
    """Check an op as a whole, then make it known to torch and to the registry."""
    name = op.__dict__.get("name")
    if not (isinstance(name, str) and name.isidentifier()):
        raise _mistake(op, 'it has no name of its own, such as name = "triple"')
    if name in REGISTRY:
        raise _mistake(op, f"mpc.{name} is defined already, by {_place(REGISTRY[name])}")
    if not isinstance(getattr(op, "schema", None), str):
        raise _mistake(op, 'it has no schema, such as schema = "(Tensor x) -> Tensor"')
    for needed in ("reference", "cost", "protocol"):
        if _is_default(op, needed):
            raise _mistake(op, f"it does not define `{needed}`")
    if not inspect.isgeneratorfunction(op.protocol):
        raise _mistake(op, "its `protocol` is not a generator: it has to contain a `yield`")
    if _is_default(op, "stock") != bool(op.no_stock):
        raise _mistake(op, "it must define `stock`, or say in `no_stock` why CrypTen has none")
    op.tensors = _check_schema(op)
    _check_attributes(op)
    library = torch.library.Library("mpc", "FRAGMENT")
    try:
        library.define(name + op.schema)
        library.impl(name, op.reference, "CompositeExplicitAutograd")
    except RuntimeError as error:
        raise _mistake(op, f"torch.library rejects it: {str(error).splitlines()[0]}") from error
    REGISTRY[name], _LIBRARIES[name] = op, library


def _check_schema(op: type[Op]) -> tuple[str, ...]:
    """The tensor operands' names, if schema and reference agree."""
    try:
        parsed = torch._C.parse_schema(f"mpc::{op.name}{op.schema}")
    except RuntimeError as error:
        reason = next(line for line in str(error).splitlines() if line.strip())
        raise _mistake(op, f"its schema {op.schema!r} cannot be parsed: {reason}") from error
    if [str(value.type) for value in parsed.returns] != ["Tensor"]:
        raise _mistake(op, f"its schema {op.schema!r} must return one Tensor")
    written = {
        argument.name: _plain(argument.default_value) if argument.has_default_value() else _NONE
        for argument in parsed.arguments
    }
    meant = {
        parameter.name: _NONE if parameter.default is _NONE else _plain(parameter.default)
        for parameter in inspect.signature(op.reference).parameters.values()
    }
    if list(written) != list(meant):
        raise _mistake(
            op,
            f"its schema has the parameters ({', '.join(written)}), its reference has "
            f"({', '.join(meant)})",
        )
    for name, default in written.items():
        if default is not meant[name] and default != meant[name]:
            raise _mistake(
                op,
                f"the default of {name!r} is {_default(default)} in its schema, and "
                f"{_default(meant[name])} in its reference",
            )
    kinds = {argument.name: str(argument.type) for argument in parsed.arguments}
    return tuple(name for name, kind in kinds.items() if kind in ("Tensor", "Optional[Tensor]"))


def _check_attributes(op: type[Op]) -> None:
    """Raise OpError for an attribute that names what does not exist."""
    if not op.tensors:
        raise _mistake(op, "its schema has no tensor operand")
    named: dict[str, Sequence[str]] = {
        "operands": list(op.operands),
        "weights": op.weights,
        "parts": op.parts,
        "prepares": [op.prepares] if op.prepares else [],
    }
    for attribute, names in named.items():
        for name in names:
            if isinstance(names, str) or name not in op.tensors:
                raise _mistake(
                    op,
                    f"`{attribute}` names {name!r}, which is not a tensor operand; it has "
                    f"{', '.join(op.tensors)}",
                )
    for name, form in op.operands.items():
        if form not in FORMS:
            raise _mistake(op, f"the form {form!r} of {name!r} is none of {', '.join(FORMS)}")
    if op.result not in RESULTS:
        raise _mistake(op, f"its result {op.result!r} is none of {', '.join(RESULTS)}")
    _check_visibility(op)
    for attribute, kind in (("positions", Positions), ("kind", Kind)):
        if not isinstance(getattr(op, attribute), kind):
            raise _mistake(op, f"`{attribute}` is no {kind.__name__}")
    if not (isinstance(op.domain, tuple) and len(op.domain) == 2 and op.domain[0] < op.domain[1]):
        raise _mistake(op, f"its domain {op.domain!r} is not a pair (lower end, upper end)")


def _check_visibility(op: type[Op]) -> None:
    """Raise OpError if some operands would make a value known to who must not know it."""
    for operands in itertools.product(Vis, repeat=len(op.tensors)):
        joined = reduce(Vis.join, operands)
        seen, alone = op.visibility(*operands), op.known_to(*operands)
        given = ", ".join(vis.value for vis in operands)
        if set(operands) == {Vis.SHARED}:
            fine = seen is (Vis.CLIENT if op.result == "revealed" else Vis.SHARED)
        else:
            fine = joined.join(seen) is seen or (op.result == "revealed" and seen is Vis.CLIENT)
        if not fine:
            raise _mistake(
                op,
                f"of operands ({given}) `visibility` returns {seen.value}; only an op with the "
                'result "revealed" may make a value known, to the client alone',
            )
        if alone is not None and (alone is Vis.SHARED or joined.join(alone) is not alone):
            raise _mistake(
                op,
                f"of operands ({given}) `known_to` returns {alone.value}, who does not know all of "
                "them; return None where the protocol is needed",
            )


_NONE = inspect.Parameter.empty


def _is_default(op: type[Op], name: str) -> bool:
    """Whether an op has a method from `Op` itself."""
    mine, default = getattr(op, name), getattr(Op, name)
    return bool(getattr(mine, "__func__", mine) is getattr(default, "__func__", default))


def _plain(default: Any) -> Any:
    return list(default) if isinstance(default, (list, tuple)) else default


def _default(value: Any) -> str:
    return "missing" if value is _NONE else repr(value)


def _place(op: type[Op]) -> str:
    """The file and the name of a class."""
    module = sys.modules.get(op.__module__)
    return f"{getattr(module, '__file__', None) or op.__module__}: class {op.__qualname__}"


def _mistake(op: type[Op], reason: str) -> OpError:
    return OpError(f"{_place(op)}: {reason}")
