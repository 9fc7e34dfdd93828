"""The default passes, in order, preserve every family's outputs and recognize its structure."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import passes
from mergec.compiler.config import DEFAULT_NOISE, CompileConfig
from mergec.compiler.errors import CompileError, InternalError
from mergec.compiler.frontend.capture import Captured
from mergec.compiler.graph.manager import PassReport, ordered
from mergec.compiler.graph.rewriting import Pass
from mergec.compiler.graph.verify import verify_dialect
from mergec.compiler.pipeline import rewrite
from mergec.compiler.selection import left_out
from mergec.compiler.text import dump
from mergec.passes import available
from mergec.runtime.core.spec import Vis
from mergec.runtime.core.structural import target_name
from mergec.runtime.ops import load_all
from tests.families import LAYERS, LENGTHS, captured, error, every_family, expected, outputs

load_all()

ORDER = """
canonicalize  expand_einsum
canonicalize  publish_masks
canonicalize  remove_noops
canonicalize  expand_composites
canonicalize  expand_sdpa
canonicalize  unify_spellings
canonicalize  fold_public
canonicalize  reveal_logits
canonicalize  unify_roots
canonicalize  unify_sinks
fuse          fuse_attention
fuse          fuse_activations
fuse          fuse_cache
fuse          fuse_centred_norm
fuse          fuse_glu
fuse          fuse_layer_norm
fuse          fuse_rms_norm
fuse          fuse_rotary
fuse          fuse_top_k
fuse          fuse_xielu
approximate   fix_attention
approximate   quadratic_gelu
approximate   quadratic_silu
approximate   relu_activations
approximate   softmax_2quad
approximate   softmax_2relu
approximate   simplify_norms
approximate   pad_prompt
dialect       embedding_to_dialect
dialect       fold_weights
dialect       linear_to_dialect
dialect       arithmetic_to_dialect
dialect       resend_hidden
dialect       merge_projections
optimize      fold_norm_affine
optimize      centre_residual
optimize      fold_attention_scale
optimize      fold_scalars
optimize      hoist_last_position
optimize      merge_chains
optimize      merge_siblings
optimize      defer_norm
optimize      open_once
"""

REORDERED = 1e-9
"""In float64, where sums are rounded in another order, and GELU's constants to 8 digits."""

CASTS = 1e-6
"""Some models compute parts in float32; a program has no such casts."""

# Per layer: norms, activation with its kind, rotary embeddings.
COVERAGE: dict[str, tuple[tuple[str, int, int], tuple[str, str | None], int]] = {
    "gpt2": (("rms_norm", 2, 1), ("gelu", "tanh"), 0),
    "llama": (("rms_norm", 2, 1), ("glu", "silu"), 2),
    "qwen2": (("rms_norm", 2, 1), ("glu", "silu"), 2),
    "qwen3": (("rms_norm", 4, 1), ("glu", "silu"), 2),
    "mistral": (("rms_norm", 2, 1), ("glu", "silu"), 2),
    "opt": (("rms_norm", 2, 1), ("relu", None), 0),
    "gpt_neox": (("rms_norm", 2, 1), ("gelu", "erf"), 2),
    "gpt_neo": (("rms_norm", 2, 1), ("gelu", "tanh"), 0),
    "phi": (("rms_norm", 1, 1), ("gelu", "tanh"), 2),
    "phi3": (("rms_norm", 2, 1), ("glu", "silu"), 2),
    "gemma": (("rms_norm", 2, 1), ("glu", "gelu_tanh"), 2),
    "gemma2": (("rms_norm", 4, 1), ("glu", "gelu_tanh"), 2),
    "bloom": (("layer_norm", 2, 2), ("gelu", "tanh"), 0),
    "falcon": (("rms_norm", 1, 1), ("gelu", "erf"), 2),
    "gptj": (("rms_norm", 1, 1), ("gelu", "tanh"), 2),
    "codegen": (("rms_norm", 1, 1), ("gelu", "tanh"), 2),
    "stablelm": (("rms_norm", 2, 1), ("glu", "silu"), 2),
    "olmo": (("rms_norm", 2, 1), ("glu", "silu"), 2),
}

_TIED = {"fold_norm_affine": 1}
"""The final norm keeps its gain where the head's matrix is the embedding's table."""

# Sites that look like a pattern and are skipped.
LEFT: dict[str, dict[str, int]] = {
    "gpt2": _TIED,
    "opt": _TIED,
    "gpt_neo": _TIED,
    "falcon": _TIED,
    # Gains of queries and keys, which are rotated before they are multiplied.
    "qwen3": {"fold_norm_affine": 2 * LAYERS},
    # The factor of an embedding whose table is tied.
    "gemma": {**_TIED, "fold_scalars": 1},
    # Norms of what is added to the residual.
    "gemma2": {"fold_norm_affine": 1 + 2 * LAYERS, "fold_scalars": 1},
    # The norm of the embedding.
    "bloom": {"fold_norm_affine": 2, "centre_residual": 1},
}


@functools.cache
def rewritten(family: str) -> tuple[Captured, list[PassReport]]:
    step = captured(family)
    return step, rewrite(step, CompileConfig())


def in_double(step: Captured) -> Captured:
    """The step without the model's excursions to float32, so that only rewrites can differ."""

    def wide(arg: object) -> object:
        return torch.float64 if arg is torch.float32 else arg

    for node in list(step.graph_module.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            step.graph_module.graph.erase_node(node)
            continue
        node.args = tuple(wide(arg) for arg in node.args)
        node.kwargs = {key: wide(arg) for key, arg in node.kwargs.items()}
    step.graph_module.recompile()
    return step


def shared_calls(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [
        node
        for node in graph_module.graph.nodes
        if node.op == "call_function" and node.meta["vis"] is Vis.SHARED
    ]


def test_order() -> None:
    lines = [f"{kind.stage:<13} {kind.name()}" for kind in ordered(available().values())]
    assert lines == ORDER.strip().splitlines()


def test_every_file_is_found() -> None:
    files = {path.stem for path in Path(passes.__file__).parent.glob("*.py")}
    assert set(available()) == files - {"__init__", "base"}
    assert all(name == kind.name() for name, kind in available().items())


def test_every_pass_has_tests_and_shows_what_it_does() -> None:
    tested = {path.stem for path in (Path(__file__).parent / "passes").glob("test_*.py")}
    for name, kind in available().items():
        assert f"test_{name}" in tested
        assert "Before:" in (kind.__doc__ or "")
        assert "After:" in (kind.__doc__ or "")


@every_family()
def test_the_meaning_stays(family: str) -> None:
    original, step = in_double(captured(family)), in_double(captured(family))
    rewrite(step, CompileConfig())
    for new, past in LENGTHS:
        before, after = outputs(original, new, past), outputs(step, new, past)
        assert [error(a, b) < REORDERED for a, b in zip(before, after, strict=True)] == [
            True
        ] * len(before)
        logits = outputs(rewritten(family)[0], new, past)[0]
        assert error(logits, expected(family, new + past)) < CASTS


@every_family()
def test_structure_is_found(family: str) -> None:
    (norm, norms, final), (activation, kind), rotary = COVERAGE[family]
    step, reports = rewritten(family)
    graph_module = step.graph_module
    verify_dialect(graph_module)
    nodes = shared_calls(graph_module)
    count = Counter(target_name(node.target).removeprefix("mpc.") for node in nodes)
    assert count["attention"] == LAYERS
    assert count["cache_append"] == 2 * LAYERS
    assert count[norm] == norms * LAYERS + final
    assert count[activation] == LAYERS
    assert count["rotary"] == rotary * LAYERS
    for node in nodes:
        if target_name(node.target) == "mpc.glu":
            assert node.args[2] == kind
        if target_name(node.target) == "mpc.gelu":
            assert node.args[1] is (kind == "tanh")
    spelled_out = {"softmax", "matmul", "exp", "rsqrt", "reciprocal", "tanh", "sigmoid", "square"}
    spelled_out |= {"mul", "sum", "silu"}
    assert not spelled_out & set(count)
    found = {report.name: report for report in reports}
    exact = [kind for kind in available().values() if kind.exact and not kind.option]
    assert list(found) == [kind.name() for kind in ordered(exact)]
    left = Counter(report.name for report in reports for _ in report.skips)
    # Where messages take no time, one skip says so for all norms, and one for activations.
    once = {"open_once": 1} if count["gelu"] or count["glu"] else {}
    assert left == Counter({"defer_norm": 1, **once, **LEFT.get(family, {})})


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "bloom"])
def test_a_second_time_nothing_is_left_to_do(family: str) -> None:
    step = captured(family)
    rewrite(step, CompileConfig())
    before = dump(step.graph_module)
    again = rewrite(step, CompileConfig())
    assert [report.name for report in again if report.sites] == []
    assert dump(step.graph_module) == before


class _Extra(Pass):
    """A pass of a user."""

    stage = "finish"

    @classmethod
    def name(cls) -> str:
        return cls.__name__.strip("_").lower()


class _Doubles(_Extra):
    """Doubles the logits at the client."""

    exact = False

    def run(self, graph_module: fx.GraphModule) -> int:
        (output,) = [node for node in graph_module.graph.nodes if node.op == "output"]
        logits = output.args[0][0]
        with graph_module.graph.inserting_before(output):
            doubled = graph_module.graph.call_function(torch.ops.aten.add.Tensor, (logits, logits))
        doubled.meta = dict(logits.meta)
        output.args = ([doubled, *output.args[0][1:]],)
        return 1


class _DropsInput(_Extra):
    """Loses a cache."""

    def run(self, graph_module: fx.GraphModule) -> int:
        last = [node for node in graph_module.graph.nodes if node.op == "placeholder"][-1]
        for user in list(last.users):
            user.replace_input_with(last, last.prev)
        graph_module.graph.erase_node(last)
        return 1


class _Raises(_Extra):
    """Stumbles."""

    def run(self, graph_module: fx.GraphModule) -> int:
        raise IndexError("list index out of range")


class _Refuses(_Extra):
    """Finds a fault of the model."""

    def run(self, graph_module: fx.GraphModule) -> int:
        raise CompileError("no such luck", {next(iter(graph_module.graph.nodes)): "a reason"})


def test_a_pass_of_a_user_runs() -> None:
    step = captured("gpt2")
    reports = rewrite(step, CompileConfig(extra_passes=(_Doubles,)))
    assert (reports[-1].name, reports[-1].sites, reports[-1].exact) == ("doubles", 1, False)
    assert error(outputs(step, 5, 0)[0], 2 * expected("gpt2", 5)) < CASTS


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (_DropsInput, "pass dropsinput failed .*4 inputs instead of 5.*before it: .*remove_noops,"),
        (_Raises, "pass raises failed .*list index out of range.*before it: .*remove_noops,"),
    ],
)
def test_a_pass_that_breaks_is_named(kind: type[Pass], words: str) -> None:
    with pytest.raises(InternalError, match=words):
        rewrite(captured("gpt2"), CompileConfig(extra_passes=(kind,)))


def test_an_error_of_the_model_passes_through() -> None:
    with pytest.raises(CompileError, match="no such luck"):
        rewrite(captured("gpt2"), CompileConfig(extra_passes=(_Refuses,)))


def test_names_are_checked() -> None:
    with pytest.raises(CompileError, match="unknown pass 'fuse_all'; there are: arithmetic_to_"):
        rewrite(captured("gpt2"), CompileConfig(disable=("fuse_all",)))
    with pytest.raises(CompileError, match="unknown preset 'fast'; there are: exact"):
        CompileConfig(preset="fast")


@pytest.mark.parametrize(
    ("options", "arguments"),
    [({}, (DEFAULT_NOISE,)), ({"logit_noise": 0}, ()), ({"logit_noise": 0.01}, (0.01,))],
)
def test_the_noise_of_the_logits(options: dict[str, float], arguments: tuple[float, ...]) -> None:
    step = captured("gpt2")
    rewrite(step, CompileConfig(**options))
    (revealed,) = [n for n in step.graph_module.graph.nodes if "mpc.reveal" in str(n.target)]
    assert revealed.args[1:] == arguments


@pytest.mark.parametrize("noise", [-0.001, 0.0626, float("nan"), "0.001", None])
def test_noise_out_of_range(noise: Any) -> None:
    with pytest.raises(CompileError, match=r"logit_noise is .*; it can be 0 \(none\) to 0\.0625"):
        CompileConfig(logit_noise=noise)


def test_a_pass_can_be_left_out() -> None:
    step = captured("gpt2")
    reports = rewrite(step, CompileConfig(disable=("fuse_layer_norm",)))
    assert "fuse_layer_norm" not in [report.name for report in reports]
    assert "aten.layer_norm.default" in {
        target_name(n.target) for n in shared_calls(step.graph_module)
    }


def test_order_of_passes() -> None:
    class First(_Extra):
        """Waits for a pass that does not run."""

        after = ("doubles",)

    class Second(_Extra):
        """Waits."""

        stage = "finish"
        after = ("third",)

    class Third(_Extra):
        """Is waited for."""

    order = ordered([Third, Second, First], known=[_Doubles])
    assert [kind.name() for kind in order] == ["first", "third", "second"]

    class Fourth(_Extra):
        """Waits for one that waits for it."""

        after = ("fifth",)

    class Fifth(_Extra):
        """Waits for one that waits for it."""

        after = ("fourth",)

    with pytest.raises(CompileError, match=r"wait for each other: fifth, fourth; shorten"):
        ordered([Fourth, Fifth])

    class Early(_Extra):
        """Waits for a pass of a later stage."""

        stage = "fuse"
        after = ("third",)

    with pytest.raises(CompileError, match=r"Early .*waits for third, .*later stage, 'finish'"):
        ordered([Early, Third])


def test_a_lossy_pass_that_did_not_run_says_how_to_ask_for_it() -> None:
    said = left_out(CompileConfig())
    assert said["softmax_2quad"] == (
        "it is lossy, and the preset 'exact' does not ask for it; --enable NAME does"
    )
    assert "softmax_2quad" not in left_out(CompileConfig(enable=("softmax_2quad",)))
