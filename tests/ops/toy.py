"""A package that offers ops: one file, and an entry point for each op in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

TRIPLE = '''
"""3 x, element by element."""

import torch

from mergec.runtime.core.cases import Case
from mergec.runtime.core.op import Kind, Op, Positions
from mergec.runtime.core.spec import Cost
from mergec.runtime.protocols.opening import open_masked, open_masked_cost
from mergec.runtime.core.values import Shared
from mergec.runtime.protocols.local import as_share


class Triple(Op):
    """3 x, element by element, by an opening that is not needed."""

    name = "triple"
    schema = "(Tensor x) -> Tensor"
    operands = {"x": "fixed"}
    positions = Positions.ALL
    kind = Kind.ACTIVATION
    domain = (-(2.0**20), 2.0**20)
    no_stock = "this op is a test of mergec"

    @staticmethod
    def reference(x):
        return 3 * x

    @staticmethod
    def cases():
        return [Case([torch.linspace(-4, 4, 24, dtype=torch.float64).reshape(2, 3, 4)], 1e-4)]

    @classmethod
    def cost(cls, x, *, fixed):
        return open_masked_cost(x.share.numel())

    @classmethod
    def protocol(cls, ctx, x):
        opened = yield from open_masked(ctx, x)
        return Shared(3 * as_share(ctx, opened, x.frac), x.frac)
'''


def install(folder: Path, source: str, *names: str) -> Path:
    """A package in `folder` with that source, which offers these names as ops."""
    (folder / "toys.py").write_text(source)
    info = folder / "toys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    points = "".join(f"op{i} = toys:{name}\n" for i, name in enumerate(names))
    (info / "entry_points.txt").write_text(f"[mergec.ops]\n{points}")
    return folder


def python(
    *arguments: str, package: Path | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """A fresh Python process, with such a package installed."""
    paths = [str(ROOT), *([str(package)] if package else [])]
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
