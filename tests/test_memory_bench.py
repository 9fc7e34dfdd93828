"""A short form of the measurement of memory; `make memory` runs the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.roles import ROOT, environment


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import memory

    return memory


def test_parameters_of_shapes(memory: Any) -> None:
    for shape in (*memory.SHAPES.values(), *memory.LARGER):
        config = LlamaConfig(
            num_hidden_layers=shape.layers,
            hidden_size=shape.width,
            intermediate_size=shape.inner,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.cached_heads,
            vocab_size=shape.vocabulary,
            tie_word_embeddings=shape.tied,
        )
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        assert model.num_parameters() == shape.parameters
        (keys,) = {layer.self_attn.k_proj.out_features for layer in model.model.layers}
        assert shape.cached == 2 * shape.layers * keys


def test_what_a_process_holds(memory: Any) -> None:
    code = "import sys; x = bytearray(b'x') * (100 << 20); print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        found = memory.held([child.pid])
        assert 100 << 20 <= found.own < 200 << 20
        assert 0 < found.mapped < 100 << 20
        # A process that waits may still be given pages, or lose some.
        assert abs(memory.held([child.pid, child.pid]).own - 2 * found.own) < 1 << 20
        child.kill()


def _size(memory: Any, name: str, own: float) -> Any:
    """A shape, of which compiling took so many bytes of its own for each parameter."""
    shape = memory.SHAPES[name]
    report = memory.Report(memory.Held(), int(own * shape.parameters))
    return memory.Size(shape, {"compile": report}, {})


def test_what_takes_more_than_by_the_formulas_is_named(memory: Any) -> None:
    sizes = [_size(memory, "2M", 3.0), _size(memory, "27M", 3.9)]
    each = memory.WIDE.cached * 10
    found = memory.Caches(memory.WIDE, 10, {"server": 18 * each, "dealer": 9 * each})
    assert memory.failures(sizes, found) == []
    sizes[1] = _size(memory, "27M", 5.0)
    found.grown["dealer"] = 13 * each
    assert memory.failures(sizes, found) == [
        "compiling took 5.18 bytes of its own for each parameter from 2M to 27M, more than 4",
        "the dealer took 13.0 bytes for each cached number, more than 12",
    ]


def test_a_new_section_of_caches_takes_the_place_of_the_old_one(memory: Any) -> None:
    found = [memory.Caches(memory.WIDE, 10, {"server": 10, "client": 20, "dealer": 30})]
    section = memory.caches_section(found)
    text = f"# Page\n\n{section}\n\n## More\n"
    found[0].grown["dealer"] = 10**6
    after = memory.with_caches(text, memory.caches_section(found))
    assert after.count(memory.BEGIN) == 1
    assert after != text
    assert memory.with_caches(after, section) == text


@pytest.mark.slow
def test_masks_that_are_expanded_give_the_same_answer() -> None:
    command = [sys.executable, "benchmarks/memory.py", "--shapes", "2M"]
    given = {**environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if " | " in line]
    assert len([row for row in rows if row[0] == "2M"]) == 2


@pytest.mark.slow
def test_ranks_hold_their_parts_of_the_weights(memory: Any, tmp_path: Path) -> None:
    table = memory.by_ranks(memory.SHAPES["2M"], tmp_path, 2, [1, 2])
    stored = int(table.split()[1])
    _one, *both = [line.strip("| ").split(" | ") for line in table.splitlines()[4:]]
    for row in both:
        # The last page of a part may be a large one.
        assert stored // 2 <= int(row[-1]) <= stored
