"""JSON values: a type check that separates bool from int, and the canonical bytes to hash."""

from __future__ import annotations

import json
from typing import Any, TypeGuard


def is_a(value: object, kind: type) -> TypeGuard[Any]:
    """isinstance, except that a bool is not an int."""
    return isinstance(value, kind) and (kind is not int or not isinstance(value, bool))


def canonical(value: object) -> bytes:
    """A JSON value with sorted keys and no spaces, as ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")
