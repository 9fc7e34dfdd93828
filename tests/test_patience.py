"""How long a peer may be at work on a step."""

from __future__ import annotations

from mergec.runtime.session.patience import SLOWEST, TIMEOUTS, WORDS, patience, setup_patience
from tests import decoder

WEIGHTS = sum(weight.numel() for weight in decoder.weights().values())
CACHED = 2 * decoder.WIDTH
"""Numbers that the caches of keys and values hold for a token."""


def test_a_step_may_take_longer_the_more_it_multiplies() -> None:
    program = decoder.program("dealer")
    base = TIMEOUTS * 60.0
    for new, past in ((1, 0), (500, 0), (1, 499), (40, 60)):
        work = new * WEIGHTS + new * (new + past) * CACHED
        assert patience(program, [(new, past)], 60.0) == base + work / SLOWEST
    both = patience(program, [(500, 0), (1, 500)], 60.0) - base
    each = (patience(program, [step], 60.0) - base for step in ((500, 0), (1, 500)))
    assert abs(both - sum(each)) < 1e-9
    assert setup_patience(program, 60.0) == base + WEIGHTS * WORDS / SLOWEST


def test_all_roles_allow_the_same() -> None:
    found = {patience(decoder.program(role), [(9, 3)], 1.0) for role in ("client", "server")}
    assert found == {patience(decoder.program("dealer"), [(9, 3)], 1.0)}


def test_a_finish_takes_the_tokens_before_it() -> None:
    program = decoder.program("client")
    assert patience(program, [(0, 7)], 0.0) == 7 * (WEIGHTS + 7 * CACHED) / SLOWEST
