"""Mistakes in the class of an op are refused where they are made, and register nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mergec.runtime.core.cases import Case
from mergec.runtime.core.errors import OpError
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.op import REGISTRY, Op, unregister
from mergec.runtime.core.spec import Cost, Vis
from mergec.runtime.ops import load_all

load_all()


def _reference(x: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
    return x * factor


def _protocol(cls: type[Op], ctx: Any, x: Any, factor: float = 2.0) -> Protocol:
    yield from ()
    return x


def body(**changes: Any) -> dict[str, Any]:
    """The attributes of an op without a mistake, but for the changes; None leaves one out."""
    given = {
        "__module__": __name__,
        "name": "toy",
        "schema": "(Tensor x, float factor=2.0) -> Tensor",
        "no_stock": "there is no need for one",
        "reference": staticmethod(_reference),
        "cases": staticmethod(lambda: [Case([torch.ones(2)], 1e-4)]),
        "cost": classmethod(lambda cls, x, factor=2.0, *, fixed: Cost()),
        "protocol": classmethod(_protocol),
        **changes,
    }
    return {key: value for key, value in given.items() if value is not None}


def define(**changes: Any) -> type[Op]:
    return type("Toy", (Op,), body(**changes))


@pytest.fixture
def after() -> Iterator[None]:
    yield
    unregister("toy")


def test_an_op_is_registered_and_forgotten() -> None:
    toy = define()
    assert REGISTRY["toy"] is toy
    assert toy.tensors == ("x",)
    assert torch.ops.mpc.toy.default(torch.tensor(3.0)) == 6
    unregister("toy")
    assert "toy" not in REGISTRY
    assert not hasattr(torch.ops.mpc, "toy")
    define()
    unregister("toy")


MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("no name", {"name": None}, "no name of its own"),
    ("a name that is none", {"name": "to y"}, "no name of its own"),
    (
        "a name that is taken",
        {"name": "add"},
        r"mpc.add is defined already, by .*add.py: class Add",
    ),
    ("no schema", {"schema": None}, "no schema"),
    ("a schema that is none", {"schema": "(Tensor x"}, "cannot be parsed"),
    ("two results", {"schema": "(Tensor x, float factor=2.0) -> (Tensor, Tensor)"}, "one Tensor"),
    ("no reference", {"reference": None}, "does not define `reference`"),
    ("no cost", {"cost": None}, "does not define `cost`"),
    ("no protocol", {"protocol": None}, "does not define `protocol`"),
    ("nothing about CrypTen", {"no_stock": None}, "`no_stock` why CrypTen has none"),
    (
        "stock and why there is none",
        {"stock": classmethod(lambda cls, x, factor=2.0: x)},
        "`no_stock` why CrypTen has none",
    ),
    (
        "another parameter",
        {"schema": "(Tensor y, float factor=2.0) -> Tensor"},
        r"the parameters \(y, factor\), its reference has \(x, factor\)",
    ),
    (
        "another order",
        {"schema": "(float factor, Tensor x) -> Tensor"},
        r"the parameters \(factor, x\)",
    ),
    ("too few parameters", {"schema": "(Tensor x) -> Tensor"}, r"the parameters \(x\), its"),
    (
        "another default",
        {"schema": "(Tensor x, float factor=3.0) -> Tensor"},
        "'factor' is 3.0 in its schema, and 2.0 in its reference",
    ),
    (
        "a missing default",
        {"schema": "(Tensor x, float factor) -> Tensor"},
        "'factor' is missing in its schema, and 2.0 in its reference",
    ),
    ("an unknown form", {"operands": {"x": "maskd"}}, "the form 'maskd' of 'x' is none of share,"),
    ("an operand that is none", {"operands": {"z": "share"}}, "`operands` names 'z', which is not"),
    ("a number as an operand", {"operands": {"factor": "share"}}, "`operands` names 'factor'"),
    ("a weight that is none", {"weights": ("w",)}, "`weights` names 'w'"),
    ("a string of weights", {"weights": "x"}, "`weights` names 'x'"),
    ("a part that is none", {"parts": ("q",)}, "`parts` names 'q'"),
    ("a prepared operand that is none", {"prepares": "q"}, "`prepares` names 'q'"),
    ("an unknown result", {"result": "open"}, "its result 'open' is none of share,"),
    ("unknown positions", {"positions": "all"}, "`positions` is no Positions"),
    ("an unknown kind", {"kind": "activation"}, "`kind` is no Kind"),
    ("a domain upside down", {"domain": (1.0, -1.0)}, "is not a pair"),
    (
        "a secret made public",
        {"visibility": classmethod(lambda cls, *operands: Vis.PUBLIC)},
        "`visibility` returns public",
    ),
    (
        "a share revealed unsaid",
        {"visibility": classmethod(lambda cls, *operands: Vis.CLIENT)},
        'only an op with the result "revealed"',
    ),
    (
        "a party's value made public",
        {"visibility": classmethod(lambda cls, x: x if x is Vis.SHARED else Vis.PUBLIC)},
        r"of operands \(client\) `visibility` returns public",
    ),
    (
        "a share known to a party",
        {"known_to": classmethod(lambda cls, *operands: Vis.SERVER)},
        r"of operands \(client\) `known_to` returns server",
    ),
    (
        "a protocol that yields nothing",
        {"protocol": classmethod(lambda cls, ctx, x, factor=2.0: x)},
        "its `protocol` is not a generator",
    ),
    ("a result revealed to nobody", {"result": "revealed"}, "`visibility` returns shared"),
]


@pytest.mark.parametrize(
    ("changes", "words"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES]
)
def test_a_mistake_is_refused(changes: dict[str, Any], words: str) -> None:
    before = dict(REGISTRY)
    with pytest.raises(OpError, match=words) as caught:
        define(**changes)
    assert str(caught.value).startswith(f"{__file__}: class Toy: ")
    assert "\n" not in str(caught.value)
    assert before == REGISTRY
    assert not hasattr(torch.ops.mpc, "toy")
    define()
    unregister("toy")


@pytest.mark.usefixtures("after")
def test_a_name_that_torch_has_already_is_refused() -> None:
    library = torch.library.Library("mpc", "FRAGMENT")
    library.define("taken(Tensor x) -> Tensor")
    with pytest.raises(OpError, match="library rejects it"):
        define(name="taken")
    assert "taken" not in REGISTRY
    define()


@pytest.mark.usefixtures("after")
def test_an_abstract_class_is_no_op() -> None:
    class Doubles(Op, abstract=True):
        no_stock = "there is no need for one"
        reference = staticmethod(_reference)
        cost = classmethod(lambda cls, x, factor=2.0, *, fixed: Cost())
        protocol = classmethod(_protocol)

    before = set(REGISTRY)

    class Toy(Doubles):
        name = "toy"
        schema = "(Tensor x, float factor=2.0) -> Tensor"

    assert set(REGISTRY) - before == {"toy"}

    with pytest.raises(OpError, match="no name of its own"):

        class Again(Toy):
            """Has the name of its base class alone."""
