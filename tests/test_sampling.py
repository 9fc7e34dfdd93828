"""Sampling: the distribution for each option, repeatability, and invalid options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mergec.runtime.core.draw import Draw
from mergec.runtime.core.errors import PromptError
from mergec.runtime.program.generation_settings import GenerationSettings
from mergec.runtime.program.manifest import Manifest
from mergec.runtime.session.sampling import Chooser, Sampling, draw_for

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
        ({"top_k": 2**63}, "top-k must be 0"),
        ({"top_p": 0.0}, "top-p must be above 0"),
        ({"top_p": 1.1}, "top-p must be above 0"),
        ({"seed": -1}, "the seed must be"),
        ({"seed": 2**63}, "the seed must be"),
        ({"min_p": -0.1}, "min-p must be 0 to 1"),
        ({"min_p": 1.1}, "min-p must be 0 to 1"),
        ({"repetition_penalty": 0.0}, "the repetition penalty must be above 0"),
        ({"repetition_penalty": -1.0}, "the repetition penalty must be above 0"),
        ({"repetition_penalty": math.inf}, "the repetition penalty must be above 0"),
    ],
)
def test_options_are_checked(options: dict[str, float], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        Sampling(**options)  # type: ignore[arg-type]


def test_options_at_the_ends_of_their_range_are_allowed() -> None:
    least, most = math.ulp(0.0), 2**63 - 1
    for options in (
        {"temperature": 0.0, "top_k": 0, "top_p": least, "seed": 0, "min_p": 0.0},
        {"top_k": most, "top_p": 1.0, "seed": most, "min_p": 1.0, "repetition_penalty": least},
    ):
        Sampling(**options)  # type: ignore[arg-type]


EVERYTHING = GenerationSettings(
    do_sample=True, temperature=0.6, top_h=0.5, top_k=20, top_p=0.9, min_p=0.1, typical_p=0.5,
    epsilon_cutoff=0.1, eta_cutoff=0.1, repetition_penalty=1.2, min_length=3,
)  # fmt: skip


def test_a_request_takes_back_what_the_checkpoint_says() -> None:
    neutral = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    found = neutral.over(EVERYTHING).to_dict()
    assert found == {
        "temperature": 1.0, "top_h": 0.5, "typical_p": 0.5, "epsilon_cutoff": 0.1,
        "eta_cutoff": 0.1, "min_length": 3,
    }  # fmt: skip
    own = {"temperature": 2.0, "top_k": 7, "top_p": 0.7, "min_p": 0.2, "repetition_penalty": 1.1}
    assert Sampling(**own).over(GenerationSettings()).to_dict() == own  # type: ignore[arg-type]


def test_a_greedy_choice_keeps_what_changes_the_best_token() -> None:
    found = Sampling(temperature=0.0).over(EVERYTHING).to_dict()
    assert found == {"temperature": 0.0, "repetition_penalty": 1.2, "min_length": 3}


def test_what_the_parties_draw() -> None:
    """In units of 2**-16; a top-k of one is greedy, and one that keeps all tokens is none."""
    manifest = Manifest(reveal="token", vocab_size=3)
    for asked, drawn in (
        (Sampling(), Draw()),
        (Sampling(temperature=1.5), Draw(3 << 15)),
        (Sampling(temperature=1.0, top_k=1), Draw()),
        (Sampling(temperature=1.0, top_k=2), Draw(1 << 16, 2)),
        (Sampling(temperature=1.0, top_k=3), Draw(1 << 16)),
    ):
        assert draw_for(asked, manifest) == drawn
    with pytest.raises(PromptError, match="top-p needs the logits"):
        draw_for(Sampling(temperature=1.0, top_p=0.5), manifest)
    with pytest.raises(PromptError, match="noise that nobody may know"):
        draw_for(Sampling(temperature=1.0, seed=0), manifest)
    assert draw_for(Sampling(temperature=1.0, seed=0), Manifest()) == Draw()


def test_stock_protocols_choose_greedily() -> None:
    manifest = Manifest(reveal="token", vocab_size=3)
    assert draw_for(Sampling(), manifest, "crypten") == Draw()
    assert draw_for(Sampling(temperature=1.0), Manifest(), "crypten") == Draw()
    with pytest.raises(PromptError, match="support only greedy choice"):
        draw_for(Sampling(temperature=1.0), manifest, "crypten")


def test_the_answer_of_an_encoder_decoder_begins_with_its_start() -> None:
    """Which may be token 0: the source's tokens have not occurred in it, as a prompt's have."""
    settings = GenerationSettings(repetition_penalty=100.0, forced_eos_token_id=4)
    for start, chosen in ((0, [1, 2, 4]), (-1, [2, 0, 4])):
        pick = Chooser(Sampling(), Manifest(generation=settings, answer_start=start), [1, 3], 3)
        assert [pick(LOGITS) for _ in range(3)] == chosen


def test_limits_that_are_met_exactly() -> None:
    """Equal tokens, whose probabilities are exact: a quarter each."""
    for options, kept in (
        ({"top_p": 0.25}, 1), ({"top_p": 0.5}, 2), ({"top_p": 0.75}, 3), ({"top_k": 4}, 4),
        ({"top_k": 3}, 3), ({"top_k": 1}, 1),
    ):  # fmt: skip
        found = probabilities(torch.zeros(4), Sampling(temperature=1.0, **options))  # type: ignore[arg-type]
        assert int((found > 0).sum()) == kept


def test_logits_that_are_not_numbers_are_refused() -> None:
    for logits in ([0.0, math.nan], [math.inf, 0.0], []):
        with pytest.raises(PromptError, match="not finite"):
            choose(torch.tensor(logits), Sampling())
