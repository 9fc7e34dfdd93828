"""What a process reports about its own memory, and words that lie in pages of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from mergec.runtime.core.memory import WordsFile, mapped_words, peak_bytes, returned_words

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


# ------------------------------------------------------------------------------- files of words


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "words"
    path.write_bytes(torch.arange(1 << 20).to(torch.int32).numpy().tobytes())
    return path


def resident(file: Path) -> int:
    """Bytes of a file that this process holds in pages."""
    held, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "Rss" and inside:
            held += int(rest.split()[0]) * 1024
        elif not name.isalpha():  # a mapping's first line, or another of its numbers
            inside = line.endswith(str(file)) if "-" in line.split()[0] else inside
    return held


def test_words_of_a_file_are_mapped_where_they_lie(file: Path) -> None:
    mapped = WordsFile.open(file)
    words = mapped.words(4096, (2, 3), torch.int32)
    assert words.tolist() == [[1024, 1025, 1026], [1027, 1028, 1029]]
    wide = mapped.words(8, (), torch.int64)
    assert int(wide) == 2 + (3 << 32)
    assert mapped.words(1 << 22, (0, 5), torch.int32).shape == (0, 5)
    for start, shape in ((-4, (1,)), (1 << 22, (1,)), (0, (1 << 20, 2)), (2, (1,))):
        with pytest.raises(ValueError, match="has no"):
            mapped.words(start, shape, torch.int32)
    assert mapped.start(words) == 4096
    assert mapped.start(words[1:]) == 4108
    assert mapped.start(words[:, 1:]) is None, "not in one piece"
    assert mapped.start(words.clone()) is None
    assert mapped.start(words.to("meta")) is None
    assert WordsFile.open(file).start(words) is None, "of another mapping"


def test_a_file_that_takes_the_name_is_another_one(file: Path, tmp_path: Path) -> None:
    mapped = WordsFile.open(file)
    words = mapped.words(0, (4,), torch.int32)
    other = tmp_path / "other"
    other.write_bytes(bytes(1 << 22))
    other.rename(file)
    assert words.tolist() == [0, 1, 2, 3]
    again = WordsFile(os.dup(mapped.descriptor))
    assert again.words(0, (4,), torch.int32).tolist() == [0, 1, 2, 3]
    assert not WordsFile.open(file).words(0, (4,), torch.int32).any()


def test_an_empty_file_has_no_words_and_its_descriptor_is_closed(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    before = len([*Path("/proc/self/fd").iterdir()])
    with pytest.raises(ValueError, match="empty"):
        WordsFile.open(tmp_path / "empty")
    assert len([*Path("/proc/self/fd").iterdir()]) == before


def test_pages_that_are_let_go_are_read_again_when_they_are_used(file: Path) -> None:
    mapped = WordsFile.open(file)
    words = mapped.words(4, ((1 << 20) - 1,), torch.int32)
    assert resident(file) == 0
    total = int(words.sum())
    assert resident(file) == 1 << 22
    mapped.release(words[1 << 19 :])
    assert 1 << 21 <= resident(file) < (1 << 21) + (1 << 14)
    mapped.release(words[:7])
    mapped.release(words.clone())
    assert int(words.sum()) == total
    assert resident(file) == 1 << 22


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("rows", [3, 40_000])
def test_words_that_are_returned_are_ordinary_ones(dtype: torch.dtype, rows: int) -> None:
    like = torch.empty(0, dtype=dtype)
    with torch.inference_mode():
        words = returned_words((2, rows, 5), like)
        words[:] = 7
    assert words.shape == (2, rows, 5)
    assert words.dtype is dtype
    assert bool((words == 7).all())
    assert returned_words((2, rows, 5), like.to("meta")).is_meta


def test_words_that_are_returned_leave_no_pages_behind() -> None:
    """Also in a process that keeps what it frees."""
    code = (
        "import torch\n"
        "from mergec.runtime.core.memory import keep_freed_memory, returned_words\n"
        "def own(): return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "keep_freed_memory()\n"
        "like, before = torch.empty(0, dtype=torch.int64), own()\n"
        "words = returned_words((10_000_000,), like).fill_(1)\n"
        "assert own() > before + 70_000_000\n"
        "del words\n"
        "assert own() < before + 10_000_000\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
