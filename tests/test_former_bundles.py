"""Bundles that an earlier release made still load and run.

`golden/bundles-0.1.0.tar.gz` is a Llama of one layer (16 wide, vocabulary of 32, random weights)
that mergec 0.1.0 compiled. A release that raises the format version replaces it, and its test then
expects the refusal.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from mergec import Program
from mergec.runtime.roles.inprocess import InProcessSession

ARCHIVE = Path(__file__).parent / "golden" / "bundles-0.1.0.tar.gz"
PROMPT, ANSWER = [1, 2, 3], [12, 28, 1, 2]
"""What mergec 0.1.0 answered, in three processes and in plaintext."""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    folder = tmp_path_factory.mktemp("former")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return Program.load(folder / "bundles-0.1.0")


def test_a_former_bundle_answers_as_before(program: Program) -> None:
    tokens = list(PROMPT)
    with InProcessSession(program.roles) as session:
        new, past = PROMPT, 0
        for _ in ANSWER:
            tokens.append(int(session.step(new, past).argmax()))
            new, past = tokens[-1:], past + len(new)
    assert tokens == PROMPT + ANSWER


def test_a_former_bundle_can_be_inspected(program: Program) -> None:
    predicted = program.manifest.cost["decode"]
    found = program.inspect(new=predicted["new"], past=predicted["past"])
    # Protocols may have become cheaper since.
    for figure in ("rounds", "online", "offline"):
        assert 0 < getattr(found.total, figure) <= predicted[figure], figure
    assert [row.name for row in found.passes]
