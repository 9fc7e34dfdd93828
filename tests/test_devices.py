"""Roles are told on which device to compute: whether it is there, and that they do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mergec.runtime.cli import run
from mergec.runtime.core.device import check_device
from mergec.runtime.core.errors import MergecError
from mergec.runtime.roles import dealer_session
from mergec.runtime.roles.client import Connection
from mergec.runtime.session.requests import Plan
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.connect import Security
from tests import decoder
from tests.services import deployment

MISSING = "there is no CUDA device here; use the device cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("serve", ("--dealer", "127.0.0.1:1")),
        ("deal", ()),
        ("generate", ("-p", "1 2", "--server", "127.0.0.1:1", "--dealer", "127.0.0.1:1")),
    ],
)
def test_a_device_that_is_missing_is_one_line_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, more: tuple[str, ...]
) -> None:
    role = {"serve": "server", "deal": "dealer", "generate": "client"}[command]
    bundle = str(decoder.save(tmp_path) / role)
    assert run([command, bundle, "--plaintext", "--device", "cuda", *more]) == 1
    assert capsys.readouterr().err.strip().endswith(MISSING)


def test_devices_are_looked_for_so_that_forks_can_use_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)
    check_device("cpu")
    assert "PYTORCH_NVML_BASED_CUDA_CHECK" not in os.environ
    seen = []
    monkeypatch.setattr(
        "torch.cuda.device_count", lambda: seen.append(dict(os.environ)) or 2 - len(seen)
    )
    check_device("cuda")
    assert seen[0]["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"
    with pytest.raises(MergecError, match=MISSING):
        check_device("cuda:0")


def pretend_cuda() -> None:
    """At the dealer: as if there were a GPU; every context is told of it, and uses the CPU."""
    torch.cuda.device_count = lambda: 1
    made = dealer_session.DealerContext

    def on_cpu(*given: Any, **more: Any) -> Any:
        *seeds_and_streams, device = given
        assert device == "cuda"
        return made(*seeds_and_streams, "cpu", **more)

    dealer_session.DealerContext = on_cpu  # type: ignore[assignment,misc]


def test_a_dealer_computes_where_it_is_told_also_ahead_of_time(tmp_path: Path) -> None:
    bundles, key = decoder.save(tmp_path / "bundles"), bytes(range(32))
    (tmp_path / "key").write_text(key.hex())
    stores = ("--stores", str(tmp_path / "stores"), "--store-key", str(tmp_path / "key"))
    prompt = [5, 1, 7]
    with deployment(
        bundles, serve=stores, deal=("--device", "cuda"), patch=pretend_cuda
    ) as running:
        with running.connection() as connection:
            answer = [token.token for token in connection.generate(prompt, max_tokens=4)]
        assert answer == decoder.plaintext(bundles, prompt, 4)
        place, _ = running.connection().prepare(Plan(3, 3, 4), tmp_path / "client", key)
        assert place.is_dir()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_connection_needs_its_device(tmp_path: Path) -> None:
    bundle = decoder.save(tmp_path) / "client"
    nowhere = Address("127.0.0.1", 1)
    security = Security("client", None, plaintext=True)
    with pytest.raises(MergecError, match=MISSING):
        Connection(bundle, server=nowhere, dealer=nowhere, security=security, device="cuda")
