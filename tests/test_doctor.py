"""What `mergec doctor` finds on this machine, in good bundles and in bad ones."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from mergec.runtime.cli import run
from mergec.runtime.cli.doctor import BAD, GOOD, POOR, Finding, examine
from mergec.runtime.kernels.compiled import can_keep, compiled
from mergec.runtime.program.generation_settings import GenerationSettings
from mergec.runtime.transport.authority import make_certificates
from tests import decoder


def test_this_machine_and_a_good_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundles = decoder.save(tmp_path / "bundles")
    make_certificates(tmp_path / "certs")
    found = {f.what: f for f in examine(bundles / "client", tmp_path / "certs", ("127.0.0.1:0",))}
    for what in ("Python", "torch", "packages", "TLS 1.3", "cores", "memory", "bundle"):
        assert found[what].state == GOOD, found[what]
    assert "GB/s" in found["AES"].said
    assert found["port 127.0.0.1:0"].state == GOOD
    assert found["certificates"].said == "of the client"
    assert found["tokenizer"].state == POOR
    assert run(["doctor", str(bundles / "client")]) == 0
    assert "handmade for the client" in capsys.readouterr().out


def test_settings_that_need_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = GenerationSettings(do_sample=True, repetition_penalty=1.1)
    bundles = decoder.save(tmp_path / "bundles", generation=settings)

    def found() -> Finding:
        every = {finding.what: finding for finding in examine(bundles / "client")}
        return every["generation settings"]

    assert (found().state, found().said) == (GOOD, "do_sample, repetition_penalty")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert found().state == BAD
    assert "repetition_penalty" in found().said


def test_what_will_not_do_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundles = decoder.save(tmp_path / "bundles")
    make_certificates(tmp_path / "certs")
    (bundles / "server" / "tensors.safetensors").write_bytes(b"cut")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = f"127.0.0.1:{taken.getsockname()[1]}"
        options = ["--listen", port, "--certs", str(tmp_path / "certs" / "dealer")]
        assert run(["doctor", str(bundles / "server"), *options]) == 1
    printed = capsys.readouterr()
    assert f"{BAD}   port {port}: cannot listen" in printed.out
    assert "it was cut or changed" in printed.out
    assert "is for the role dealer, but this party is the server" in printed.out
    assert printed.err == "error: 3 of these checks failed\n"


def test_kernels_are_compiled_anew_where_they_cannot_be_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(**options: object):
        def wrap(function):
            if options.get("cache"):
                raise RuntimeError("cannot cache function: no locator available")
            return function

        return wrap

    monkeypatch.setattr("mergec.runtime.kernels.compiled.numba.njit", refuse)
    can_keep.cache_clear()
    try:
        assert compiled(parallel=True)(lambda: 5)() == 5
        found = {finding.what: finding for finding in examine()}
        assert (found["kernels"].state, "NUMBA_CACHE_DIR" in found["kernels"].said) == (POOR, True)
    finally:
        can_keep.cache_clear()


def test_a_machine_with_too_little_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundles = decoder.save(tmp_path / "bundles")
    monkeypatch.setattr("mergec.runtime.cli.doctor._available", lambda: 1000)
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.9.1")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    found = {f.what: f for f in examine(bundles / "dealer")}
    assert found["torch"].said == "2.9.1; install one of 2.11 to 2.13"
    assert found["packages"].said.startswith("missing: numpy, numba")
    assert found["memory for it"].state == BAD
    assert found["crypten"].state == POOR
