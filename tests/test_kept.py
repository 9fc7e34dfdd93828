"""Hidden weights that a client keeps: sent once, under masks that never hide another weight."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch

from mergec.runtime.core.errors import MergecError
from mergec.runtime.engine.weights import take_weights
from mergec.runtime.session.requests import Plan
from mergec.runtime.session.stores.kept import Kept, digest_of, is_name, mask_seed, name_of
from mergec.runtime.session.stores.reader import Store
from tests import decoder
from tests.services import Deployment, deployment

KEY = bytes(range(32))
PROMPT = [5, 1, 7]
NAME = "ab" * 32


@pytest.fixture
def key(tmp_path: Path) -> Path:
    file = tmp_path / "key"
    file.write_text(KEY.hex())
    return file


def ask(made: Deployment, keep: Path | None, **options) -> tuple[int, list[int]]:
    """The bytes that opening a session took, and an answer."""
    with made.connection(keep=keep, **options) as connection:
        answer = [token.token for token in connection.generate(PROMPT, max_tokens=4)]
        return connection.setup.received, answer


def test_weights_are_sent_once(tmp_path: Path, key: Path) -> None:
    bundles, keep = decoder.save(tmp_path / "bundles"), tmp_path / "keep"
    plain = decoder.plaintext(bundles, PROMPT, 4)
    whole = 8 * sum(w.numel() for name, w in decoder.weights().items() if name != "out.bias")
    options = ("--store-key", str(key), "--stores", str(tmp_path / "stores"))
    with deployment(bundles, serve=options) as made:
        assert ask(made, None) == (whole, plain)
        assert not keep.exists()
        assert ask(made, keep) == (whole, plain)
        (file,) = keep.iterdir()
        first = file.read_bytes()
        assert ask(made, keep) == (0, plain)
        file.write_bytes(first[:-1] + bytes([first[-1] ^ 1]))
        assert ask(made, keep) == (whole, plain), "what was damaged is taken anew"
        assert file.read_bytes() == first, "the same message every time"
        # With a store the masks are those of the store.
        place, _ = made.connection().prepare(Plan(3, 3, 4), tmp_path / "stores.client", KEY)
        for taken in (whole, 0):
            stored = {"dealer": None, "store": Store.open(place, KEY)}
            assert ask(made, keep, **stored) == (taken, plain)
        assert len(list(keep.iterdir())) == 2
    # A server that was started again has the same masks by the same key, and others by another.
    with deployment(bundles, serve=("--store-key", str(key))) as made:
        assert ask(made, keep) == (0, plain)
    key.write_text("cd" * 32)
    with deployment(bundles, serve=("--store-key", str(key))) as made:
        assert ask(made, keep) == (whole, plain)
    held = b"".join(f.read_bytes() for f in keep.iterdir())
    for secret in (KEY, *(w.numpy().tobytes()[:16] for w in decoder.weights().values())):
        assert secret not in held


def test_masks_depend_on_all_that_they_may_not_be_shared_between() -> None:
    def seed(weights_seed: int = 3, program: str = "p", client: str = "ann", key: bytes = KEY):
        words = take_weights(decoder.program("server", weights_seed))
        return mask_seed(key, program, client, digest_of(words))

    seeds = [seed(), seed(4), seed(program="q"), seed(client="bob"), seed(key=bytes(32))]
    assert len({*seeds, *map(name_of, map(bytes.fromhex, map(name_of, seeds)))}) == 10
    assert seed() == seeds[0]
    assert all(is_name(name_of(made)) for made in seeds)


def test_a_digest_tells_tensors_apart() -> None:
    words = torch.arange(6, dtype=torch.int32)
    told = [
        {"a": words},
        {"b": words},
        {"a": words.reshape(2, 3)},
        {"a": words.to(torch.int64)},
        {"a": words + 1},
        {"a": words[0]},
        {"a": words, "b": words},
    ]
    assert len({digest_of(tensors) for tensors in told}) == len(told)


@pytest.mark.parametrize("name", ["", None, 5, "../" * 21 + "x", "AB" * 32, "ab" * 31])
def test_what_a_server_names_cannot_leave_the_folder(name: object) -> None:
    assert not is_name(name)


def test_weights_are_mapped_and_what_is_damaged_is_not_used(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "cd" * 32, NAME)
    kept.save({"a": torch.arange(6).reshape(2, 3), "b": torch.tensor(5), "c": torch.zeros(0, 4)})
    tensors, file = kept.load()
    assert tensors["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (int(tensors["b"]), tensors["c"].shape) == (5, (0, 4))
    assert file.start(tensors["a"]) == file.start(tensors["a"][1]) - 24
    (place,) = tmp_path.iterdir()
    whole = place.read_bytes()
    for damaged in (
        b"",
        whole[:7],
        whole[:-1],
        whole[:-1] + b"x",
        whole.replace(b"I64", b"F16", 1),
    ):
        place.write_bytes(damaged)
        assert kept.load() is None


def test_no_room_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        MergecError, match=r"cannot be written .*; leave out --keep, or free some space"
    ):
        Kept(tmp_path / "file", "cd" * 32, NAME).save({"a": torch.zeros(3)})
    kept = Kept(tmp_path / "keep", "cd" * 32, NAME)
    assert kept.load() is None
    kept.save({"a": torch.arange(3)})
    assert stat.S_IMODE((tmp_path / "keep").stat().st_mode) == 0o700, "for its owner alone"
    tensors, file = kept.load()
    assert tensors["a"].tolist() == [0, 1, 2]
    assert file.start(tensors["a"]) is not None
    assert Kept(tmp_path / "keep", "ce" * 32, NAME).load() is None
