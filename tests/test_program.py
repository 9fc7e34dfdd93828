"""The Program class and the plaintext executor, on a handmade decoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mergec.compiler.answer import Answer, PlainAnswer
from mergec.compiler.backend.onnx_export import ValueType
from mergec.compiler.program import Program
from mergec.runtime.core.errors import BundleError, PromptError
from mergec.runtime.core.spec import ROLES
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.program.bundle import role_path, save_bundle
from tests.fixtures import VOCAB, WIDTH, decoder, greedy, tiny, weights

TYPES = {
    "logits": ValueType("float32", (1, "new", VOCAB)),
    "cache.out": ValueType("float32", (1, 1, "past+new", WIDTH)),
}


@pytest.fixture
def program() -> Program:
    return Program({role: decoder(role) for role in ROLES}, TYPES)


def test_plain_step_and_cache() -> None:
    plain = PlainExecutor(decoder("server"))
    first = plain.step({"ids": torch.tensor([[1, 2, 3]]), **plain.start()})
    assert first["logits"].shape == (1, 3, VOCAB)
    assert first["cache.out"].shape == (1, 1, 3, WIDTH)
    second = plain.step({"ids": torch.tensor([[4]]), "cache": first["cache.out"]})
    assert second["cache.out"].shape == (1, 1, 4, WIDTH)
    held = weights()
    expected = held["embed.weight"][4] @ held["up.weight"].T @ held["head.weight"].T
    assert torch.allclose(second["logits"][0, 0], expected, rtol=1e-6, atol=1e-6)


def test_plain_generation_stops() -> None:
    plain = PlainExecutor(decoder("server"))
    expected = greedy([3], 6)
    assert [token for token, _ in plain.generate([3], 6)] == expected
    stopped = [token for token, _ in plain.generate([3], 6, stop=[expected[0]])]
    assert stopped == expected[:1]


def test_plain_needs_the_weights() -> None:
    with pytest.raises(PromptError, match="client's bundle has none"):
        PlainExecutor(decoder("client"))


def test_save_load_save(program: Program, tmp_path: Path) -> None:
    program.save(tmp_path / "a")
    assert Program.stands_at(tmp_path / "a")
    assert not Program.stands_at(tmp_path)
    loaded = Program.load(tmp_path / "a")
    assert loaded.describe() == Program.load(tmp_path / "a", roles=["client"]).describe()
    loaded.save(tmp_path / "b")
    for role in ROLES:
        one, other = (role_path(tmp_path / name, role) for name in "ab")
        assert [f.name for f in sorted(one.iterdir())] == [f.name for f in sorted(other.iterdir())]
        for file in one.iterdir():
            assert file.read_bytes() == (other / file.name).read_bytes(), file.name


def test_bundles_of_two_programs(program: Program, tmp_path: Path) -> None:
    program.save(tmp_path / "a")
    save_bundle(tiny("dealer"), tmp_path / "a" / "dealer")
    for roles in (ROLES, ["client"]):
        with pytest.raises(BundleError, match="are of different programs"):
            Program.load(tmp_path / "a", roles)


def test_only_what_was_loaded_can_be_saved(program: Program, tmp_path: Path) -> None:
    program.save(tmp_path / "a")
    with pytest.raises(BundleError, match="server's program was not loaded"):
        Program.load(tmp_path / "a", roles=["client"]).save(tmp_path / "b")


def test_inspection_needs_no_weights(program: Program, tmp_path: Path) -> None:
    program.save(tmp_path / "a")
    inspection = Program.load(tmp_path / "a", roles=["client"]).inspect(2, 5)
    assert json.loads(inspection.to_json()) == json.loads(program.inspect(2, 5).to_json())
    embedding = next(row for row in inspection.by_op if row.key == "mpc.embedding")
    assert (embedding.rounds, embedding.online) == (1, 8 * 2 * VOCAB)
    assert [row.key for row in inspection.by_layer] == ["model.layers.0", "lm_head"]
    with pytest.raises(PromptError, match="more than the 16"):
        program.inspect(1, 16)


def test_plaintext_beside_an_answer(program: Program) -> None:
    expected = greedy([3, 5], 4)
    plain = program.plaintext(Answer("", [3, 5], expected))
    assert plain.tokens == expected
    assert plain.verdict(Answer("", [3, 5], expected)) == "all 4 tokens are the same"


def test_where_answers_part() -> None:
    plain = PlainAnswer("", [1, 2, 3], [0.5, 0.01, 0.7])
    assert plain.first_difference(Answer("", [], [1, 2])) == 2
    close = plain.verdict(Answer("", [], [1, 9, 3]))
    assert "token 2" in close
    assert "0.010 apart (a close call)" in close
    assert "no close call" in plain.verdict(Answer("", [], [9, 2, 3]))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("hello", "no tokenizer"),
        ([], "empty"),
        ([VOCAB], "not in the vocabulary"),
        ([-1], "is -1; it can be 0 or more"),
        (list(range(10)) * 2, "20 tokens"),
    ],
)
def test_bad_prompts(program: Program, prompt: object, words: str) -> None:
    with pytest.raises((PromptError, BundleError), match=words):
        program.generate_local(prompt)  # type: ignore[arg-type]
