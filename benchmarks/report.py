"""The benchmark's rows as Markdown and as plots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import elementwise
import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

FIGURES = ("seconds", "online_bytes", "offline_bytes", "rounds")


@dataclass(frozen=True)
class Row:
    """One step of one model in one setting. Bytes are summed over both directions.

    seconds: while the dealer works on the same cores. online_seconds: with the dealer's randomness
    available in advance. offline_seconds: the dealer's processor time. failed: why there are no
    figures, if there are none. Figures are extrapolated only where `extrapolated_from_layers` is
    set; memory and errors never are.
    """

    model: str
    phase: str
    new_tokens: int
    past: int
    preset: str
    weights: str
    reveal: str
    network: str
    seconds: float = 0.0
    online_seconds: float | None = None
    offline_seconds: float | None = None
    online_bytes: int = 0
    offline_bytes: int = 0
    rounds: int = 0
    peak_memory_bytes: int | None = None
    worst_logit_error: float | None = None
    extrapolated_from_layers: int | None = None
    failed: str = ""

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        """What identifies a row of a run."""
        return (self.model, self.preset, self.weights, self.new_tokens, self.past)

    def json(self) -> dict[str, Any]:
        """The row as stored; a failed row has no figures."""
        blank = dict.fromkeys(FIGURES) if self.failed else {}
        return asdict(self) | blank

    @property
    def shape(self) -> tuple[int, int]:
        """New and past tokens."""
        return (self.new_tokens, self.past)


HEAD = """# Benchmark

Three processes on one machine that share {cores} cores ({processor}), all in one run. Bytes and
rounds are counted at the transport, both directions together. `crypten` is CrypTen's stock
protocols with one-hot embedding, secret-shared weights and a third party that deals, over the same
connections as all other rows. `crypten-gloo` is CrypTen as installed: over torch.distributed and
without a third party, which offers no security at all; its bytes and rounds are not counted. Both
ran with two and with eight layers. The remaining layers are extrapolated from the difference that a
layer makes, for all figures but memory. All other rows are mergec's protocols. A decode step's
seconds are the median of several runs; on a host that does other work, too, rows that should be
alike differ by up to a half. Errors contain the noise that the server adds to logits, and are
measured against the unchanged model in plaintext; a lossy preset that was not retrained is far from
it. `seconds` includes the dealer, which works on the same cores while the step runs. `dealt before`
is the time of a step whose randomness is available when it begins, `dealer s` the dealer's
processor time. CrypTen's third party is queried during the step, so its rows have neither. A preset
that resends hidden states (`merge-er`, `merge`) runs the head once at the end of an answer; here
each step includes it. Memory is the larger of the client's and the server's peak up to the end of
the step. The × columns say how many times less than `crypten` and than `merge` a row takes, while
the dealer works.
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

COLUMNS = (
    "seconds",
    "dealt before",
    "dealer s",
    "online MB",
    "offline MB",
    "rounds",
    "peak GB",
    "worst error",
)
BASES = ("crypten", "merge")
"""Rows that the others are compared with."""


SIDE_BY_SIDE = """# Stock protocols and ours, side by side

Two-layer decoders of width 256 and 1,024 tokens with random weights, the same model in both
settings, in three processes on loopback. `crypten` runs every op with CrypTen's stock protocol,
secret-shared weights and its trusted third party; `exact` is the default. Rounds and bytes are
counted at the transport, both directions together. The × columns say how many times less than
`crypten` in the same run a row takes. An error of `exact` is nearly all noise, which the server
adds to logits (2^-8 standard deviation). Without it (`--logit-noise 0`) it was 0.0003 for the
Llama. Made by `python benchmarks/bench.py --small`.
"""


def markdown(
    rows: Sequence[Row], small: Sequence[elementwise.Row], machine: Mapping[str, Any]
) -> str:
    """All tables: one per model and step, then the nonlinearities."""
    parts = [HEAD.format_map(machine), *_tables(rows)]
    if small:
        parts.append(f"## Nonlinearities, 65,536 elements\n\n{elementwise.table(list(small))}")
    return "\n".join([*parts, PUBLISHED])


def side_by_side(rows: Sequence[Row]) -> str:
    """The tables of the small decoders."""
    return "\n".join([SIDE_BY_SIDE, *_tables(rows)])


def _tables(rows: Sequence[Row]) -> list[str]:
    groups: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.new_tokens, row.past), []).append(row)
    parts = []
    for (model, new, past), group in groups.items():
        step = f"decode after {past}" if past else f"prompt of {new}"
        parts.append(f"## {model}, {step}\n\n{_table(group)}")
    return parts


def _table(rows: Sequence[Row]) -> str:
    found = [row for row in rows if not row.failed]
    bases = {name: next((r for r in found if r.preset == name), None) for name in BASES}
    bases = {name: base for name, base in bases.items() if base is not None}
    titles = [*COLUMNS, *(f"{what} × {name}" for name in bases for what in ("time", "bytes"))]
    lines = [
        f"| preset | weights | {' | '.join(titles)} |",
        f"| --- | --- |{' ---: |' * len(titles)}",
    ]
    for row in rows:
        if row.failed:
            reason = row.failed.replace("|", "/")
            cells = [f"failed: {reason}"] + [""] * (len(titles) - 1)
        else:
            cells = _cells(row, bases.values())
        lines.append(f"| {row.preset} | {row.weights} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cells(row: Row, bases: Iterable[Row]) -> list[str]:
    peak, error = row.peak_memory_bytes, row.worst_logit_error
    cells = [
        f"{row.seconds:.2f}",
        "" if row.online_seconds is None else f"{row.online_seconds:.2f}",
        "" if row.offline_seconds is None else f"{row.offline_seconds:.2f}",
        f"{row.online_bytes / 1e6:,.2f}" if row.rounds else "",
        f"{row.offline_bytes / 1e6:,.1f}" if row.rounds else "",
        f"{row.rounds:,}" if row.rounds else "",
        "" if peak is None else f"{peak / 1e9:.1f}",
        "" if error is None else f"{error:.4f}",
    ]
    for base in bases:
        cells += [
            f"{base.seconds / row.seconds:,.1f}",
            f"{base.online_bytes / row.online_bytes:,.1f}" if row.rounds else "",
        ]
    return cells


def plots(rows: Sequence[Row], folder: Path) -> None:
    """One plot of seconds and one of bytes: a decode step after 128 tokens, by setting."""
    chosen = [row for row in rows if row.past == 128 and not row.failed]
    if not chosen:
        return
    for key, unit, scale in (("seconds", "seconds", 1.0), ("online_bytes", "online MB", 1e6)):
        models = list(dict.fromkeys(row.model for row in chosen))
        figure, axes = plt.subplots(1, len(models), figsize=(6 * len(models), 4), squeeze=False)
        for axis, model in zip(axes[0], models, strict=True):
            group = [row for row in chosen if row.model == model and getattr(row, key)][::-1]
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


def marks(mark: str) -> tuple[str, str]:
    """The lines before and behind a section that is measured on its own."""
    return f"<!-- {mark}: begin -->\n", f"<!-- {mark}: end -->\n"


def marked(mark: str, text: str) -> str:
    """A section between its marks."""
    begin, end = marks(mark)
    return f"{begin}{text}{end}"


def between(path: Path, mark: str) -> str:
    """The section of this mark in a file, as `marked`; "" if the file lacks it."""
    begin, end = marks(mark)
    _, found, rest = path.read_text().partition(begin)
    text, closed, _ = rest.partition(end)
    return marked(mark, text) if found and closed else ""


def replace_between(path: Path, mark: str, text: str) -> None:
    """Put a text between a file's lines `<!-- MARK: begin -->` and `<!-- MARK: end -->`.

    Raises ValueError if the file does not have both.
    """
    begin, end = marks(mark)
    before, found, rest = path.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{path}: lacks {begin.strip()} or {end.strip()}")
    path.write_text(f"{before}{begin}{text}\n{end}{after}")
