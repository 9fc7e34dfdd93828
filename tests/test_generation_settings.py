"""Generation settings of a checkpoint: answers are those of `model.generate`, or it is refused."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mergec import CompileConfig, Program, compile_decoder
from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.capture import Captured, capture
from mergec.compiler.frontend.generation import generation_settings
from mergec.runtime.core.draw import Draw
from mergec.runtime.core.errors import MergecError, PromptError
from mergec.runtime.core.spec import ROLES
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.program.bundle import load_bundle
from mergec.runtime.program.generation_settings import NAMES, GenerationSettings
from mergec.runtime.program.manifest import Manifest
from mergec.runtime.session.sampling import Chooser, Sampling, draw_for
from tests.families import VOCAB, random_decoder

PROMPT, TOKENS = [5, 17, 3], 10


@pytest.fixture(scope="module")
def model() -> Any:
    made = random_decoder("llama").float()
    # Larger weights than the initial ones: logits then differ by more than rounding.
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    made.generation_config.pad_token_id = 0
    return made


@pytest.fixture(scope="module")
def captured(model: Any) -> Captured:
    return capture(model)


@pytest.fixture(scope="module")
def program(model: Any, captured: Captured) -> Program:
    return compile_decoder(model, config=CompileConfig(max_length=64), captured=captured)


def configured(model: Any, **settings: Any) -> Any:
    """The same model, with another generation_config."""
    made = copy.copy(model)
    made.generation_config = copy.deepcopy(model.generation_config)
    made.generation_config.update(**settings)
    return made


def manifest_of(model: Any, program: Program, ignored: tuple[str, ...] = ()) -> Manifest:
    """The manifest that this model's program would have."""
    found = generation_settings(model, reveal="logits", ignored=ignored, vocab_size=VOCAB)
    stop = model.generation_config.eos_token_id
    return replace(program.manifest, generation=found, stop_tokens=[] if stop is None else [stop])


def ours(
    program: Program, manifest: Manifest, sampling: Sampling, prompt: list[int] = PROMPT
) -> list[int]:
    plain = PlainExecutor(program.roles["server"])
    choose = Chooser(sampling, manifest, prompt, TOKENS)
    found = plain.generate(prompt, TOKENS, choose, manifest.stop_tokens)
    return [token for token, _ in found]


def theirs(model: Any, prompt: list[int] = PROMPT, **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=TOKENS, **options)
    return found[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def plain(model: Any) -> list[int]:
    """The greedy answer without any settings."""
    return theirs(model)


def settings_to_compare(plain: list[int]) -> dict[str, dict[str, Any]]:
    first, second, third = plain[:3]
    stop = {"eos_token_id": third}
    return {
        "repetition_penalty": {"repetition_penalty": 1.3},
        "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.8},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
        "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
        "bad_words_ids": {"bad_words_ids": [[second], [first, third]]},
        "sequence_bias": {"sequence_bias": [[[first], -50.0], [[7], 20.0]]},
        "suppress_tokens": {"suppress_tokens": [first, second]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [first]},
        "forced_bos_token_id": {"forced_bos_token_id": 9},
        "forced_eos_token_id": {"forced_eos_token_id": 11},
        "min_new_tokens": {"min_new_tokens": 5, **stop},
        "min_length": {"min_length": 7, **stop},
        "exponential_decay_length_penalty": {
            "exponential_decay_length_penalty": (1, 3.0), "eos_token_id": 8,
        },
        "several": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "min_length": 8, **stop},
    }  # fmt: skip


@pytest.mark.parametrize("name", settings_to_compare([0, 0, 0]))
def test_greedy_answers_are_those_of_generate(
    name: str, model: Any, program: Program, plain: list[int]
) -> None:
    changed = configured(model, **settings_to_compare(plain)[name])
    # A token is forced at the start only where the prompt is one token. The answer to the longer
    # prompt repeats tokens of it.
    prompts = {
        "forced_bos_token_id": PROMPT[:1],
        "encoder_no_repeat_ngram_size": [*PROMPT, *plain],
    }
    prompt = prompts.get(name, PROMPT)
    expected = theirs(changed, prompt)
    manifest = manifest_of(changed, program)
    assert ours(program, manifest, Sampling(), prompt) == expected
    stopped = replace(manifest, generation=GenerationSettings())
    assert ours(program, stopped, Sampling(), prompt) != expected, "the setting does nothing here"


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7, "top_k": 9, "top_p": 0.8},
        {"temperature": 0.5, "top_k": 0, "min_p": 0.3},
        {"temperature": 1.5, "top_k": 0, "top_h": 0.6, "top_p": 0.9},
        {"temperature": 2.0, "top_k": 0, "typical_p": 0.6},
        {"temperature": 2.0, "top_k": 0, "epsilon_cutoff": 0.03},
        {"temperature": 0.5, "top_k": 0, "eta_cutoff": 0.3, "repetition_penalty": 1.5},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_tokens_are_drawn_from_the_distribution_of_generate(
    settings: dict[str, Any], model: Any, program: Program
) -> None:
    changed = configured(model, do_sample=True, **settings)
    found = changed.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT)),
        max_new_tokens=1,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    choose = Chooser(Sampling(), manifest_of(changed, program), PROMPT, TOKENS)
    mine = torch.softmax(choose.scores(found.logits[0]), -1)
    wanted = torch.softmax(found.scores[0][0].double(), -1)
    assert int((wanted > 0).sum()) < VOCAB, "nothing is left out here"
    assert torch.allclose(mine, wanted, atol=1e-6)


def test_a_checkpoint_that_samples_does_so_repeatably(model: Any, program: Program) -> None:
    changed = configured(model, do_sample=True, temperature=3.0, top_k=3, no_repeat_ngram_size=2)
    manifest = manifest_of(changed, program)
    answers = {seed: ours(program, manifest, Sampling(seed=seed)) for seed in range(6)}
    assert len({tuple(answer) for answer in answers.values()}) > 1
    assert answers[4] == ours(program, manifest, Sampling(seed=4))
    executor = PlainExecutor(program.roles["server"])
    for answer in answers.values():
        said = iter(answer)
        row = executor.generate(PROMPT, TOKENS, lambda _, said=said: next(said))
        for token, logits in row:
            # Three of the tokens that no n-gram forbids: among the best 3 + TOKENS.
            assert token in logits.topk(3 + TOKENS).indices.tolist()
        pairs = list(zip([*PROMPT, *answer], answer, strict=False))[len(PROMPT) :]
        assert len(pairs) == len(set(pairs))


def test_a_request_overrides_the_checkpoint(model: Any, program: Program) -> None:
    changed = configured(
        model, do_sample=True, temperature=3.0, top_k=5, top_p=0.9, repetition_penalty=1.3
    )
    manifest = manifest_of(changed, program)
    penalized = theirs(changed, do_sample=False)
    assert ours(program, manifest, Sampling(temperature=0)) == penalized
    assert ours(program, manifest, Sampling(top_k=1, seed=1)) == penalized
    neutral = Sampling(temperature=0, repetition_penalty=1)
    assert ours(program, manifest, neutral) == theirs(model)
    other = theirs(changed, do_sample=False, repetition_penalty=2.0)
    assert ours(program, manifest, Sampling(temperature=0, repetition_penalty=2)) == other


CHECKPOINT = GenerationSettings(temperature=0.6, top_k=20, top_p=0.9, min_p=0.1)


@pytest.mark.parametrize(
    ("request_", "samples", "expected"),
    [
        (Sampling(), True, {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.1}),
        (Sampling(), False, {"temperature": 0.0}),
        (Sampling(), None, {"temperature": 0.0}),
        (Sampling(temperature=0), True, {"temperature": 0}),
        (
            Sampling(temperature=1.5), None,
            {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.1},
        ),
        (
            Sampling(top_k=0, top_p=1, min_p=0), True,
            {"temperature": 0.6},
        ),
        (Sampling(top_p=0.5), None, {"temperature": 0.0}),
    ],
)  # fmt: skip
def test_what_a_choice_follows(
    request_: Sampling, samples: bool | None, expected: dict[str, Any]
) -> None:
    assert request_.over(replace(CHECKPOINT, do_sample=samples)).to_dict() == expected


def test_do_sample_alone_is_temperature_1() -> None:
    assert Sampling().over(GenerationSettings(do_sample=True)).to_dict() == {"temperature": 1.0}
    assert Sampling().over(GenerationSettings()).to_dict() == {"temperature": 0.0}


def test_settings_that_leave_no_token_are_an_error() -> None:
    everything = GenerationSettings(suppress_tokens=[0, 1, 2])
    choose = Chooser(Sampling(), Manifest(generation=everything), [0], 4)
    with pytest.raises(PromptError, match="leave no token to choose"):
        choose(torch.zeros(3))


def test_what_transformers_refuses_is_one_line() -> None:
    """The vocabulary's size is unknown, so the manifest could not check it."""
    wrong = GenerationSettings(sequence_bias=[[[99], 1.0]])
    choose = Chooser(Sampling(), Manifest(generation=wrong), [0], 4)
    with pytest.raises(MergecError, match="fails in transformers' SequenceBias") as caught:
        choose(torch.zeros(3))
    assert len(str(caught.value).splitlines()) == 1


# Without transformers.


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    usual = GenerationSettings(do_sample=True, temperature=0.6, top_k=2, top_p=0.9)
    for settings in (GenerationSettings(), usual):
        manifest = Manifest(generation=settings)
        assert draw_for(Sampling(), manifest) == Draw()
        assert Chooser(Sampling(seed=1), manifest, [0], 4)(torch.tensor([0.0, 9.0])) == 1
    words = r"min_p, repetition_penalty .* need .* transformers .* `pip install 'mergec\[generatio"
    special = Manifest(generation=replace(usual, repetition_penalty=1.1, min_p=0.1))
    asked = Sampling(temperature=1, repetition_penalty=1.1, min_p=0.1)
    for sampling, manifest in ((Sampling(), special), (asked, Manifest())):
        with pytest.raises(MergecError, match=words):
            draw_for(sampling, manifest)
        with pytest.raises(MergecError, match=words):
            Chooser(sampling, manifest, [0], 4)
    neutral = Sampling(temperature=1, repetition_penalty=1, min_p=0)
    assert draw_for(neutral, special) == Draw()


# What the compiler reads.


def read(reveal: str = "logits", ignored: tuple[str, ...] = (), **settings: Any) -> dict[str, Any]:
    model = SimpleNamespace(generation_config=SimpleNamespace(**settings))
    found = generation_settings(model, reveal=reveal, ignored=ignored, vocab_size=VOCAB)
    return found.to_dict()


def test_neutral_values_are_no_settings() -> None:
    from transformers import GenerationConfig

    config = GenerationConfig()
    config.update(**config._get_default_generation_params())
    config.top_k = 0
    found = generation_settings(SimpleNamespace(generation_config=config), reveal="token")
    assert not found
    assert not read(max_length=20, use_cache=False, suppress_tokens=[], penalty_alpha=0.0)
    assert not generation_settings(torch.nn.Identity(), reveal="logits")


def test_every_setting_of_transformers_is_known_to_this_version() -> None:
    """A release of transformers that adds one which changes answers has to be dealt with here."""
    from transformers import GenerationConfig

    from mergec.compiler.frontend.generation import _IMPOSSIBLE

    without_effect = {
        "max_length", "max_new_tokens", "early_stopping", "length_penalty", "diversity_penalty",
        "use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory",
        "renormalize_logits", "remove_invalid_values", "output_attentions", "output_hidden_states",
        "output_scores", "output_logits", "return_dict_in_generate", "pad_token_id",
        "bos_token_id", "eos_token_id", "decoder_start_token_id", "is_assistant",
        "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
        "max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind", "compile_config",
        "disable_compile", "continuous_batching_config", "prefill_chunk_size",
        "transformers_version",
    }  # fmt: skip
    stated = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert stated - without_effect - {*NAMES, *_IMPOSSIBLE} == set()


def test_tuples_become_lists() -> None:
    found = read(sequence_bias={(3, 4): 1.5}, exponential_decay_length_penalty=(2, 1.5))
    assert found == {
        "sequence_bias": [[[3, 4], 1.5]],
        "exponential_decay_length_penalty": [2, 1.5],
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 4}, r"num_beams=4 \(beam search is not supported\); leave them out"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
        ({"watermarking_config": object()}, "watermarking_config="),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
        ({"stop_strings": ["x"]}, "stop_strings="),
        (
            {"reveal": "token", "repetition_penalty": 1.1, "top_p": 0.9, "do_sample": True},
            "top_p=0.9 .*, repetition_penalty=1.1 .*; compile with .*=.'top_p', 'repetition_pen",
        ),
        ({"reveal": "token", "top_k": 50}, "top_k=50"),
        ({"reveal": "token", "temperature": 65.0}, "temperature=65.0"),
        ({"top_p": 2}, "generation_config is invalid: .* top_p must be .* not 2; correct it"),
        ({"repetition_penalty": True}, "repetition_penalty must be"),
        ({"forced_bos_token_id": VOCAB}, f"names token {VOCAB}, .* vocabulary of {VOCAB}; corr"),
        ({"sequence_bias": {(3,): float("-inf")}}, "sequence_bias must be"),
        ({"ignored": ("colour",)}, "names 'colour', which is no generation setting; there are: "),
    ],
)
def test_refusals_are_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(CompileError, match=words) as caught:
        read(**options)
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_ignored_is_left_out() -> None:
    stated = {"num_beams": 4, "top_p": 7, "repetition_penalty": 1.1, "no_repeat_ngram_size": 3}
    ignored = ("num_beams", "top_p", "repetition_penalty", "temperature")
    assert read(ignored=ignored, **stated) == {"no_repeat_ngram_size": 3}
    parties = {"do_sample": True, "temperature": 0.6, "top_k": 8}
    assert read("token", ("top_p",), top_p=0.9, **parties) == parties


def test_what_the_parties_can_honour(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = GenerationSettings(do_sample=True, temperature=0.5, top_k=8)
    manifest = Manifest(reveal="token", vocab_size=VOCAB, generation=settings)
    assert draw_for(Sampling(), manifest) == Draw(2**15, 8)
    assert draw_for(Sampling(temperature=0), manifest) == Draw()
    assert draw_for(Sampling(top_k=0), manifest) == Draw(2**15)
    few = Manifest(reveal="token", vocab_size=8, generation=settings)
    assert draw_for(Sampling(), few) == Draw(2**15), "the 8 best of 8 tokens are all"
    for asked in (Sampling(min_p=0.1), Sampling(repetition_penalty=1.1)):
        with pytest.raises(PromptError, match="needs the logits"):
            draw_for(asked, manifest)


def test_a_compile_reads_them_and_refuses_them(model: Any) -> None:
    with pytest.raises(CompileError, match="num_beams=2"):
        compile_decoder(configured(model, num_beams=2))
    with pytest.raises(CompileError, match=r"repetition_penalty=1\.1"):
        compile_decoder(
            configured(model, repetition_penalty=1.1), config=CompileConfig(reveal="token")
        )


@pytest.mark.slow
def test_in_three_processes(model: Any, plain: list[int]) -> None:
    changed = configured(model, repetition_penalty=1.3, suppress_tokens=[plain[0]], num_beams=3)
    options = CompileConfig(max_length=64, ignore_settings=("num_beams",))
    made = compile_decoder(changed, config=options)
    changed.generation_config.num_beams = 1
    answer = made.generate_local(PROMPT, max_tokens=TOKENS)
    assert answer.tokens == theirs(changed)
    assert made.plaintext(answer).tokens == answer.tokens
    other = made.generate_local(PROMPT, max_tokens=4, repetition_penalty=1)
    assert other.tokens == theirs(changed, repetition_penalty=1.0)[:4]


def test_all_roles_have_the_settings_and_one_hash(
    model: Any, program: Program, captured: Captured, tmp_path: Path
) -> None:
    settings = {"sequence_bias": [[[3, 4], 5.0]], "top_p": 0.9, "forced_eos_token_id": [7]}
    config = CompileConfig(max_length=64)
    other = compile_decoder(configured(model, **settings), config=config, captured=captured)
    assert other.manifest.program_hash != program.manifest.program_hash
    other.save(tmp_path / "b")
    manifests = [load_bundle(tmp_path / "b" / role, role).manifest for role in ROLES]
    manifests.append(Program.load(tmp_path / "b").manifest)
    assert {found.program_hash for found in manifests} == {other.manifest.program_hash}
    for found in manifests:
        assert settings.items() <= found.generation.to_dict().items()
    Program.load(tmp_path / "b").check(other.manifest.program_hash)
