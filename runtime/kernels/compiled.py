"""Kernels compiled by numba, and kept until the next start where there is a place for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba


@cache
def can_keep() -> bool:
    """Whether numba finds a place: beside the code, in the user's cache, or NUMBA_CACHE_DIR.

    A service may have neither a home nor an installation that it can write to.
    """
    try:
        numba.njit(cache=True)(lambda: None)
    except RuntimeError:
        return False
    return True


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba's `njit` without the interpreter's lock, and with a cache where there can be one."""
    return lambda function: numba.njit(cache=can_keep(), nogil=True, **options)(function)
