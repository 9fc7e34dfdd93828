"""Kernels' files on disk: processes that write at the same time, and kernels that call others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mergec.runtime.kernels.compiled import KernelFile, _sources, compiled


def file(folder: Path, stamp: object = 1) -> KernelFile:
    return KernelFile(str(folder), "kernel-1.py311", stamp)


def test_signatures_that_are_saved_at_once_are_not_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process has read the index before this one writes it, and ends before it."""
    mine, other = file(tmp_path), file(tmp_path)
    write = mine._save_data

    def save_other_first(name: str, data: object) -> None:
        monkeypatch.setattr(other, "_load_index", dict)
        other.save("other", "code of other")
        write(name, data)

    monkeypatch.setattr(mine, "_save_data", save_other_first)
    mine.save("mine", "code of mine")
    found = file(tmp_path)
    assert found.load("mine") == "code of mine"
    assert found.load("other") in (None, "code of other")


def test_an_entry_that_is_lost_is_saved_again(tmp_path: Path) -> None:
    file(tmp_path).save("mine", "code")
    file(tmp_path)._save_index({})
    assert file(tmp_path).load("mine") is None
    file(tmp_path).save("mine", "code")
    assert file(tmp_path).load("mine") == "code"


def test_code_of_other_sources_is_not_loaded(tmp_path: Path) -> None:
    file(tmp_path, stamp=1).save("mine", "code")
    assert file(tmp_path, stamp=2).load("mine") is None


def test_kernels_know_the_sources_of_what_they_call() -> None:
    kernel = compiled()(lambda x: x + 1)
    assert isinstance(kernel._cache._cache_file, KernelFile)
    assert kernel._cache._cache_file._source_stamp[1] == _sources()
    assert {"aes.py", "dpf.py"} <= {name for name, *_ in _sources()}
    assert (kernel(np.arange(3)) == [1, 2, 3]).all()
