"""The server's weights as integers, and which tensors a program drops when they are taken."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mergec.runtime.core import context
from mergec.runtime.core.context import DealerContext
from mergec.runtime.core.errors import PartyError
from mergec.runtime.core.memory import mapped_words
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.spec import ROLES, SERVER, Vis
from mergec.runtime.core.values import Expanded, Held, Sent
from mergec.runtime.engine.simulate import Corrections
from mergec.runtime.engine.weights import encode_weight, take_weights, words_to_store
from mergec.runtime.kernels.matmul import matmul_columns, matmul_rows
from mergec.runtime.program.bundle import WORDS, load_bundle, save_bundle
from mergec.runtime.program.program import Instruction, Ref
from mergec.runtime.protocols import weights
from mergec.runtime.roles.inprocess import InProcessSession
from tests import decoder as sample
from tests.fixtures import decoder, tiny
from tests.services import deployment


def test_each_weight_is_held_once_as_integers() -> None:
    program = decoder("server")
    floats = dict(program.tensors)
    taken = take_weights(program)
    assert not program.tensors, "nothing else reads them"
    assert taken["embed.weight"] is taken["head.weight"], "tied weights are one tensor"
    for name, words in taken.items():
        assert words.dtype is torch.int32
        assert torch.equal(words, torch.round(floats[name] * 2**16).to(torch.int32))


def test_words_that_need_it_are_wide() -> None:
    program = decoder("server", fractional_bits=20)
    program.tensors["up.weight"] = program.tensors["up.weight"] * 2.0**12
    taken = take_weights(program)
    assert taken["up.weight"].dtype is torch.int64
    assert taken["embed.weight"].dtype is torch.int32


def test_what_is_read_in_the_clear_stays() -> None:
    program = tiny("server")
    double = Instruction("double", "aten.mul.Tensor", (Ref("up.weight"), 2.0), {}, Vis.SERVER, 0)
    program.instructions.append(double)
    taken = take_weights(program)
    assert {"embed.weight", "up.weight", "head.weight"} <= set(taken)
    assert {"cos", "up.weight"} <= set(program.tensors)
    assert "embed.weight" not in program.tensors


def test_other_roles_have_none() -> None:
    assert not take_weights(decoder("client"))
    assert words_to_store(decoder("client")) == ({}, {})


def test_a_server_holds_no_real_numbers_of_masked_weights() -> None:
    """They are there as integers: on a device real ones would take as much memory again."""
    programs = {role: sample.program(role) for role in ROLES}
    with InProcessSession(programs) as session:
        constants = session.executors[SERVER]._constants
        session.step([5, 1, 7], 0)
    held = {
        name: value.value
        for name, value in constants.held.items()
        if isinstance(value, Held) and not value.value.is_meta
    }
    assert set(held) == {"out.bias"}
    words = [weight.encoded for weight in constants.weights.values()]
    assert {each.dtype for each in words} == {torch.int32}
    elements = sum(tensor.numel() for tensor in sample.weights().values())
    assert sum(each.nbytes for each in (*held.values(), *words)) == 4 * elements


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    program = decoder("server", fractional_bits=20)
    program.tensors["up.weight"] = program.tensors["up.weight"] * 2.0**12
    return save_bundle(program, tmp_path / "server", words=words_to_store(program))


def test_words_of_a_bundle_are_those_encoded_here_and_are_mapped(bundle: Path) -> None:
    stored, encoded = load_bundle(bundle, "server"), load_bundle(bundle, "server")
    assert set(stored.words) == {"embed.weight", "up.weight", "head.weight"}
    encoded.words.clear()
    taken, wanted = take_weights(stored), take_weights(encoded)
    assert taken.keys() == wanted.keys()
    for name, words in wanted.items():
        assert words.dtype is taken[name].dtype
        assert torch.equal(words, taken[name])
        assert _mapped(taken[name], bundle / WORDS)
        assert not _mapped(words, bundle / WORDS)
    assert taken["up.weight"].dtype is torch.int64
    assert taken["embed.weight"] is taken["head.weight"], "tied weights are one tensor"
    assert not stored.tensors
    assert not stored.words


def test_words_of_former_weights_are_not_used(bundle: Path) -> None:
    program = load_bundle(bundle, "server")
    program.tensors["up.weight"] = program.tensors["up.weight"] + 1
    wanted = encode_weight(program.tensors["up.weight"], 20)
    assert torch.equal(take_weights(program)["up.weight"], wanted)


def _mapped(tensor: torch.Tensor, file: Path) -> bool:
    """Whether a tensor lies in a mapping of the file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(end, 16) for end in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < stop:
            return line.endswith(str(file))
    return False


def test_masks_expanded_for_each_product_deal_the_same_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(context, "_LARGE_BYTES", 16)
    monkeypatch.setattr(weights, "PIECE", 24)
    generator = torch.Generator().manual_seed(5)

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**62), 2**62, shape, generator=generator)

    given = {"rows": (7, 8), "columns": (8, 7), "gain": (8,), "one": ()}
    x = words(3, 8)
    dealt = []
    for expand in (False, True):
        stream = Corrections()
        dealer = DealerContext(b"c" * 32, b"s" * 32, Corrections(), stream, expand=expand)
        for name, shape in given.items():
            ghost = torch.empty(shape, dtype=torch.int64, device="meta")
            (made,) = [*_played(weights.share_weight(dealer, name, ghost, 16))]
            assert isinstance(made.mask, Expanded) is (expand and name != "one")
            assert made.mask.shape == shape
            product = {"rows": matmul_rows, "columns": matmul_columns}.get(name, torch.mul)
            moved = Sent(ghost, x, 16)
            result = weights.times_weight(
                dealer, moved, made, product, tuple(product(x, torch.ones(shape).long()).shape)
            )
            assert result.is_meta
            with pytest.raises(RuntimeError, match="a second constant"):
                dealer.weight_mask(name, shape)
        dealt.append(stream.read(stream.total))
    assert torch.equal(*dealt)
    assert dealt[0].numel() == 8 * (3 * 7 + 3 * 7 + 3 * 8 + 3 * 8)


def _played(protocol: Protocol) -> Iterator[Any]:
    """The result of a protocol at the dealer."""
    try:
        while True:
            protocol.send(None)
    except StopIteration as stop:
        yield stop.value


def test_a_session_with_words_in_files_and_masks_that_are_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, ...]] = []
    monkeypatch.setattr(context, "_LARGE_BYTES", 16)

    def mapped(shape: Sequence[int]) -> torch.Tensor:
        made.append(tuple(shape))
        return mapped_words(shape)

    monkeypatch.setattr(context, "mapped_words", mapped)
    bundles, prompt = sample.save(tmp_path / "bundles"), [5, 1, 7]
    with (
        deployment(bundles, deal=("--expand-masks",), patch=expand_small_masks) as running,
        running.connection() as connection,
    ):
        answer = [token.token for token in connection.generate(prompt, max_tokens=4)]
    assert answer == sample.plaintext(bundles, prompt, 4)
    assert (sample.VOCAB, sample.WIDTH) in made


def test_a_server_whose_words_are_written_to_serves_no_more_sessions(tmp_path: Path) -> None:
    """Under masks that clients keep, other weights would be opened under the same masks."""
    bundles, prompt = sample.save(tmp_path / "bundles"), [5, 1, 7]
    server = bundles / "server"
    program = load_bundle(server, "server")
    save_bundle(program, server, words=words_to_store(program))
    answer = sample.plaintext(bundles, prompt, 4)

    def ask(running: Any) -> list[int]:
        with running.connection() as connection:
            return [token.token for token in connection.generate(prompt, max_tokens=4)]

    with deployment(bundles) as running:
        assert ask(running) == answer
        program = sample.program("server", seed=4)
        save_bundle(program, server, words=words_to_store(program))
        assert ask(running) == answer, "a new bundle is in other files"
    with deployment(bundles) as running:
        assert ask(running) == sample.plaintext(bundles, prompt, 4) != answer
        with (server / WORDS).open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")
        with pytest.raises(PartyError, match="bundle was written to; it has to be started again"):
            ask(running)


def expand_small_masks() -> None:
    """At the dealer: as if the weights were large; and see that every mask is expanded."""
    context._LARGE_BYTES = 16
    keep = context.DealerContext.kept_weight_mask

    def expanded(*args: Any) -> Any:
        mask = keep(*args)
        assert isinstance(mask, Expanded)
        return mask

    context.DealerContext.kept_weight_mask = expanded  # type: ignore[method-assign]
