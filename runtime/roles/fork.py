"""Prepares a process to be forked for sessions."""

from __future__ import annotations

import gc

import numba
import torch

from mergec.runtime.core.memory import keep_freed_memory
from mergec.runtime.core.meta import compute_shapes_alone
from mergec.runtime.core.op import REGISTRY
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.kernels.matmul import matmul, matmul_columns, matmul_rows, set_threads
from mergec.runtime.ops import load_all


def prepare_to_fork() -> None:
    """Load and compile what sessions compute with, so that their processes inherit it.

    A fork loses OpenMP's threads but keeps its state. So torch has one thread until the fork, and
    numba uses a pool of its own, which each process starts anew. What is loaded stays, so garbage
    collection passes it over from now on: it writes to each object that it looks at, and every
    process would get a copy of them all.
    """
    torch.set_num_threads(1)
    numba.config.THREADING_LAYER = "workqueue"
    keep_freed_memory()
    compute_shapes_alone()
    load_all()
    simulation = Simulation()
    for op in ("softmax", "silu"):
        x = simulation.share(torch.zeros(2, 2))
        simulation.run(lambda ctx, party: REGISTRY[op].protocol(ctx, x[party]))  # noqa: B023
    words = torch.zeros(2, 2, dtype=torch.int64)
    matmul(words, words)
    for weight in (words, words.to(torch.int32)):
        matmul_rows(words, weight)
        matmul_columns(words, weight)
    gc.freeze()


def use_threads(count: int) -> None:
    """Let this process, of a session, compute with `count` threads."""
    torch.set_num_threads(count)
    set_threads(count)
