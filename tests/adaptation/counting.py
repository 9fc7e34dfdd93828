"""A short training, on texts that count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHORT: dict[str, Any] = {
    "steps": 4,
    "batch": 4,
    "length": 12,
    "samples": 2,
    "evaluate_every": 2,
    "save_every": 2,
    "log_every": 1,
    "device": "cpu",
}
"""Options of a training of a few seconds."""


def write_counting(folder: Path) -> Path:
    """A file of texts in which token numbers follow each other."""
    file = folder / "counting.jsonl"
    lines = [
        {"prompt": [start, start + 1], "answer": [start + i for i in range(2, 8)]}
        for start in range(40)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file
