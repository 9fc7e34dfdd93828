"""A pass that breaks its contract is caught, by its name and with the first node that differs."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from mergec.compiler.config import CompileConfig
from mergec.compiler.errors import CompileError, InternalError
from mergec.compiler.graph.contract import Contract
from mergec.compiler.graph.ir import calls
from mergec.compiler.graph.rewriting import Pass
from mergec.compiler.pipeline import rewrite
from mergec.runtime.core.op import target
from tests.families import captured, float_decoder

aten = torch.ops.aten


class _Broken(Pass):
    """A pass of a user."""

    stage = "finish"

    @classmethod
    def name(cls) -> str:
        return cls.__name__.strip("_").lower()


def first(graph_module: fx.GraphModule, name: str) -> fx.Node:
    return next(node for node in graph_module.graph.nodes if calls(node, target(name)))


class _Forgets(_Broken):
    """Halves the scale of the first layer's scores."""

    def run(self, graph_module: fx.GraphModule) -> int:
        attention = first(graph_module, "attention")
        attention.update_arg(4, 0.5 * attention.args[4])
        return 1


class _Approximates(_Forgets):
    """The same, and says so."""

    exact = False


class _Lies(_Forgets):
    """The same, and says that it did nothing."""

    def run(self, graph_module: fx.GraphModule) -> int:
        return super().run(graph_module) - 1


class _Drops(_Broken):
    """Lets new keys stand alone, without the cache."""

    def run(self, graph_module: fx.GraphModule) -> int:
        append = first(graph_module, "cache_append")
        append.replace_all_uses_with(append.args[1])
        return 1


class _LeavesDead(_Broken):
    """Writes to a tensor that nobody reads."""

    def run(self, graph_module: fx.GraphModule) -> int:
        node = first(graph_module, "embedding")
        with graph_module.graph.inserting_after(node):
            graph_module.graph.call_function(aten.relu_.default, (node,))
        return 1


class _Unlowerable(_Broken):
    """Multiplies secret values in a row."""

    def run(self, graph_module: fx.GraphModule) -> int:
        node = first(graph_module, "embedding")
        with graph_module.graph.inserting_after(node):
            made = graph_module.graph.call_function(aten.cumprod.default, (node, -1))
        node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
        return 1


def run(kind: type[Pass], check: bool | None = False) -> None:
    rewrite(captured("gpt2"), CompileConfig(extra_passes=(kind,), check_passes=check))


def test_changed_outputs_are_traced_to_the_first_node() -> None:
    with pytest.raises(InternalError) as caught:
        run(_Forgets, check=True)
    text = str(caught.value)
    assert text.startswith("pass forgets failed (it is not exact: output ")
    assert "for 5 new tokens after 0" in text
    assert "first node that differs: %transformer.h.0.attn.attention = mpc.attention(" in text
    assert "transformer.h.0.attn" in text
    assert "\n" not in text


def test_weights_in_float32() -> None:
    """A weight that a pass computes may be rounded; a halved scale is an error."""
    step = float_decoder("llama")[1].copy()
    rewrite(step.copy(), CompileConfig(check_passes=True))
    with pytest.raises(InternalError, match=r"pass forgets failed .*first node that differs"):
        rewrite(step, CompileConfig(extra_passes=(_Forgets,), check_passes=True))


def test_a_lossy_pass_may_change_outputs() -> None:
    run(_Approximates, check=True)


def test_outputs_are_compared_on_request() -> None:
    run(_Forgets)


def test_passes_from_outside_are_compared_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InternalError, match=r"pass forgets failed .it is not exact: output 0"):
        run(_Forgets, check=None)
    run(_Approximates, check=None)
    ran = []
    monkeypatch.setattr(Contract, "_run", lambda *_: ran.append(1))
    rewrite(captured("gpt2"), CompileConfig())
    assert not ran, "the built-in passes are compared on request only"


class _Boasts(_Broken):
    """Says that it changed something."""

    def run(self, graph_module: fx.GraphModule) -> int:
        return 2


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (_Lies, "pass lies failed .*reports no changed site, but it has changed the graph"),
        (_Boasts, "pass boasts failed .*reports 2 changed sites, but it has not changed the graph"),
        (_Drops, "pass drops failed .*drops the input cache.0.key"),
        (_LeavesDead, "pass leavesdead failed .*dead node behind: %relu_"),
        (
            _Unlowerable,
            "pass unlowerable failed .*cannot be lowered: %cumprod.*no protocol on secret",
        ),
    ],
)
def test_a_broken_pass_is_named(kind: type[Pass], words: str) -> None:
    with pytest.raises(InternalError, match=words):
        run(kind)


class _MakesTooEarly(_Broken):
    """Until the dialect is required, a later pass may still convert the op."""

    stage = "canonicalize"

    def run(self, graph_module: fx.GraphModule) -> int:
        node = next(n for n in graph_module.graph.nodes if calls(n, aten.embedding.default))
        with graph_module.graph.inserting_after(node):
            made = graph_module.graph.call_function(aten.cumprod.default, (node, -1))
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
        return 1


def test_an_op_of_an_early_pass_is_refused_with_its_maker() -> None:
    from mergec.compiler.graph.verify import verify_dialect

    step = captured("gpt2")
    rewrite(step, CompileConfig(extra_passes=(_MakesTooEarly,), check_passes=False))
    with pytest.raises(CompileError, match=r"cumprod.*no protocol.*made by the pass makestooearly"):
        verify_dialect(step.graph_module)
