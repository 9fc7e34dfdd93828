"""The attack on roundings: it finds the weights where nothing hides them, and no more than chance
where nothing is to be found. What it finds in each setting is measured by `make rounding-attack`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mergec.compiler.config import DEFAULT_NOISE
from mergec.runtime.ops.reveal import REVEALED_FRAC
from tests.roles import ROOT

ENOUGH = 250
"""Queries of the tests' decoder."""


@pytest.fixture(scope="module")
def attack() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import rounding_attack

        yield rounding_attack


@pytest.fixture(scope="module")
def roundings(attack: Any) -> Any:
    import roundings

    return roundings


def _made(roundings: Any, seed: int, steps: bool) -> tuple[Any, np.ndarray]:
    """Logits that move by 2**-16 times a matrix as coins of 13 low bits fall, and that matrix.

    steps: the values that are rounded are the same in each query.
    """
    generator = np.random.default_rng(seed)
    count, size, vocabulary, shift = 2000, 4, 9, 13
    words = generator.integers(0, 2**64, (count, size + 3), dtype=np.uint64)
    matrix = generator.normal(size=(vocabulary, size))
    low = (words[:, :size] & np.uint64(2**shift - 1)).astype(float) / 2**shift
    fraction = generator.random(size) if steps else generator.random((count, size))
    fallen = (fraction > low) - fraction
    logits = np.round(2.0**32 * (1.5 + fallen @ matrix.T * 2.0**-16)).astype(np.int64)
    groups = (
        roundings.Group("noise", roundings.OPENED, 64, 0, size, size + 3),
        roundings.Group("coins", roundings.OPENED, 64, 0, 0, size),
    )
    return roundings.Recording(groups, words, logits, 32), matrix


@pytest.mark.parametrize("steps", [False, True])
def test_the_coins_are_found_and_what_they_do(roundings: Any, steps: bool) -> None:
    recording, matrix = _made(roundings, 1, steps)
    evidence = roundings.Evidence(recording, recording.logits * 2.0**-32)
    best, other = evidence.find()
    assert (best.group.instruction, best.shift) == ("coins", 13)
    assert best.score > 50
    assert abs(other.score) < 6.5
    estimate = evidence.estimate(best, [other])
    assert roundings.correlation(estimate, matrix) > 0.97
    # A step tells the size as well: one unit of the rounded wire, less what its place is off.
    if steps:
        assert 0.85 < 2.0**16 * (estimate * matrix).sum() / (matrix**2).sum() < 1.05
    order = np.random.default_rng(0).permutation(len(recording.logits))
    mixed = roundings.Evidence(recording.shuffled(order), recording.logits * 2.0**-32)
    assert abs(roundings.correlation(mixed.estimate(best, [other]), matrix)) < 0.6


def test_bits_that_never_change_are_no_coins(roundings: Any) -> None:
    """Exact rounding sends words whose low bits are zero."""
    recording, _ = _made(roundings, 1, False)
    size = recording.groups[1].size
    still = np.full_like(recording.words[:, :size], 7)
    groups = (roundings.Group("still", roundings.RECEIVED, 64, 0, 0, size),)
    (found,) = roundings.Evidence(
        replace(recording, words=still, groups=groups), recording.logits * 2.0**-32
    ).find()
    assert found.excess < 0


def test_a_projection_removes_noise_outside_of_the_logits_space(roundings: Any) -> None:
    recording, matrix = _made(roundings, 2, False)
    noise = np.random.default_rng(3).normal(size=recording.logits.shape) * 2.0**-14
    logits = recording.logits * 2.0**-32 + noise
    plain = roundings.Evidence(recording, logits)
    projected = roundings.Evidence(recording, logits, matrix)
    target = plain.find()[0]
    found = [roundings.correlation(e.estimate(target), matrix) for e in (plain, projected)]
    assert found[1] > found[0]


def test_a_recording_is_read_as_it_was_written(roundings: Any, tmp_path: Any) -> None:
    recording, _ = _made(roundings, 1, False)
    recording.save(tmp_path / "r.npz")
    read = roundings.Recording.load(tmp_path / "r.npz")
    assert (read.groups, read.frac) == (recording.groups, recording.frac)
    assert np.array_equal(read.words, recording.words)
    assert np.array_equal(read.logits, recording.logits)


def test_a_client_finds_weights_without_noise_and_nothing_with_the_default(attack: Any) -> None:
    """A session of the real protocols. By noise, this few queries tell nothing."""
    whole = attack.small_decoder({})
    # Of its secrets the one that more than a few hundred queries are not needed for.
    victim = replace(whole, secrets=whole.secrets[1:])
    recording = attack.record(victim.programs, attack.PROMPT, ENOUGH)
    settings = [
        attack.Setting(16, 0.0),
        attack.Setting(REVEALED_FRAC, 0.0),
        attack.Setting(REVEALED_FRAC, DEFAULT_NOISE),
    ]
    rows = [attack.attack(victim, recording, setting, [ENOUGH], 5) for setting in settings]
    # Of about 100 entries, in few columns, chance correlations vary by 0.1 to 0.2 around zero.
    for (bare,) in rows[:2]:
        assert bare.found[ENOUGH] > 0.5, bare
        assert bare.control < 0.6, bare
    (hidden,) = rows[2]
    assert abs(hidden.found[ENOUGH]) < 0.5, hidden
    assert "| 16 bits, no noise |" in "\n".join(attack.table(rows[0][:1]))
