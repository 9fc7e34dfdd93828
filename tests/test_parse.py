"""The text of a graph is complete: parsed, it prints as the same text."""

from __future__ import annotations

import pytest
import torch

from mergec.compiler.backend.legalize import legalize
from mergec.compiler.config import CompileConfig
from mergec.compiler.graph.parse import ParseError, parse
from mergec.compiler.graph.visibility import annotate_visibility
from mergec.compiler.pipeline import to_dialect
from mergec.compiler.text import dump
from mergec.runtime.core.spec import Vis
from mergec.runtime.ops import load_all
from tests.families import captured, every_family

load_all()


def again(text: str) -> str:
    return dump(parse(text).graph_module)


FEW = ("gpt2", "llama", "gemma2")
"""Families with different attention, norms and activations; the others are slow tests."""


@every_family(FEW)
def test_round_trip(family: str) -> None:
    """Of a graph as captured, of dialect ops, and with its fixed-point forms."""
    step, config = captured(family), CompileConfig()
    annotate_visibility(step.graph_module, step.inputs, step.constants)
    text = dump(step.graph_module)
    assert again(text) == text
    graph_module = to_dialect(step, config).graph_module
    text = dump(graph_module)
    assert again(text) == text
    legalize(graph_module, config.fractional_bits)
    text = dump(graph_module)
    assert again(text) == text
    assert " f16 masked " in text


SHORT = """
%x = input : shared 1xnewx8      # a remark
%w = constant : server 4x8
%rate = constant 0.5 : public scalar
%0 = mpc.linear(%x, %w)
%1 = aten.mul.Tensor(%0, %rate)
%2 = aten.to.dtype(%1, torch.float32)
%3 = aten.slice.Tensor(%0, 1, -1, end)
"""
FULL = """\
%x = input : shared 1xnewx8
%w = constant : server 4x8
%rate = constant 0.5 : public scalar
%0 = mpc.linear(%x, %w) : shared 1xnewx4
%1 = aten.mul.Tensor(%0, %rate) : shared 1xnewx4
%2 = aten.to.dtype(%1, torch.float32) : shared 1xnewx4
%3 = aten.slice.Tensor(%0, 1, -1, end) : shared 1x1x4
return [%2, %3]
"""


def test_a_short_text_is_completed() -> None:
    assert again(SHORT) == FULL
    assert again(FULL) == FULL


def test_a_parsed_graph_runs() -> None:
    parsed = parse(SHORT)
    assert [(spec.name, spec.vis, spec.shape) for spec in parsed.inputs] == [
        ("x", Vis.SHARED, (1, "new", 8))
    ]
    assert parsed.constants == {"w": Vis.SERVER, "rate": Vis.PUBLIC}
    x = torch.ones(1, 5, 8, dtype=torch.float64)
    narrow, last = parsed.graph_module(x)
    wanted = x @ parsed.graph_module.w.T
    assert torch.equal(narrow, (0.5 * wanted).float())
    assert torch.equal(last, wanted[:, -1:])
    assert torch.equal(parsed.graph_module.w, parse(SHORT).graph_module.w), "the same each time"


def test_values_of_constants() -> None:
    module = parse("""
        %list = constant [[1, 2], [3, 4]] : public int64 2x2
        %mask = constant causal : server bool 2x2
        %places = constant range : public int64 3
        %low = constant -inf : public scalar
        %none = constant : public int32 2
        return [%list, %mask, %places, %low, %none]
    """).graph_module
    values = [value.tolist() for value in module()]
    lower = [[True, False], [True, True]]
    assert values == [[[1, 2], [3, 4]], lower, [0, 1, 2], -float("inf"), [0, 0]]


def test_every_kind_of_argument() -> None:
    text = (
        "%x = input : public int64 2xpast\n"
        "%0 = aten.arange.default(3, dtype=torch.float32, device=cpu, pin_memory=False) "
        ": public 3\n"
        "%1 = aten.add.Tensor(%x, -1.5e-07, alpha=2) : public 2xpast\n"
        "%2 = aten.gelu.default(%1, approximate='tanh') : public 2xpast\n"
        "%3 = aten.clamp.default(%x, None, 7) : public 2xpast\n"
        "%4 = aten.sym_size.int(%x, 1) : public\n"
        "%5 = sym.add(%4, 1) : public\n"
        "%6 = aten.split.Tensor(%0, 2) : public\n"
        "%7 = sym.getitem(%6, 1) : public 1\n"
        "return [%2, %3, %5, %7]\n"
    )
    assert again(text) == text


X = "%x = input : shared 2x4\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 3", "line 1, column 1: expected a name such as '%0', or `return`, found 'x'"),
        (X + "%1 mpc.relu(%x)", "line 2, column 4: expected '=', found 'mpc.relu'"),
        (X + "%1 = mpc.relu(%y)", "line 2, column 15: expected a name that is defined above"),
        (X + "%1 = mpc.relu(%x", "line 2, column 17: expected ',' or ')' after an argument"),
        (X + "%1 = mpc.relux(%x)", "column 6: mpc.relux is neither a dialect op nor a function"),
        (X + "%1 = aten.relu(%x)", "column 6: aten.relu is neither a dialect op nor a function"),
        (X + "%1 = mpc.linear(%x)", "line 2, column 6: mpc.linear does not take these arguments"),
        (X + "%1 = mpc.relu(%x) : shared 2x5", "column 21: the operands give the type 'shared 2"),
        (X + "%1 = mpc.relu(%x) : public 2x4", "column 21: the operands give the type 'shared 2"),
        (X + X, "line 2, column 1: %x is defined twice"),
        (X + "%w = constant : server 4\n%y = input : shared 2", "line 3, column 1: inputs come"),
        ("%x = input : secret 2x4", "line 1, column 14: expected a visibility (public, client,"),
        ("%x = input : shared", "line 1, column 14: expected a shape at the end, such as 1xnew"),
        ("%x = input", "line 1, column 11: expected ':' and a type, found the end of the line"),
        ("%w = constant [1, 2] : server 3", "line 1, column 15: this value does not fit the type"),
        ("%w = constant : server new", "line 1, column 17: a constant has no variable lengths"),
        (
            "%half = constant : server 4",
            "column 1: a graph has an attribute 'half' already",
        ),
        (X + "return %x", "line 2, column 8: expected a list of values after `return`"),
        (X + "return [%x]\n%1 = mpc.relu(%x)", "line 3, column 1: expected nothing after `return`"),
        (X + "%1 = mpc.relu(%x) !", "line 2, column 19: expected the end of the line, found '!'"),
        (X + "%1 = mpc.relu(relu)", "line 2, column 15: expected an argument, found 'relu'"),
    ],
)
def test_errors_name_the_place(text: str, words: str) -> None:
    with pytest.raises(ParseError) as caught:
        parse(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
