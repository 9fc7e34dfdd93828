"""Each nonlinearity on its own, on 65,536 elements: CrypTen's stock protocol against ours.

Usage: python benchmarks/elementwise.py; `make bench` runs it, too.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from harness import RunError, Step, run

from mergec.runtime.core.spec import FRACTIONAL_BITS, ROLES, Vis
from mergec.runtime.ops import load_all
from mergec.runtime.program.manifest import Manifest
from mergec.runtime.program.program import InputSpec, Instruction, Ref, RoleProgram

COUNT = 1 << 16
RESULTS = Path(__file__).parent / "results"

CASES: tuple[tuple[str, tuple[Any, ...], tuple[int, int], float, float], ...] = (
    ("relu", (), (1, COUNT), -20.0, 20.0),
    ("gelu", (), (1, COUNT), -8.0, 8.0),
    ("silu", (), (1, COUNT), -12.0, 12.0),
    ("tanh", (), (1, COUNT), -8.0, 8.0),
    ("sigmoid", (), (1, COUNT), -12.0, 12.0),
    ("exp", (), (1, COUNT), -12.0, 0.0),
    ("reciprocal", (), (1, COUNT), 0.5, 64.0),
    ("rsqrt", (), (1, COUNT), 0.5, 64.0),
    ("log", (), (1, COUNT), 0.5, 64.0),
    ("softmax", (), (512, 128), -8.0, 8.0),
    ("rms_norm", (None, 1e-5), (64, 1024), -4.0, 4.0),
    ("layer_norm", (None, None, 1e-5), (64, 1024), -4.0, 4.0),
)
"""Op, its further arguments, shape, and the interval that its inputs are spread over."""


BITS = 6
"""Results are multiplied with 2**6 before the client sees them, with 12 fractional bits: their own
errors show."""

MODES = ("crypten", "mergec")


@dataclass(frozen=True)
class Row:
    """One op in one mode. Errors are absolute, against float64.

    failed: why there are no figures, if there are none.
    """

    op: str
    mode: str
    elements: int
    seconds: float = 0.0
    online_bytes: int = 0
    offline_bytes: int = 0
    rounds: int = 0
    largest_error: float = 0.0
    mean_error: float = 0.0
    failed: str = ""


def program(role: str, op: str, arguments: tuple[Any, ...], shape: tuple[int, int]) -> RoleProgram:
    """A program that applies one op to a shared input and reveals the result to the client."""
    kind = load_all()[op]
    form = kind.forms(None, *arguments).get(next(iter(kind.operands), ""), "share")
    frac = kind.scale(FRACTIONAL_BITS, *arguments, fixed=FRACTIONAL_BITS)
    convert = {"masked": "open", "sent": "send"}.get(form)
    first = [Instruction("ready", f"mpc.{convert}", (Ref("x"),), {}, Vis.SHARED, 16)]
    x = Ref("ready" if convert else "x")
    return RoleProgram(
        role,
        [
            *(first if convert else []),
            Instruction("y", f"mpc.{op}", (x, *arguments), {}, Vis.SHARED, frac),
            Instruction("larger", "mpc.scale", (Ref("y"), 2.0**BITS), {}, Vis.SHARED, frac - BITS),
            Instruction("seen", "mpc.reveal", (Ref("larger"),), {}, Vis.CLIENT, 0),
        ],
        [InputSpec("x", Vis.SHARED, "float32", shape, FRACTIONAL_BITS)],
        ["seen"],
        [],
        {},
        Manifest(fractional_bits=FRACTIONAL_BITS),
    )


def measure(case: tuple[str, tuple[Any, ...], tuple[int, int], float, float]) -> list[Row]:
    """Measure both modes on the same inputs."""
    op, arguments, shape, low, high = case
    spread = torch.linspace(low, high, COUNT, dtype=torch.float64)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))
    x = torch.round(spread[order].reshape(shape) * 2**FRACTIONAL_BITS) / 2**FRACTIONAL_BITS
    expected = load_all()[op].reference(x, *arguments)
    programs = {role: program(role, op, arguments, shape) for role in ROLES}
    rows = []
    for mode in MODES:
        try:
            (taken,) = run(programs, [Step({"x": x}, repeats=3)], mode)
        except RunError as error:
            rows.append(Row(op, mode, COUNT, failed=str(error)))
            continue
        error = (taken.value.double() / 2.0**BITS - expected).abs()
        rows.append(
            Row(
                op,
                mode,
                COUNT,
                taken.seconds,
                taken.online,
                taken.offline,
                taken.rounds,
                float(error.max()),
                float(error.mean()),
            )
        )
    return rows


def table(rows: list[Row]) -> str:
    """The rows as Markdown; ratios are against CrypTen's stock protocol in the same run."""
    titles = "rounds", "online B", "offline B", "largest error", "mean error", "bytes ×", "time ×"
    lines = [f"| op | mode | {' | '.join(titles)} |", f"| --- | --- |{' ---: |' * len(titles)}"]
    stock = {row.op: row for row in rows if row.mode == "crypten" and not row.failed}
    for row in rows:
        if row.failed:
            lines.append(f"| {row.op} | {row.mode} | failed: {row.failed} |" + " |" * 6)
            continue
        base = stock.get(row.op)
        ratios = (
            f"{base.online_bytes / row.online_bytes:.1f} | {base.seconds / row.seconds:.1f}"
            if base is not None
            else " | "
        )
        lines.append(
            f"| {row.op} | {row.mode} | {row.rounds} | {row.online_bytes / row.elements:.1f} | "
            f"{row.offline_bytes / row.elements:.1f} | {row.largest_error:.1e} | "
            f"{row.mean_error:.1e} | {ratios} |"
        )
    return "\n".join(lines) + "\n"


def main(folder: Path = RESULTS, *, resume: bool = False) -> list[Row]:
    """All rows, written to `folder` as they are measured. resume: keep existing rows."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / "elementwise.json"
    rows: list[Row] = []
    if resume and place.exists():
        rows = [Row(**row) for row in json.loads(place.read_text()) if not row.get("failed")]
    for case in CASES:
        if sum(row.op == case[0] for row in rows) < len(MODES):
            rows = [row for row in rows if row.op != case[0]] + measure(case)
            place.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    (folder / "elementwise.md").write_text(table(rows))
    return rows


if __name__ == "__main__":
    print(table(main()))
