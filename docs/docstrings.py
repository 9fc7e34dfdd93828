"""Show the fields of a docstring as a list.

Docstrings here describe parameters and attributes as paragraphs that begin with `name: `, one after
the other. Markdown would run them together.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_FIELD = re.compile(r'^( *)((?:"?[\w.-]+"?)(?:, "?[\w.-]+"?)*(?:, or "?[\w.-]+"?)?): (?=\S)')
_DEEPER = " " * 12
"""How far the text of a nested field is indented where it goes on."""


class Fields(griffe.Extension):
    """Turns `name: meaning` at the start of a paragraph, and what follows it, into list items."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of every object that has one."""
        if obj.docstring is not None:
            obj.docstring.value = as_list(obj.docstring.value)


def as_list(text: str) -> str:
    """The docstring with its fields as Markdown list items, and their values below them."""
    lines: list[str] = []
    inside = code = nested = False
    for line in text.splitlines():
        code = line.lstrip().startswith(">>>") or (code and bool(line.strip()))
        found = None if code else _FIELD.match(line)
        begins = inside or not lines or not lines[-1].strip()
        if found and begins and (inside or not found[1]):
            if found[1] and not nested:
                lines.append("")
            inside, nested = True, bool(found[1])
            lines.append(f"{'    ' * nested}- **`{found[2]}`**: {line[found.end() :]}")
        elif nested and line.startswith(_DEEPER):
            lines.append(" " * 8 + line.strip())
        else:
            if nested and line.strip():
                lines.append("")
            inside, nested = inside and bool(line.strip()), False
            lines.append(line)
    return "\n".join(lines)
