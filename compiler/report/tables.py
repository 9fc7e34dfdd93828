"""Tables of cells for a terminal, for Markdown and for notebooks."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

Cells = Sequence[Sequence[str]]
"""Rows of text; the first one is the header."""

_NOTEBOOK_WIDTH = 120
"""Characters of a line in a notebook."""

_FORMAT = '<pre style="font-family:monospace; line-height:1.3; overflow-x:auto">{code}</pre>'


def markdown(cells: Cells) -> str:
    """The cells as a Markdown table; columns of figures are aligned right."""
    head, *body = cells
    numeric = [bool(body) and all(_numeric(row[i]) for row in body) for i in range(len(head))]
    rules = ["---:" if right else "---" for right in numeric]
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(rules)}|"]
    # A bar would end the cell.
    rows = [[cell.replace("|", "\\|") for cell in row] for row in body]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def table(heading: str, cells: Cells) -> Table:
    """The cells as a table for a terminal; columns of figures are aligned right."""
    head, *body = cells
    made = Table(
        title=heading, title_justify="left", header_style="bold", box=SIMPLE,
        pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    for index, name in enumerate(head):
        # On a narrow terminal shapes and reasons are wrapped, names and figures never.
        yields = name in ("shape", "reason")
        width = None if yields else max(len(row[index]) for row in [head, *body])
        right = index > 0 and all(_numeric(row[index]) for row in body)
        made.add_column(
            name, min_width=width, justify="right" if right else "left", no_wrap=not yields
        )
    for row in body:
        last = row is body[-1] and row[0] == "total"
        made.add_row(*(Text(cell) for cell in row), style="bold" if last else "")
    return made


def _numeric(cell: str) -> bool:
    """Whether a cell holds a figure, and so is aligned right."""
    return (cell[:1].isdigit() and "x" not in cell) or cell in ("needed", "")


def html(shown: RenderableType) -> str:
    """What a terminal would show, as HTML without scripts or style sheets; all text is escaped."""
    console = Console(
        file=io.StringIO(), record=True, width=_NOTEBOOK_WIDTH, force_jupyter=False,
        color_system="truecolor", legacy_windows=False,
    )  # fmt: skip
    console.print(shown)
    return console.export_html(code_format=_FORMAT, inline_styles=True)
