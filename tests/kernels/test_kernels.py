"""Every hot loop gives the same words on the CPU, by torch alone, and by Triton's interpreter."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch.utils._python_dispatch import TorchDispatchMode

from mergec.runtime.core.spec import ROLES
from mergec.runtime.correlations.prg import DevicePrg, Prg
from mergec.runtime.engine import executor
from mergec.runtime.kernels import backends, bitsliced, transfers
from mergec.runtime.kernels.backends import KERNELS, Kernel
from mergec.runtime.kernels.transfers import Guard, HiddenTransferError, to_device, to_host
from mergec.runtime.protocols import slots
from mergec.runtime.roles.inprocess import InProcessSession
from tests import decoder
from tests.kernels.cases import CASES, below, differing, words

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
ATEN: Any = torch.ops.aten

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def program(module: str, *options: str, **variables: str) -> str:
    """Output of a program of this folder. Triton reads its environment when it is imported."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.{module}", *options],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


# ------------------------------------------------------------------------------------------- AES


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (bytes(range(16)), "69c4e0d86a7b0430d8cdb78070b4c55a"),
        (bytes(range(32)), "8ea2b7ca516745bfeafc49904b496089"),
    ],
    ids=["C.1", "C.3"],
)
def test_vectors_of_fips_197(key: bytes, expected: str) -> None:
    plain = bytes.fromhex("00112233445566778899aabbccddeeff")
    block = np.frombuffer(plain, np.uint32).reshape(1, 4)
    assert bitsliced.encrypt(bitsliced.expand_key(key), block).tobytes().hex() == expected


def test_vectors_of_sp_800_38a() -> None:
    """F.5.5: the key stream of AES-256 in counter mode, from its counter blocks."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counters = "".join(f"f0f1f2f3f4f5f6f7f8f9fafbfcfd{last}" for last in ("feff", "ff00", "ff01"))
    blocks = np.frombuffer(bytes.fromhex(counters), np.uint32).reshape(-1, 4)
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52ef"
    )
    expected = bytes.fromhex(
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988d"
    )
    stream = bitsliced.encrypt(bitsliced.expand_key(key), blocks).tobytes()
    assert bytes(a ^ b for a, b in zip(stream, plain, strict=True)) == expected


@pytest.mark.parametrize("size", [16, 32])
def test_the_circuit_is_the_cipher_of_the_library(size: int) -> None:
    draw = np.random.default_rng(size)
    for count in (1, 2, 7):
        key, blocks = draw.bytes(size), draw.bytes(16 * count)
        expected = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(blocks)
        words = np.frombuffer(blocks, np.uint32).reshape(-1, 4)
        assert bitsliced.encrypt(bitsliced.expand_key(key), words).tobytes() == expected


def test_a_device_reads_the_same_stream() -> None:
    """By any pieces: words of the reference that stands in for a device's kernel."""
    seed = bytes(range(32))
    one, other = Prg(seed), DevicePrg(seed, CPU)
    for shape, dtype in (
        ((3,), torch.uint8), ((2, 5), torch.int64), ((0, 4), torch.int32), ((7,), torch.int16),
        ((70_000,), torch.int64), ((1,), torch.uint8), ((300_000,), torch.int32),
    ):  # fmt: skip
        assert torch.equal(one.tensor(shape, dtype), other.tensor(shape, dtype))
    for size in (5, 33):
        with pytest.raises(ValueError, match=f"a seed must have 32 bytes, not {size}"):
            DevicePrg(bytes(size), CPU)


# --------------------------------------------------------------------------------------- kernels


def test_every_kernel_has_calls() -> None:
    assert set(CASES) == set(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_torch_gives_the_words_of_the_cpu(name: str) -> None:
    kernel = KERNELS[name]
    for number, given in enumerate(CASES[name](False)):
        problem = differing(kernel, kernel.reference, given, number=number)
        assert problem is None, f"call {number}: {problem}"


class _Launches(TorchDispatchMode):
    """Counts torch's operators that launch something on a device: those that return no view."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = [each.alias_info for each in func._schema.returns]
        self.count += not any(alias is not None and not alias.is_write for alias in returned)
        return func(*args, **(kwargs or {}))


FEW = 20
"""Launches of torch that docs/cuda.md calls a few."""


@pytest.mark.parametrize("name", [n for n, kernel in KERNELS.items() if not kernel.has_triton])
def test_what_triton_does_not_do_is_a_few_launches_of_torch(name: str) -> None:
    reference = KERNELS[name].reference
    for given in CASES[name](True):
        with _Launches() as launches:
            reference(*given)
        assert 0 < launches.count <= FEW


@pytest.mark.slow
def test_no_kernel_of_the_cpu_leaves_its_arrays(tmp_path: Path) -> None:
    """numba then compiles all of them anew, with checks of indices."""
    printed = program("cases", "--host", NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(tmp_path))
    assert sorted(line.split(":")[0] for line in printed.splitlines()) == sorted(KERNELS)


def test_tallies_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = KERNELS["slots.tallied"]
    given = words(31, 64, dtype=torch.int8), words(31), below(3, 31), (3, 32)
    for indices in (1, 100, 31 * 32):
        monkeypatch.setattr(slots, "_INDICES", indices)
        assert differing(kernel, kernel.reference, given) is None


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the interpreter prints for all calls, and where it wrote which kernels they launch."""
    record = tmp_path_factory.mktemp("kernels") / "launched"
    return program("cases", "--record", str(record)), record


@needs_triton
def test_the_interpreter_gives_the_words_of_the_cpu(launched: tuple[str, Path]) -> None:
    printed, _ = launched
    assert sorted(line.split(":")[0] for line in printed.splitlines()) == sorted(KERNELS)


FORMS = {
    # Numbers of 64 bits and of 128, and XOR.
    "trees._corrections": 3,
    # A number of windows each.
    "trees._table": 2,
    # Shares of 64 bits and of 128.
    "trees._octave": 2,
    # Counters of 8 bits and of 16.
    "trees._tally": 2,
    # Weights of 32 bits and of 64, read along either side, even or not: those that calls have.
    "products._few": 6,
    "products._many": 6,
    # Types of words.
    "elements._evaluated": 4,
    "elements._scaled": 2,
    "elements._truncated": 2,
    "slots._one_hot": 2,
    # With a factor, and without.
    "elements._line": 2,
    # A number of cosines each.
    "gated._corrected": 3,
    "gated._values": 3,
    # Types of words, and up to 256 columns.
    "slots._tallied": 6,
}
"""How many forms of a kernel the calls take, where it is not one; a program has fewer."""


@needs_triton
def test_triton_compiles_no_kernel_anew_for_a_length_or_an_address(
    launched: tuple[str, Path],
) -> None:
    """Words begin at multiples of 16 bytes or of 8, and sizes are odd, even, one and zero."""
    printed = program("native", str(launched[1]), "count")
    found = dict(line.split(": ") for line in printed.splitlines())
    assert found == {name: str(FORMS.get(name, 1)) for name in found}
    assert set(FORMS) <= set(found)


@pytest.mark.slow
@needs_triton
def test_the_interpreter_gives_the_words_of_the_cpu_for_larger_calls() -> None:
    printed = program("cases", "--full")
    assert sorted(line.split(":")[0] for line in printed.splitlines()) == sorted(KERNELS)


@pytest.mark.slow
@needs_triton
def test_kernels_compile_for_a_gpu_that_is_not_here(launched: tuple[str, Path]) -> None:
    calls = json.loads(launched[1].read_text())
    printed = program("native", str(launched[1]), "90")
    assert {line.split(":")[0] for line in printed.splitlines()} == {
        f"{each['module'].rpartition('.')[2]}.{each['name']}" for each in calls
    }


@pytest.mark.slow
@needs_triton
def test_a_step_of_three_roles_on_a_device_gives_the_logits_of_the_cpu() -> None:
    """And copies nothing that is not a message, an input, an output or public."""
    printed = program("step")
    for session in ("pairs", "slots-6", "log-6", "slots-6, the client on the CPU"):
        assert f"{session}: the logits are equal" in printed


@pytest.mark.slow
@needs_triton
def test_protocols_on_a_device_give_the_words_of_the_cpu() -> None:
    printed = program("protocols").splitlines()
    assert printed
    assert all(line.endswith(": equal") for line in printed)


def test_torch_alone_serves_a_device_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "KERNELS", {})
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert Kernel("trees.some", torch.neg, torch.abs).on_device is torch.abs
    with pytest.raises(ValueError, match=r"there is a kernel trees\.some already"):
        Kernel("trees.some", torch.neg, torch.abs)


def test_pieces_of_a_kernel_cover_all_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "KERNELS", {})
    some = Kernel("trees.some", torch.neg, torch.neg, together=(3, 5))
    for count in (0, 1, 3, 7):
        for device, size in (("cpu", 3), ("meta", 5)):
            parts = [
                range(count)[piece] for piece in some.pieces(torch.empty(count, device=device))
            ]
            assert [each for part in parts for each in part] == list(range(count))
            assert all(len(part) == size for part in parts[:-1])
    with pytest.raises(ValueError, match=r"trees\.none takes all elements at once"):
        Kernel("trees.none", torch.neg, torch.neg).pieces(torch.empty(1))


def _asks_for_a_device(node: ast.AST) -> bool:
    """Whether code compares a device, or asks which type words or a device have."""
    if isinstance(node, ast.Attribute):
        named = node.attr == "type" and ast.unparse(node.value).endswith("device")
        return named or node.attr in ("is_cuda", "is_cpu")
    sides = (node.left, *node.comparators) if isinstance(node, ast.Compare) else ()
    return any(ast.unparse(side).endswith(("device", "'cuda'", "'cpu'")) for side in sides)


@pytest.mark.parametrize("folder", ["protocols", "ops"])
def test_protocols_and_ops_do_not_ask_where_words_are(folder: str) -> None:
    files = sorted((ROOT / "runtime" / folder).glob("*.py"))
    found = [
        f"{file.name}:{node.lineno}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if _asks_for_a_device(node) and isinstance(node, ast.expr)
    ]
    assert files
    assert not found
    for asked in ("ctx.device.type == 'cpu'", "x.is_cuda", "device == other", "where == 'cuda'"):
        assert any(map(_asks_for_a_device, ast.walk(ast.parse(asked))))


# ------------------------------------------------------------------------------------- transfers


def test_words_that_are_there_do_not_move() -> None:
    words = torch.arange(3)
    with Guard() as guard:
        assert to_device(words, CPU, "public") is words
        assert to_host(words, "output") is words
        assert to_device(words, torch.device("meta"), "public").is_meta
    assert not guard.bytes


@pytest.mark.parametrize("shape", [(), (1,), (7, 5), (64,)])
def test_words_move_in_pieces_that_are_pinned_one_by_one(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(transfers, "_PINNED_BYTES", 24)
    pinned = []

    def pin(piece: torch.Tensor) -> torch.Tensor:
        pinned.append(piece.nbytes)
        return piece.clone()

    for dtype in (torch.int64, torch.int32, torch.uint8):
        given = words(*shape, dtype=dtype)
        for part in (given, given.T if given.dim() == 2 else given):
            pinned.clear()
            assert torch.equal(transfers._in_pieces(part, CPU, pin), part)
            assert max(pinned) <= 24
            assert sum(pinned) == part.nbytes


HIDDEN: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "to the CPU": lambda x, mask: x.cpu(),
    "from the CPU": lambda x, mask: torch.zeros(6, device="cpu").to(x.device),
    "item": lambda x, mask: x.sum().item(),
    "condition": lambda x, mask: bool(mask.all()),
    "index by a mask": lambda x, mask: ATEN.index(x, [mask]),
    "index by a mask among others": lambda x, mask: ATEN.index(x.expand(2, 6), [None, mask]),
    "index_put by a mask": lambda x, mask: ATEN.index_put(x, [mask], 2 * x.narrow(0, 0, 3)),
    "index_put_ by a mask": lambda x, mask: ATEN.index_put_(x, [mask], 2 * x.narrow(0, 0, 1)),
    "index of the CPU": lambda x, mask: ATEN.index(x, [torch.arange(2, device="cpu")]),
    "repeat_interleave": lambda x, mask: x.repeat_interleave(x),
    "repeat_interleave alone": lambda x, mask: torch.repeat_interleave(x),
    "equal": lambda x, mask: torch.equal(x, x + 1),
    "allclose": lambda x, mask: torch.allclose(x.double(), x.double()),
    "masked_select": lambda x, mask: torch.masked_select(x, mask),
    "unique": lambda x, mask: torch.unique(x),
    "unique with counts": lambda x, mask: torch.unique(x, return_counts=True),
    "unique rows": lambda x, mask: torch.unique(x, dim=0),
    "unique_consecutive": lambda x, mask: torch.unique_consecutive(x),
    "bincount": lambda x, mask: torch.bincount(x),
    "nonzero": lambda x, mask: ATEN.nonzero(x),
    "nonzero as a tuple": lambda x, mask: ATEN.nonzero_numpy(x),
    "where": lambda x, mask: torch.where(mask),
    "argwhere": lambda x, mask: torch.argwhere(mask),
}
"""Calls that copy words of a device, or read them, on words and a mask that are there.

Indices stand as the operators that they become: torch would look for a driver.
"""

OPEN: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "index": lambda x, mask: ATEN.index(x, [x]),
    "index_put": lambda x, mask: ATEN.index_put_(x, [x], x + 1),
    "repeat_interleave by a number": lambda x, mask: x.repeat_interleave(3),
    "repeat_interleave of a known size": lambda x, mask: torch.repeat_interleave(x, output_size=9),
    "where": lambda x, mask: torch.where(mask, x, 0),
    "masked_fill": lambda x, mask: x.masked_fill(mask, 0),
    "to a type": lambda x, mask: x.to(torch.int32),
    "sums": lambda x, mask: (x + x).sum(),
}
"""The like, which leaves words where they are."""


def _on_a_device_that_is_not_here(
    work: Callable[[torch.Tensor, torch.Tensor], object], inference: bool
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Steps run in inference mode, where the guard is handed whole operators like `item`.
    with FakeTensorMode(), torch.inference_mode(inference), torch.no_grad():
        x = torch.empty(6, dtype=torch.int64, device="cuda:0")
        mask = torch.empty(6, dtype=torch.bool, device="cuda:0")
        with Guard():
            work(x, mask)


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
@pytest.mark.parametrize("name", HIDDEN)
def test_the_guard_refuses(name: str, inference: bool) -> None:
    with pytest.raises(HiddenTransferError, match=r"(copies|reads) .*cuda"):
        _on_a_device_that_is_not_here(HIDDEN[name], inference)


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
@pytest.mark.parametrize("name", OPEN)
def test_the_guard_lets_pass(name: str, inference: bool) -> None:
    _on_a_device_that_is_not_here(OPEN[name], inference)


def test_the_guard_sees_tensors_that_are_made_on_a_device() -> None:
    """torch moves their numbers before any mode sees the tensor."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        made = torch.empty(6, device="cuda:0")
    with pytest.raises(HiddenTransferError, match="copies numbers of the program to cuda"):
        transfers._check_copies(torch.ops.aten.lift_fresh.default, (made,), made)


def test_words_of_the_cpu_may_be_read() -> None:
    x, mask = torch.arange(6), torch.arange(6) > 2
    with Guard():
        for work in HIDDEN.values():
            work(x.clone(), mask)


def test_a_guarded_session_gives_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """In inference mode, in which steps run, the guard takes operators apart."""
    seeds = bytes(range(32)), bytes(range(32, 64))
    programs = {role: decoder.program(role) for role in ROLES}
    found = []
    for watched in (executor.watched, lambda device: Guard()):
        monkeypatch.setattr(executor, "watched", watched)
        with InProcessSession(programs, seeds=seeds) as session:
            found.append(torch.cat([session.step([5, 1, 7], 0), session.step([2], 3)]))
    assert torch.equal(*found)


def test_parties_on_the_cpu_run_without_a_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(transfers.GUARD, "1")
    assert not isinstance(transfers.watched(CPU), Guard)
    assert isinstance(transfers.watched(torch.device("cuda")), Guard)
    monkeypatch.delenv(transfers.GUARD)
    assert not isinstance(transfers.watched(torch.device("cuda")), Guard)
