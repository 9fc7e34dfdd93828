"""The example in the docstring of each pass shows what the pass does."""

from __future__ import annotations

import pytest
from torch import fx

from mergec.compiler.graph.ir import aten, calls, replace
from mergec.compiler.graph.rewriting import Pass
from mergec.passes import available
from mergec.runtime.core.op import target
from tests.passes.examples import check_example


@pytest.mark.parametrize("name", sorted(available()))
def test_before_becomes_after(name: str) -> None:
    check_example(available()[name])


class _Lying(Pass):
    """ReLU becomes tanh.

    Before:
        %x = input : shared 2x4
        %1 = aten.relu.default(%x)
    After:
        %1 = mpc.relu(%x)
    """

    stage = "fuse"
    put, exact = "tanh", False

    def run(self, graph_module: fx.GraphModule) -> int:
        found = [n for n in graph_module.graph.nodes if calls(n, aten.relu.default)]
        for node in found:
            replace(node, target(self.put), node.args)
        return len(found)


class _Inexact(_Lying):
    """Claims to be exact.

    Before:
        %x = input : shared 2x4
        %1 = aten.relu.default(%x)
    After:
        %1 = mpc.tanh(%x)
    """

    exact = True


class _Idle(_Lying):
    """Shows a graph that it does not match.

    Before:
        %x = input : shared 2x4
        %1 = aten.tanh.default(%x)
    After:
        %1 = mpc.tanh(%x)
    """


class _WrongShape(_Lying):
    """Shows a wrong shape.

    Before:
        %x = input : shared 2x4
        %1 = aten.relu.default(%x)
    After:
        %1 = mpc.tanh(%x) : shared 2x5
    """


class _Silent(_Lying):
    """Shows no example."""


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            _Lying,
            r"does not do what its docstring says:(\n.*)*-%1 = mpc.relu(.*\n)*\+%1 = mpc.tanh",
        ),
        (_Inexact, "changes a value of the example"),
        (_Idle, "finds nothing in the Before"),
        (_WrongShape, "line 2, column 25: the operands give the type 'shared 2x4', not"),
        (_Silent, "shows no Before: and After:"),
    ],
)
def test_a_docstring_that_lies_fails(kind: type[Pass], words: str) -> None:
    with pytest.raises(Exception, match=words):
        check_example(kind)


def test_a_docstring_that_tells_the_truth_passes() -> None:
    class Truthful(_Lying):
        """Torch's ReLU becomes the dialect's.

        Before:
            %x = input : shared 2x4
            %1 = aten.relu.default(%x)
        After:
            %1 = mpc.relu(%x)
        """

        put, exact = "relu", True

    check_example(Truthful)
