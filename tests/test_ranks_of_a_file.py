"""Ranks of a server map their parts of the bundle's words: nothing is copied, and words are those
of one rank."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import torch

from mergec.runtime.core.memory import WordsFile
from mergec.runtime.core.spec import ROLES, SERVER
from mergec.runtime.core.values import Weight
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.engine.weights import take_weights, words_to_store
from mergec.runtime.kernels.matmul import matmul_columns, matmul_rows
from mergec.runtime.kernels.spread import Spread, whole
from mergec.runtime.program.bundle import WORDS, load_bundle, save_bundle
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.ranks.group import Group
from mergec.runtime.ranks.start import Party, start
from mergec.runtime.roles.local import run_local
from tests import decoder
from tests.services import deployment, wait_until
from tests.test_ranks import Recorded, other_ranks, words

SHAPES = ((6, 4), (7, 5), (1, 2), (2, 1), (64, 33))
"""Matrices of the file: 32-bit words, then the same shapes in 64 bits."""


@pytest.fixture(scope="module")
def matrices() -> list[torch.Tensor]:
    wide = [words(*shape) for shape in SHAPES]
    return [*(matrix.to(torch.int32) for matrix in wide), *wide]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, matrices: list[torch.Tensor]) -> Path:
    path = tmp_path_factory.mktemp("words") / "words"
    path.write_bytes(b"".join(matrix.numpy().tobytes() for matrix in reversed(matrices)))
    return path


@pytest.fixture(scope="module", params=[2, 3])
def party(request: pytest.FixtureRequest, file: Path) -> Iterator[Party]:
    made = start("server", request.param, threads=1, file=WordsFile.open(file))
    yield made
    made.close()


def mapped(group: Group, matrices: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, Spread]]:
    """Each matrix, as written and as the ranks hold it."""
    assert group._file is not None
    at = 0
    for matrix in reversed(matrices):
        found = group.mapped(group._file.words(at, matrix.shape, matrix.dtype))
        assert found is not None
        at += matrix.nbytes
        yield matrix, found


def test_products_with_what_lies_in_a_file(party: Party, matrices: list[torch.Tensor]) -> None:
    for matrix, held in mapped(party.group, matrices):
        assert torch.equal(whole(held), matrix)
        for rows in (0, 1, 5):
            x = words(rows, matrix.shape[1], seed=1)
            assert torch.equal(matmul_rows(x, held), matmul_rows(x, matrix))
            x = words(1, rows, matrix.shape[0], seed=2)
            assert torch.equal(matmul_columns(x, held), matmul_columns(x, matrix))
            ids = torch.arange(rows) % matrix.shape[0]
            assert torch.equal(held[ids], matrix[ids].long())


def test_nothing_is_copied_and_parts_are_dropped(
    party: Party, matrices: list[torch.Tensor]
) -> None:
    group = party.group
    before = group.held_bytes()
    held = [found for _, found in mapped(group, matrices)]
    grown = [now - then for now, then in zip(group.held_bytes(), before, strict=True)]
    assert sum(grown) == sum(matrix.nbytes for matrix in matrices)
    assert group.held_bytes(mapped=True) == grown
    del held
    assert group.held_bytes() == before
    assert not any(group.held_bytes(mapped=True))


def test_a_rank_holds_pages_of_its_own_part(tmp_path: Path) -> None:
    matrix = words(4096, 1024)
    (tmp_path / "words").write_bytes(matrix.numpy().tobytes())
    file = WordsFile.open(tmp_path / "words")
    party = start("server", 2, threads=1, file=file)
    try:
        held = party.group.mapped(file.words(0, matrix.shape, matrix.dtype))
        assert held is not None
        x = words(2, 1024)
        assert torch.equal(matmul_rows(x, held), matmul_rows(x, matrix))
        for pid in (os.getpid(), *party.pids.values()):
            maps = psutil.Process(pid).memory_maps()
            (seen,) = (m for m in maps if m.path == str(tmp_path / "words"))
            # Reading a page may map a large page around it.
            assert matrix.nbytes // 2 <= seen.rss <= matrix.nbytes // 2 + (4 << 20)
            assert seen.anonymous == 0
    finally:
        party.close()


def test_what_lies_elsewhere_is_not_mapped(party: Party, file: Path) -> None:
    assert party.group.mapped(words(6, 4)) is None
    assert party.group.mapped(WordsFile.open(file).words(0, (6, 4), torch.int32)) is None
    context = Simulation().contexts[SERVER]
    context.ranks = party.group
    kept = context.keep_weight(words(6, 4))
    assert isinstance(kept, Spread)
    assert not any(party.group.held_bytes(mapped=True))
    assert party.group._file is not None
    row = context.keep_weight(party.group._file.words(0, (5,), torch.int64))
    assert not isinstance(row, Spread), "only matrices are spread"


# -------------------------------------------------------------------------------- whole programs


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("bundles"))


def saved(folder: Path, seed: int = 3) -> Path:
    """Bundles of the handwritten decoder, with words in the server's."""
    decoder.save(folder, seed, max_length=2**20)
    program = load_bundle(folder / "server", "server")
    save_bundle(program, folder / "server", words=words_to_store(program))
    return folder


def roles(bundle: Path) -> Mapping[str, RoleProgram]:
    return {role: load_bundle(bundle / role, role) for role in ROLES}


def sent(
    programs: Mapping[str, RoleProgram], group: Group | None
) -> tuple[list[str], list[torch.Tensor]]:
    """Digests of all that is sent in a prompt and a step of a server that maps its words."""
    ranks = {} if group is None else {SERVER: group}
    session = Recorded(programs, ranks)
    executor = session.executors[SERVER]
    executor._encoded = take_weights(programs[ROLES[SERVER]])
    with session:
        if group is not None:
            weights = executor._constants.weights.values()
            held = [weight.encoded for weight in weights if isinstance(weight, Weight)]
            matrices = [weight for weight in held if weight.dim() == 2]
            assert len(matrices) > 3
            assert all(isinstance(weight, Spread) for weight in matrices)
            assert sum(group.held_bytes(mapped=True)) == sum(w.numel() * 4 for w in matrices)
            assert group.held_bytes(mapped=True) == group.held_bytes()
        logits = [session.step([5, 1, 7], 0), session.step([2], 3)]
    return [digest.hexdigest() for digest in session.digests], logits


@pytest.mark.parametrize("count", [2, 3])
def test_a_server_that_maps_its_parts_sends_the_same_words(bundle: Path, count: int) -> None:
    digests, logits = sent(roles(bundle), None)
    programs = roles(bundle)
    party = start("server", count, threads=1, file=programs[ROLES[SERVER]].words_file)
    try:
        found, others = sent(programs, party.group)
    finally:
        party.close()
    assert found == digests
    assert all(torch.equal(*pair) for pair in zip(logits, others, strict=True))


@pytest.mark.slow
def test_three_processes_whose_server_maps_its_parts(bundle: Path) -> None:
    result = run_local(bundle, [5, 1, 7], max_tokens=4, ranks=2)
    assert result.tokens == decoder.plaintext(bundle, [5, 1, 7], 4)


@pytest.mark.slow
def test_ranks_of_a_session_map_the_file_that_the_server_began_with(tmp_path: Path) -> None:
    """Also if another bundle has taken its place: its words would be under masks of the former."""
    bundles, prompt = saved(tmp_path / "bundles"), [5, 1, 7]
    expected = decoder.plaintext(bundles, prompt, 4)
    with deployment(bundles, serve=("--ranks", "2")) as made:
        made.server.wait_for("listening")
        saved(bundles, seed=4)
        assert decoder.plaintext(bundles, prompt, 4) != expected
        with made.connection() as connection:
            answer = connection.generate(prompt, max_tokens=4)
            found = [next(answer).token]
            (rank,) = other_ranks(made.server.process.pid)
            maps = Path(f"/proc/{rank.pid}/maps").read_text().splitlines()
            assert [line for line in maps if WORDS in line and line.endswith("(deleted)")]
            found += [token.token for token in answer]
        assert found == expected
        wait_until(lambda: not other_ranks(made.server.process.pid))
