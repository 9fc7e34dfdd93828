"""What a process reports about its own memory, and words that lie in a file."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from mergec.runtime.core.memory import mapped_words, peak_bytes

SIZE = 300 << 20


def test_a_peak_is_remembered_and_not_inherited() -> None:
    before = peak_bytes()
    held = bytearray(b"x") * (before + SIZE)
    assert peak_bytes() >= before + SIZE
    del held
    assert peak_bytes() >= before + SIZE
    code = "from mergec.runtime.core.memory import peak_bytes; print(peak_bytes())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(child.stdout) < SIZE


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("shape", [(5,), (3, 70_000), ()])
def test_words_in_a_file_that_has_no_name(folder: Path, shape: tuple[int, ...]) -> None:
    words = mapped_words(shape)
    assert words.shape == shape
    assert words.dtype is torch.int64
    given = torch.arange(words.numel()).reshape(shape) - 2**63
    words.copy_(given)
    assert torch.equal(words, given)
    assert str(folder) in Path("/proc/self/maps").read_text()
    assert not [*folder.iterdir()], "it is gone with the process, however that ends"
    opened = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [name for name in opened if str(folder) in name], "the mapping is enough"


def test_without_room_for_a_file_they_are_in_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "posix_fallocate", full)
    words = mapped_words((2, 3))
    assert not [*folder.iterdir()]
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert torch.equal(words.fill_(7), torch.full((2, 3), 7))
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "nowhere"))
    assert mapped_words((2, 3)).shape == (2, 3)
