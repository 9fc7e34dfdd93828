"""Which graphs take padding, what the pass puts into them, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from mergec.compiler.config import CompileConfig
from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.capture import capture
from mergec.compiler.graph.parse import parse
from mergec.compiler.graph.rewriting import GraphInfo
from mergec.compiler.pipeline import rewrite
from mergec.passes.pad_prompt import PadPrompt
from mergec.runtime.core.spec import Vis
from mergec.runtime.ops import load_all
from mergec.runtime.program.program import PADS
from tests.encoder_decoders import double_step
from tests.families import random_decoder

load_all()

QKV = """
%ids = input : client int64 1xnew
%q = input : shared 1x2xnewx8
"""


def ran(text: str) -> tuple[PadPrompt, int]:
    parsed = parse(text)
    made = PadPrompt(GraphInfo(parsed.inputs, parsed.constants))
    made(parsed.graph_module)
    return made, made.sites


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("mpc.ratio_attention(%q, %q, %q, None, 0.5, 0.0, '2quad')", "weight to each key"),
        ("mpc.constant_attention(%q, %table, 3)", "its weights follow from positions"),
        ("aten.softmax.int(%keys, -1)", "was not recognized as part of an attention"),
        ("aten._softmax.default(%keys, -1, False)", "was not recognized as part of an attention"),
    ],
)
def test_weights_that_the_client_cannot_hide_are_refused(call: str, words: str) -> None:
    """The line names the node, also if other attention takes padding."""
    table = "%table = constant : server 2x8x8\n" if "table" in call else ""
    table += "%keys = aten.transpose.int(%q, 2, 3)\n" if "keys" in call else ""
    text = f"{QKV}{table}%1 = mpc.attention(%q, %q, %q, None, 0.5)\n%2 = {call}\nreturn [%1, %2]"
    with pytest.raises(CompileError, match=f"cannot be padded(.*\\n)*.*%2 = (.*\\n)*.*{words}"):
        ran(text)


def test_a_softmax_of_features_is_left_alone() -> None:
    """A router's is over experts, of each token for itself."""
    for call in ("aten.softmax.int(%q, -1)", "aten._softmax.default(%q, 1, False)"):
        _, sites = ran(
            f"{QKV}%1 = mpc.attention(%q, %q, %q, None, 0.5)\n%2 = {call}\nreturn [%1, %2]"
        )
        assert sites == 1


def test_a_public_softmax_is_left_alone() -> None:
    text = (
        f"{QKV}%m = input : public 1x1xnewxnew\n%p = aten.softmax.int(%m, -1)\n"
        "%1 = mpc.attention(%q, %q, %q, %m, 0.5)\nreturn [%1, %p]"
    )
    made, sites = ran(text)
    assert sites == 1
    assert made.info.inputs[-1].name == PADS and made.info.inputs[-1].vis is Vis.CLIENT


def test_tables_of_the_tokens_and_of_relative_distances_stay() -> None:
    """A table that is read by a matrix of distances is not one of positions."""
    text = (
        "%ids = input : client int64 1xnew\n%q = input : shared 1x2xnewx8\n"
        "%table = constant : server 97x8\n%bias = constant : server 200x2\n"
        "%new = aten.sym_size.int(%ids, 1)\n%at = aten.arange.default(%new)\n"
        "%rows = aten.unsqueeze.default(%at, 1)\n%far = aten.sub.Tensor(%rows, %at)\n"
        "%up = aten.add.Tensor(%far, 100)\n%near = aten.embedding.default(%bias, %up)\n"
        "%word = aten.embedding.default(%table, %ids)\n"
        "%1 = mpc.attention(%q, %q, %q, None, 0.5)\nreturn [%1, %near, %word]"
    )
    made, sites = ran(text)
    assert sites == 1
    assert [reason for _, reason in made.skips] == [
        "its rows are not those of the positions of new tokens"
    ]


def test_encoder_decoders_are_refused() -> None:
    with pytest.raises(CompileError, match="source of an encoder-decoder cannot be padded"):
        rewrite(double_step("t5"), CompileConfig(pad_prompt=True))


@pytest.mark.parametrize(("family", "sites"), [("gpt2", 3), ("bloom", 2), ("opt", 3)])
def test_without_padding_the_graph_stays_what_it_is(family: str, sites: int) -> None:
    """With `check_passes` it runs before and after each pass, and no pad is there."""
    step = capture(random_decoder(family))
    reports = rewrite(step, CompileConfig(pad_prompt=True, check_passes=True))
    assert {report.name: report.sites for report in reports}["pad_prompt"] == sites
    given = [torch.zeros(1, 3, dtype=torch.int64)]
    given += [torch.zeros(1, s.shape[1], 0, s.shape[3]).double() for s in step.inputs[1:-1]]  # type: ignore[arg-type]
    with torch.no_grad():
        assert step.graph_module(*given, torch.tensor([1]))[0].isfinite().all()
