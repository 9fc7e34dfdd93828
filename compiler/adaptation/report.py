"""The report of an adaptation: a table, curves, and what the program costs."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergec.compiler.adaptation.config import AdaptConfig
from mergec.compiler.adaptation.metrics import (
    NEEDS,
    agreement,
    distinct,
    missing,
    text_scores,
    wordnet,
)
from mergec.compiler.adaptation.student import Student
from mergec.runtime.core.spec import MAX_HEADS

COLUMNS = (
    "perplexity", "agreement", "BLEU", "ROUGE-L", "chrF++", "METEOR", "distinct-1", "distinct-2",
    *(f"head {number} right" for number in range(1, MAX_HEADS + 1)), "tokens a step",
)  # fmt: skip
"""The measures of a table, in its order; those that were not taken are left out."""

_MEANING = (
    "Perplexity is that of the given texts, each token after the given ones before it. Agreement "
    "is the share of tokens that equal those of the model's greedy answers to the same prompts; "
    "all other measures are of these answers, beside the given ones of the same length."
)

_OF_HEADS = (
    "A head's guess is right if it is the token that the model chooses at that place of the "
    "validation texts. Tokens a step are those of greedy answers to their prompts, with all heads' "
    "guesses checked in each step after the prompt's."
)


@dataclass
class Report:
    """What an adaptation achieved.

    folder: of the adapted model. rows: a name and the measures of `COLUMNS` for the model, and for
    the student before and after. history: what was logged at each step. texts, held: how many were
    trained on and validated with. cost, deviation: of the compiled program, as in its manifest.
    same: how many of the compiled program's answers, in the clear, are the student's; None if they
    were not compared.
    """

    folder: Path
    config: AdaptConfig
    rows: list[dict[str, Any]]
    history: list[dict[str, float]]
    texts: int
    held: int
    cost: dict[str, Any] = field(default_factory=dict)
    deviation: dict[str, Any] = field(default_factory=dict)
    same: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "settings": self.config.settings(),
            "texts": {"trained": self.texts, "validated": self.held},
            "rows": self.rows,
            "cost": self.cost,
            "deviation": self.deviation,
            "same answers": self.same,
            "history": self.history,
        }

    def to_markdown(self) -> str:
        """The report as a page."""
        config = self.config
        passes = ", ".join((config.preset, *config.enable))
        trained = (
            f"Trained on {self.texts:,} texts for {config.steps:,} steps of "
            f"{config.batch * config.accumulate} texts; measured on {self.held:,} others, of which "
            f"{min(config.samples, self.held)} prompts were answered."
        )
        head = f"# {self.folder.name}: adapted for {passes}"
        if config.medusa:
            head = f"# {self.folder.name}: {config.medusa} heads that guess"
        meaning = _OF_HEADS if config.medusa else _MEANING
        lines = [head, "", trained, "", *table(self.rows), "", meaning]
        absent = [name for package in missing() for name in NEEDS[package]]
        if absent and not config.medusa:
            lines += ["", f"Not measured: {', '.join(absent)}; install mergec[adapt]."]
        if not config.medusa and wordnet() is None:
            how = "install nltk, then run `python -m nltk.downloader wordnet`"
            lines += ["", f"Not measured: METEOR, which needs WordNet; {how}."]
        if self.cost:
            lines += ["", "| Step | New | Past | Rounds | Bytes online |", "| --- " * 5 + "|"]
            lines += [
                f"| {name} | {step['new']:,} | {step['past']:,} | {step['rounds']:,} "
                f"| {step['online']:,} |"
                for name, step in self.cost.items()
            ]
        if self.same is not None:
            compared = min(self.config.samples, self.held)
            lines += ["", f"Compiled, {self.same} of {compared} answers are those measured above."]
        if self.deviation:
            found = self.deviation
            said = (
                f"Compiled, the next token is the model's at {found['agreed']} of "
                f"{found['places']} places of texts that it continues by itself."
            )
            lines += ["", said]
        settings = {name: value for name, value in config.settings().items() if value is not None}
        lines += ["", "Settings: " + ", ".join(f"{n}={v!r}" for n, v in settings.items()) + "."]
        return "\n".join(lines) + "\n"


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows of measures as the lines of a Markdown table."""
    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    return [
        "| | " + " | ".join(columns) + " |",
        "| --- " * (len(columns) + 1) + "|",
        *(
            f"| {row['name']} | " + " | ".join(_number(row.get(name)) for name in columns) + " |"
            for row in rows
        ),
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}"


def text_row(name: str, measures: Any, student: Student, tokenizer: Any) -> dict[str, Any]:
    """All measures of a student, and its answers; measures of text only if there is a tokenizer.

    measures: a `Measures`.
    """
    answers = measures.answers(student)
    row = {
        "name": name,
        "perplexity": _perplexity(measures.cross_entropy(student)),
        "agreement": agreement(answers, measures.wanted),
        "distinct-1": distinct(answers, 1),
        "distinct-2": distinct(answers, 2),
        "answers": answers,
    }
    if tokenizer is not None:
        texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
        references = [
            tokenizer.decode(text.answer[: measures.count], skip_special_tokens=True)
            for text in measures.texts[: len(answers)]
        ]
        row |= text_scores(texts, [[reference] for reference in references])
        row["example"] = texts[0]
    return row


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def write_report(report: Report) -> None:
    """Write report.md and report.json, and curves.png if matplotlib is installed."""
    folder = report.folder
    (folder / "report.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    (folder / "report.md").write_text(report.to_markdown(), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is not None:
        config = report.config
        keys: Sequence[str] = CURVES
        if config.medusa:
            keys = ("eval_loss", *(f"eval_head {n} right" for n in range(1, config.medusa + 1)))
        draw_curves(folder / "curves.png", {config.preset: report.history}, keys)


CURVES = ("eval_loss", "eval_agreement")
"""What curves show of a run, beside the steps."""


def draw_curves(
    file: Path, runs: dict[str, list[dict[str, float]]], keys: Sequence[str] = CURVES
) -> None:
    """Measures over steps, a plot for each and a line for each run, as an image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(keys), 3.5), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys)), keys, strict=True):
        for name, history in runs.items():
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=name)
        axes.set_xlabel("step")
        axes.set_title(key.replace("eval_", "validation "))
        axes.legend()
    figure.savefig(file, dpi=100)
