"""Mistakes in a pass are refused where it is defined, or where passes are collected."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from torch import fx

from mergec.compiler.config import CompileConfig
from mergec.compiler.errors import CompileError
from mergec.compiler.graph.rewriting import Pass
from mergec.compiler.selection import select
from mergec.passes import available, only_pass

HEAD = """
from mergec.compiler.graph.rewriting import Pass
from mergec.passes.fuse_glu import FuseGlu

"""
PASS = '''
class {name}(Pass):
    """Does nothing."""
    stage = "fuse"
    {more}
    def run(self, graph_module):
        return 0
'''


def load(tmp_path: Path, name: str, source: str) -> ModuleType:
    """A module as if its file were in passes/."""
    file = tmp_path / f"{name}.py"
    file.write_text(HEAD + source)
    spec = importlib.util.spec_from_file_location(f"mergec.passes.{name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_file_holds_one_pass_of_its_name(tmp_path: Path) -> None:
    module = load(tmp_path, "swap_2x", PASS.format(name="Swap2x", more=""))
    assert only_pass(module).name() == "swap_2x"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", r"passes/swap\.py defines no pass; move"),
        (
            PASS.format(name="Swap", more="") + PASS.format(name="Other", more=""),
            r"passes/swap\.py defines Swap and Other; put each pass into its own file",
        ),
        (
            PASS.format(name="Exchange", more=""),
            r"passes/swap\.py defines Exchange; name the class Swap",
        ),
        (
            PASS.format(name="Swap", more="").replace('    stage = "fuse"\n', ""),
            r"the pass Swap \(mergec\.passes\.swap\) has no stage; set `stage` to one of: canon",
        ),
        (
            PASS.format(name="Swap", more='after = "fuse_glu"'),
            r"the pass Swap .* has 'fuse_glu' as `after`; write a tuple of names",
        ),
    ],
)
def test_a_file_that_breaks_the_rules_is_named(tmp_path: Path, source: str, words: str) -> None:
    with pytest.raises(CompileError, match=words):
        only_pass(load(tmp_path, "swap", source))


def test_a_second_pass_of_one_name_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("mergec.passes.swap")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    source = HEAD + PASS.format(name="Swap", more="")
    exec(source, vars(module))
    with pytest.raises(CompileError, match=r"the pass Swap .* is defined twice in its file"):
        exec(source, vars(module))


def test_a_stage_that_does_not_exist() -> None:
    with pytest.raises(CompileError, match=r"Late \(tests.*\) has an unknown stage, 'later'; set"):

        class Late(Pass):
            """Has no place."""

            stage = "later"

            def run(self, graph_module: fx.GraphModule) -> int:
                return 0


@pytest.mark.parametrize("text", [None, "", "Before:\n    %x\nAfter:\n    %x"])
def test_a_pass_without_a_summary(text: str | None) -> None:
    def run(self: Pass, graph_module: fx.GraphModule) -> int:
        return 0

    with pytest.raises(CompileError, match=r"the pass Mute .* has no docstring; say in its first"):
        type("Mute", (Pass,), {"__doc__": text, "stage": "fuse", "run": run})


class FuseGlu(Pass):
    """Has the name of a built-in pass."""

    stage = "fuse"

    def run(self, graph_module: fx.GraphModule) -> int:
        return 0


class Misspelt(FuseGlu):
    """Waits for a pass that does not exist."""

    after = ("fuse_glue",)


class Waiting(FuseGlu):
    """Waits for a pass that is left out."""

    after = ("fuse_rotary",)


def test_a_name_that_is_taken() -> None:
    words = (
        r"two passes have the name 'fuse_glu': the pass FuseGlu \(mergec\.passes\.fuse_glu\) and "
        r"the pass FuseGlu \(.*test_registry\); rename"
    )
    with pytest.raises(CompileError, match=words):
        select(CompileConfig(extra_passes=(FuseGlu,)))
    with pytest.raises(CompileError, match="two passes have the name 'waiting'"):
        other = type("Waiting", (Waiting,), {"__doc__": "Another."})
        select(CompileConfig(extra_passes=(Waiting, other)))


def test_a_pass_to_wait_for_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        r"the pass Misspelt .* waits for an unknown pass, 'fuse_glue'; did you mean 'fuse_glu'\?"
    )
    with pytest.raises(CompileError, match=words):
        select(CompileConfig(extra_passes=(Misspelt,)))
    built_in = available()["fuse_layer_norm"]
    monkeypatch.setattr(built_in, "after", ("nothing_like_it",))
    with pytest.raises(CompileError, match="unknown pass, 'nothing_like_it'; correct or remove"):
        available()


def test_a_pass_to_wait_for_that_is_left_out() -> None:
    chosen = select(CompileConfig(extra_passes=(Waiting,), disable=("fuse_rotary",)))
    assert Waiting in chosen


def test_modules_of_the_tests_are_not_left_behind() -> None:
    assert "mergec.passes.swap" not in sys.modules
