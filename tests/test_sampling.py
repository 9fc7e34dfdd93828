"""Sampling: the distribution for each option, repeatability, and invalid options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mergec.runtime.core.errors import PromptError
from mergec.runtime.program.generation_settings import GenerationSettings
from mergec.runtime.program.manifest import Manifest
from mergec.runtime.session.sampling import Chooser, Sampling

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0, -5.0])


def chooser(sampling: Sampling, **settings: Any) -> Chooser:
    manifest = Manifest(generation=GenerationSettings(**settings))
    return Chooser(sampling, manifest, [0], 8)


def choose(logits: torch.Tensor, sampling: Sampling) -> int:
    return chooser(sampling)(logits)


def probabilities(logits: torch.Tensor, sampling: Sampling, **settings: Any) -> torch.Tensor:
    """The distribution that a token is drawn from."""
    return torch.softmax(chooser(sampling, **settings).scores(logits), -1)


def test_greedy_takes_the_largest_and_the_first_of_equals() -> None:
    assert choose(LOGITS, Sampling()) == 1
    assert choose(torch.tensor([[[2.0, 7.0, 7.0]]]), Sampling()) == 1


def test_temperature_divides_the_logits() -> None:
    found = probabilities(LOGITS, Sampling(temperature=2.0))
    assert torch.allclose(found, torch.softmax(LOGITS.double() / 2, -1))


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    found = probabilities(LOGITS * 1e4, Sampling(temperature=1e-300))
    assert found.tolist() == [0, 1, 0, 0, 0]


def test_top_k_keeps_k_tokens() -> None:
    found = probabilities(LOGITS, Sampling(temperature=1.0, top_k=2))
    assert (found > 0).tolist() == [False, True, True, False, False]
    assert math.isclose(float(found[1] / found[2]), math.e)
    everything = Sampling(temperature=1.0, top_k=99)
    assert bool((probabilities(LOGITS, everything) > 0).all())


def test_top_k_of_equal_logits_keeps_exactly_k() -> None:
    found = probabilities(torch.zeros(6), Sampling(temperature=1.0, top_k=2))
    assert int((found > 0).sum()) == 2


@pytest.mark.parametrize(("top_p", "kept"), [(1e-9, 1), (0.6, 1), (0.7, 2), (0.9, 3), (1.0, 5)])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: int) -> None:
    # softmax(LOGITS) sorted: 0.643, 0.237, 0.087, 0.032, 0.0002
    found = probabilities(LOGITS, Sampling(temperature=1.0, top_p=top_p))
    assert int((found > 0).sum()) == kept
    assert math.isclose(float(found.sum()), 1.0)


def test_a_seed_repeats_a_run() -> None:
    sampling = Sampling(temperature=1.5, seed=7)

    def run() -> list[int]:
        pick = chooser(sampling)
        return [pick(LOGITS) for _ in range(50)]

    assert run() == run()
    assert len(set(run())) > 1


def test_the_last_token_of_an_answer_is_known_to_be_the_last() -> None:
    """A checkpoint may force it; the prompt counts as part of the length."""
    manifest = Manifest(generation=GenerationSettings(forced_eos_token_id=4))
    pick = Chooser(Sampling(), manifest, [0, 2, 0], 4)
    assert [pick(LOGITS) for _ in range(4)] == [1, 1, 1, 4]


def test_every_seed_in_range_is_itself() -> None:
    for seed in (0, 1, 2**63 - 1):
        assert Sampling(seed=seed).generator().initial_seed() == seed


def test_without_a_seed_runs_differ() -> None:
    sampling = Sampling(temperature=1.0)
    assert sampling.generator().initial_seed() != sampling.generator().initial_seed()


def test_frequencies_follow_the_distribution() -> None:
    sampling = Sampling(temperature=1.0, top_k=3, seed=1)
    pick = chooser(sampling)
    draws = torch.tensor([pick(LOGITS) for _ in range(4000)])
    counts = torch.bincount(draws, minlength=5) / 4000
    # Five standard deviations of a proportion of 4000 draws are below 0.04.
    assert torch.allclose(counts.double(), probabilities(LOGITS, sampling), atol=0.04)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"temperature": math.nan}, "temperature must be 0 or more"),
        ({"temperature": math.inf}, "temperature must be 0 or more"),
        ({"top_k": -1}, "top-k must be 0"),
        ({"top_p": 0.0}, "top-p must be above 0"),
        ({"top_p": 1.1}, "top-p must be above 0"),
        ({"seed": -1}, "the seed must be"),
        ({"seed": 2**63}, "the seed must be"),
    ],
)
def test_options_are_checked(options: dict[str, float], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        Sampling(**options)  # type: ignore[arg-type]


def test_logits_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(PromptError, match="not finite"):
        choose(torch.tensor([0.0, math.nan]), Sampling())
