"""The parser of the textual IR: text, as `compiler.text.dump` prints it, becomes a graph.

    line   = NAME "=" "input" ":" type
           | NAME "=" "constant" [value] ":" type
           | NAME "=" target "(" [argument {"," argument}] ")" [":" type]
           | "return" value
    type   = [visibility] ["f" bits [form]] [dtype] [shape]
    value  = NAME | number | string | word | "[" values "]"

A word is `None`, `True`, `False`, `end` (of a slice), a dtype such as `torch.int64`, or a device.
`#` begins a comment. A text may omit the type of a call, which follows from its operands (a given
type is checked); the dtype float64; and `return`, if the graph returns each value that nothing
uses. `dump` prints the first and the last.

Variable lengths in a shape have names: `1xnewx8`. A constant without a value is filled with random
numbers that depend on its name, or with zeros if its dtype is not a float. Its value may be a
number or a list; `causal`, ones on and below the diagonal; or `range`, 0, 1, 2 and so on.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import sys
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from mergec.compiler.graph.shapes import evaluate
from mergec.compiler.graph.visibility import visibility_of
from mergec.compiler.text import length_symbols, type_text
from mergec.runtime.core.errors import MergecError
from mergec.runtime.core.op import REGISTRY, target
from mergec.runtime.core.spec import Vis
from mergec.runtime.core.structural import TABLE, decode_literal
from mergec.runtime.program.program import InputSpec

_HINTS = {"new": 3, "past": 4, "rows": 2}
"""Example values of lengths, as in a captured step; further lengths get larger ones."""

_TOKEN = re.compile(
    r"""\s*(?:
    (?P<name>%[^\s,()\[\]=:\#]+)
  | (?P<number>-?(?:inf|nan|\d+\.?\d*(?:e[+-]?\d+)?)(?![\w.]))
  | (?P<string>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
  | (?P<word>[A-Za-z_][\w.]*)
  | (?P<sign>[=:(),\[\]])
  | (?P<end>(?:\#.*)?$)
    )""",
    re.VERBOSE,
)
_WORDS: dict[str, Any] = {"None": None, "True": True, "False": False, "end": sys.maxsize}
_SIZE = re.compile(r"\d+|[a-wyz]+")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


class ParseError(MergecError):
    """A text is not a graph; the message names the line, the column, and what was expected."""


@dataclass(frozen=True)
class Parsed:
    """A graph with example values and visibilities, its inputs, and who knows each constant."""

    graph_module: fx.GraphModule
    inputs: list[InputSpec]
    constants: dict[str, Vis]


def parse(text: str) -> Parsed:
    """The graph that a text describes; raises ParseError if it does not describe one.

    Each node's meta["label"] is its name in the text, so that `dump(parse(text).graph_module)` is
    `text` again if that is in the format of `dump`.
    """
    return _Parser(text).run()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.graph = fx.Graph()
        self.environment = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.environment)
        self.mode.cache_enabled = False  # To look up symbolic shapes costs more than it saves.
        self.lengths: dict[str, Any] = {}
        self.values: dict[str, fx.Node] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.inputs: list[InputSpec] = []
        self.constants: dict[str, Vis] = {}
        self.returned = False

    def run(self) -> Parsed:
        for number, line in enumerate(self.text.splitlines(), 1):
            self.number, self.line, self.position = number, line, 0
            self._advance()
            if self.kind == "end":
                continue
            if self.returned:
                raise self._expected("nothing after `return`")
            self._statement()
            if self.kind != "end":
                raise self._expected("the end of the line")
        if not self.returned:
            self._return([n for n in self.graph.nodes if not n.users and n.op == "call_function"])
        graph_module = _LazyGraphModule(self.tensors, self.graph)
        self.graph.lint()
        return Parsed(graph_module, self.inputs, self.constants)

    # Tokens

    def _advance(self) -> str:
        """Read the next token; returns the one that was current."""
        before = getattr(self, "token", "")
        match = _TOKEN.match(self.line, self.position)
        if match is None:
            rest = self.line[self.position :]
            self.start = self.position + len(rest) - len(rest.lstrip())
            self.kind, self.token = "unknown", self.line[self.start]
            return before
        self.kind = match.lastgroup or "end"
        self.token, self.start = match[self.kind], match.start(self.kind)
        self.position = match.end()
        return before

    def _take(self, token: str) -> None:
        if self.token != token or self.kind in ("string", "end"):
            raise self._expected(f"{token!r}")
        self._advance()

    def _expected(self, what: str) -> ParseError:
        found = "the end of the line" if self.kind == "end" else repr(self.token)
        return self._error(f"expected {what}, found {found}", self.start)

    def _error(self, message: str, column: int) -> ParseError:
        return ParseError(f"line {self.number}, column {column + 1}: {message}")

    # Statements

    def _statement(self) -> None:
        if self.kind == "word" and self.token == "return":
            self._advance()
            column = self.start
            value = self._value()
            if not isinstance(value, list):
                raise self._error("expected a list of values after `return`", column)
            self._return(value)
            return
        if self.kind != "name":
            raise self._expected("a name such as '%0', or `return`")
        column, name = self.start, self._advance()[1:]
        if name in self.values:
            raise self._error(f"%{name} is defined twice", column)
        self._take("=")
        if self.kind != "word":
            raise self._expected("`input`, `constant`, or a function such as `mpc.add`")
        column, word = self.start, self._advance()
        if word == "input":
            node = self._input(name)
        elif word == "constant":
            node = self._constant(name)
        else:
            node = self._call(name, word, column)
            node.meta["label"] = name
        self.values[name] = node

    def _input(self, name: str) -> fx.Node:
        if any(node.op != "placeholder" for node in self.graph.nodes):
            raise self._error("inputs come before constants and calls", 0)
        column, words = self._type()
        vis, dtype, sizes = self._declared(words, column)
        shape = [size if isinstance(size, int) else self._length(size) for size in sizes]
        node = self.graph.placeholder(re.sub(r"\W", "_", name))
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        symbols = {str(length): given for given, length in self.lengths.items()}
        node.meta |= {"name": name, "vis": vis, "lengths": symbols}
        self._hold(node, words)
        self.inputs.append(InputSpec(name, vis, str(dtype), tuple(sizes), 0, f"{name}.next"))
        return node

    def _constant(self, name: str) -> fx.Node:
        if hasattr(fx.GraphModule, name.partition(".")[0]):
            raise self._error(f"a graph has an attribute {name!r} already; rename the constant", 0)
        value = None
        column = self.start
        if self.token != ":":
            value = self._advance() if self.token in ("causal", "range") else self._value()
        at, words = self._type()
        vis, dtype, sizes = self._declared(words, at)
        if not all(isinstance(size, int) for size in sizes):
            raise self._error("a constant has no variable lengths", at)
        try:
            tensor = _filled(name, value, dtype, sizes)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError) as error:
            raise self._error(f"this value does not fit the type: {error}", column) from error
        self.tensors[name], self.constants[name] = tensor, vis
        node = self.graph.create_node("get_attr", name)
        node.meta |= {"vis": vis, "val": self.mode.from_tensor(tensor, static_shapes=True)}
        return node

    def _call(self, name: str, word: str, column: int) -> fx.Node:
        call = _function(word)
        if call is None:
            raise self._error(f"{word} is neither a dialect op nor a function of torch", column)
        args, kwargs = self._arguments()
        node = self.graph.create_node(
            "call_function", call, tuple(args), kwargs, name=re.sub(r"\W", "_", name)
        )
        node.meta |= {"module": "", "source": ""}
        try:
            node.meta["vis"] = visibility_of(node)
            # As torch.export does it: some functions accept symbolic lengths only in its mode.
            with enable_python_dispatcher():
                node.meta["val"] = evaluate(call, node.args, node.kwargs, self.mode)
        except Exception as error:
            reason = str(error).strip().split("\n", 1)[0]
            raise self._error(f"{word} does not take these arguments: {reason}", column) from error
        if self.token == ":":
            at, words = self._type()
            self._hold(node, words)
            if words[0] == Vis.PUBLIC.value and isinstance(node.meta["val"], torch.SymInt):
                for length in words[1:]:  # a length of its own, as the number of kept positions
                    node.meta |= {"length": length, "val": self._length(length)}
            found, given = type_text(node, length_symbols(self.graph)), " ".join(words)
            if found != given:
                raise self._error(f"the operands give the type {found!r}, not {given!r}", at)
        return node

    def _return(self, values: list[Any]) -> None:
        self.graph.output(values)
        self.returned = True

    # Types

    def _type(self) -> tuple[int, list[str]]:
        """The words of a type, up to the end of the line, and their column."""
        if self.token != ":":
            raise self._expected("':' and a type")
        rest = self.line[self.position :].partition("#")[0]
        column = self.position + len(rest) - len(rest.lstrip())
        self.position += len(rest)
        self._advance()
        return column, rest.split()

    def _declared(self, words: list[str], column: int) -> tuple[Vis, torch.dtype, list[int | str]]:
        """Visibility, dtype and shape of an input or a constant."""
        known = [vis.value for vis in Vis]
        if not words or words[0] not in known:
            raise self._error(f"expected a visibility ({', '.join(known)})", column)
        dtypes = [_DTYPES[word] for word in words[1:-1] if word in _DTYPES]
        sizes = [] if words[-1] == "scalar" else words[-1].split("x")
        if len(words) < 2 or not all(_SIZE.fullmatch(size) for size in sizes):
            raise self._error("expected a shape at the end, such as 1xnewx8, or scalar", column)
        shape = [int(size) if size.isdecimal() else size for size in sizes]
        return Vis(words[0]), dtypes[0] if dtypes else torch.float64, shape

    def _hold(self, node: fx.Node, words: list[str]) -> None:
        """The form and fractional bits of a shared value, if the text gives them."""
        for word, following in zip(words, [*words[1:], ""], strict=True):
            if re.fullmatch(r"f\d+", word) and word not in _DTYPES:
                form = following if following.isalpha() and following != "scalar" else "share"
                node.meta |= {"frac": int(word[1:]), "form": form}

    def _length(self, name: str) -> Any:
        """The symbol of a length that varies."""
        if name not in self.lengths:
            hint = _HINTS.get(name, 5 + len(self.lengths))
            source = ConstantSource(name)
            symbol = self.environment.create_symbol(hint, source, DimDynamic.DYNAMIC, None)
            self.lengths[name] = self.environment.create_symintnode(
                symbol, hint=hint, source=source
            )
        return self.lengths[name]

    # Arguments

    def _arguments(self) -> tuple[list[Any], dict[str, Any]]:
        self._take("(")
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        while self.token != ")":
            after = re.match(r"\s*=", self.line[self.position :])
            if self.kind == "word" and after:
                key = self._advance()
                self._take("=")
                kwargs[key] = self._value()
            else:
                args.append(self._value())
            if self.token not in (",", ")"):
                raise self._expected("',' or ')' after an argument")
            if self.token == ",":
                self._advance()
        self._advance()
        return args, kwargs

    def _value(self) -> Any:
        if self.token == "[" and self.kind == "sign":
            return self._list()
        if self.kind == "name":
            if self.token[1:] not in self.values:
                raise self._expected("a name that is defined above")
            return self.values[self._advance()[1:]]
        if self.kind == "number":
            return _number(self._advance())
        if self.kind == "string":
            return ast.literal_eval(self._advance())
        if self.kind == "word":
            word = self.token
            if word in _WORDS:
                self._advance()
                return _WORDS[word]
            literal = decode_literal(word, torch.device("cpu"))
            if not isinstance(literal, str):
                self._advance()
                return literal
            if word in ("cpu", "cuda", "meta"):
                self._advance()
                return torch.device(word)
        raise self._expected("an argument")

    def _list(self) -> list[Any]:
        self._take("[")
        items: list[Any] = []
        while self.token != "]":
            items.append(self._value())
            if self.token not in (",", "]"):
                raise self._expected("',' or ']' after an item")
            if self.token == ",":
                self._advance()
        self._advance()
        return items


def _number(text: str) -> int | float:
    return int(text) if re.fullmatch(r"-?\d+", text) else float(text)


def _filled(name: str, value: Any, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    """The content of a constant."""
    if value == "causal":
        return torch.ones(shape).tril().to(dtype)
    if value == "range":
        return torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    if isinstance(value, list):
        return torch.tensor(value, dtype=dtype).reshape(shape)
    if value is not None:
        return torch.full(shape, value, dtype=dtype)
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)


def _function(word: str) -> Any:
    """The function that a call's target names; None if there is none."""
    space, _, rest = word.partition(".")
    if space == "mpc":
        return target(rest) if rest in REGISTRY else None
    if word in ("sym.max", "sym.min"):
        return torch.sym_max if word == "sym.max" else torch.sym_min
    if space == "sym":
        return TABLE.get(word)
    try:
        found = operator.attrgetter(word)(torch.ops)
    except AttributeError:
        return None
    return found if isinstance(found, torch._ops.OpOverload) else None
