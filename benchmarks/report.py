"""The benchmark's rows as Markdown and as plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import elementwise
import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

HEAD = """# Benchmark

Three processes on loopback that share this machine's cores, all in one run; bytes and rounds are
counted at the transport, both directions together. `crypten` is CrypTen's stock protocols with
one-hot embedding and secret-shared weights; it ran {layers} layers, and the rest is extrapolated
from the difference that a layer makes. All other rows are mergec's protocols. Errors are against
the unchanged model in plaintext: a lossy preset that was not retrained is far from it. Seconds
include the dealer, which works while the step runs. A preset that resends hidden states
(`merge-er`, `merge`) runs the head once at the end of an answer; here each step includes it. Memory
is the larger of client's and server's. The × columns say how many times less than `crypten` and
than `merge` a row takes.
Made by `make bench` (`make bench-quick` for the short form).
"""

PUBLISHED = """## MERGE's published figures

GPT-2-base, 128 tokens, two servers with a V100 each, from tables of the paper (Liang et al.,
"MERGE: Fast Private Text Generation", AAAI 2024); another machine and another task, so only their
ratios compare with the tables above.

| system | seconds | GB | time × | bytes × |
| --- | ---: | ---: | ---: | ---: |
| CrypTen | 1328 | 322.5 | 1.0 | 1.0 |
| MPCFormer, 2Quad | 972 | 316.7 | 1.4 | 1.0 |
| THE-X | 966 | 319.1 | 1.4 | 1.0 |
| MERGE, ER | 834 | 168.5 | 1.6 | 1.9 |
| MERGE, ER and MM | 171 | 121.8 | 7.8 | 2.6 |
"""

COLUMNS = ("seconds", "online MB", "offline MB", "rounds", "peak GB", "worst error")
RATIOS = ("time × crypten", "bytes × crypten", "time × merge", "bytes × merge")


def markdown(rows: Sequence[Any], small: Sequence[Any]) -> str:
    """All tables: one per model and step, then the nonlinearities."""
    layers = {row.extrapolated_from_layers for row in rows} - {None}
    parts = [HEAD.format(layers=" and ".join(map(str, sorted(layers))))]
    for key, group in _groups(rows).items():
        model, new, past = key
        step = f"decode after {past}" if past else f"prompt of {new}"
        parts.append(f"## {model}, {step}\n\n{_table(group)}")
    if small:
        parts.append(f"## Nonlinearities, 65,536 elements\n\n{elementwise.table(list(small))}")
    return "\n".join([*parts, PUBLISHED])


def _groups(rows: Sequence[Any]) -> dict[tuple[str, int, int], list[Any]]:
    groups: dict[tuple[str, int, int], list[Any]] = {}
    for row in rows:
        groups.setdefault((row.model, row.new_tokens, row.past), []).append(row)
    return groups


def _table(rows: Sequence[Any]) -> str:
    titles = [*COLUMNS, *RATIOS]
    lines = [
        f"| preset | weights | {' | '.join(titles)} |",
        f"| --- | --- |{' ---: |' * len(titles)}",
    ]
    bases = [next((r for r in rows if r.preset == name), None) for name in ("crypten", "merge")]
    for row in rows:
        error = "" if row.worst_logit_error is None else f"{row.worst_logit_error:.4f}"
        cells = [
            f"{row.seconds:.2f}",
            f"{row.online_bytes / 1e6:,.1f}",
            f"{row.offline_bytes / 1e6:,.1f}",
            f"{row.rounds:,}",
            f"{row.peak_memory_bytes / 1e9:.1f}",
            error,
        ]
        for base in bases:
            cells += ["", ""] if base is None else [
                f"{base.seconds / row.seconds:,.1f}",
                f"{base.online_bytes / row.online_bytes:,.1f}",
            ]  # fmt: skip
        lines.append(f"| {row.preset} | {row.weights} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plots(rows: Sequence[Any], folder: Path) -> None:
    """One picture for seconds and one for bytes: a decode step after 128 tokens, by setting."""
    chosen = [row for row in rows if row.phase == "decode" and row.past == 128]
    for key, unit, scale in (("seconds", "seconds", 1.0), ("online_bytes", "online MB", 1e6)):
        models = list(dict.fromkeys(row.model for row in chosen))
        figure, axes = plt.subplots(1, len(models), figsize=(6 * len(models), 4), squeeze=False)
        for axis, model in zip(axes[0], models, strict=True):
            group = [row for row in chosen if row.model == model][::-1]
            labels = [f"{row.preset} ({row.weights})" for row in group]
            bars = axis.barh(labels, [getattr(row, key) / scale for row in group], color="#3b6ea5")
            axis.bar_label(bars, fmt="%.3g", padding=3)
            axis.set_xscale("log")
            axis.margins(x=0.2)
            axis.set_xlabel(unit)
            axis.set_title(f"{model}, decode after 128")
            axis.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(folder / f"{key}.png", dpi=120)
        plt.close(figure)
