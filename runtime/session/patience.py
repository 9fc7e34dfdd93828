"""How long a peer may be at work on a step before it counts as stuck, whatever it says."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from mergec.runtime.core.spec import Vis
from mergec.runtime.program.program import RoleProgram

TIMEOUTS = 5
"""A step may take this many times the timeout for silence, however small it is."""

SLOWEST = 1e7
"""Multiplications of a step per second that the slowest machine is expected to do, each with its
share of everything else."""

WORDS = 8
"""Multiplications that preparing a weight counts for: its mask is drawn, applied and sent."""


def patience(program: RoleProgram, steps: Iterable[tuple[int, int]], timeout: float) -> float:
    """Seconds that heartbeats may extend waits within these steps, of new and past tokens.

    It follows from lengths and from the shapes in the program, which all roles have: every weight
    takes part in one multiplication per new token, and every cached number in one per new token. A
    step of no new tokens, the finish, takes the head's part of the weights for `past` tokens.
    """
    weights, cached = _sizes(program)
    work = sum((new or past) * (weights + (new + past) * cached) for new, past in steps)
    return TIMEOUTS * timeout + work / SLOWEST


def setup_patience(program: RoleProgram, timeout: float) -> float:
    """The same for the work before the first step: masking, sending and keeping the weights."""
    return TIMEOUTS * timeout + _sizes(program)[0] * WORDS / SLOWEST


def _sizes(program: RoleProgram) -> tuple[int, int]:
    """Numbers in the weights, and those that caches hold for each token."""
    weights = sum(prod(spec.shape) for spec in program.constants if spec.vis is not Vis.PUBLIC)
    caches = (spec.shape for spec in program.inputs if spec.cache_output is not None)
    return weights, sum(prod(s for s in shape if isinstance(s, int)) for shape in caches)
