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
