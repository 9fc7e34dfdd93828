"""Lists, counts and removes the stores in a folder."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mergec.runtime.session.stores.format import (
    HEADER,
    StoreError,
    is_store,
    read_file,
    read_header,
    sync_folder,
)
from mergec.runtime.session.stores.journal import count_entries


def stores_below(root: Path) -> list[Path]:
    """The folders of all stores in `root`."""
    try:
        return sorted(place for place in root.iterdir() if is_store(place.name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(f"{root}: cannot be read ({error.strerror})") from error


def left_below(root: Path) -> dict[str, tuple[int, int]]:
    """Unused answers and tokens in the stores in `root`, by the client that may use them.

    This needs no key. A store whose header cannot be read does not count.
    """
    found: dict[str, tuple[int, int]] = {}
    for folder in stores_below(root):
        with suppress(StoreError):
            header = read_header(folder, read_file(folder, HEADER))
            left = max(0, header.answers - count_entries(folder))
            answers, tokens = found.get(header.client, (0, 0))
            found[header.client] = answers + left, tokens + left * header.tokens
    return found


def remove_store(root: Path, number: str) -> None:
    """Remove a store of which the other party has no part."""
    shutil.rmtree(root / number, ignore_errors=True)
    with suppress(OSError):
        sync_folder(root)


def remove_unfinished(root: Path) -> int:
    """Remove unfinished stores that killed preparations left behind; returns their number."""
    removed = 0
    if not root.is_dir():
        return removed
    with locked(root):
        for place in root.iterdir():
            if place.name[:1] == "." and is_store(place.name[1:]):
                # A running preparation holds the lock of its folder, and may end at this moment.
                with (
                    suppress(BlockingIOError, FileNotFoundError),
                    locked(place, fcntl.LOCK_EX | fcntl.LOCK_NB),
                ):
                    shutil.rmtree(place, ignore_errors=True)
                    removed += 1
    return removed


@contextmanager
def locked(folder: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold a lock of the folder, or file; it is released with the process at the latest."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)
