"""Encoder-decoders: one graph, cut in two phases, that gives transformers' answers."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mergec.compiler.backend.cost import cost_report
from mergec.compiler.config import CompileConfig
from mergec.compiler.driver import compile_decoder
from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.calibration import calibration
from mergec.compiler.frontend.capture import capture
from mergec.compiler.frontend.generation import generation_settings
from mergec.compiler.frontend.load import load_model
from mergec.compiler.graph.ir import calls
from mergec.compiler.pipeline import rewrite
from mergec.compiler.program import Program
from mergec.runtime.core.errors import BundleError, PromptError
from mergec.runtime.core.op import target
from mergec.runtime.core.spec import Vis
from mergec.runtime.engine.audit import audit
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.engine.rehearsal import Rehearsal
from mergec.runtime.program.generation_settings import NAMES
from mergec.runtime.program.manifest import Manifest
from mergec.runtime.program.program import BEGUN, DECODE, PROMPT
from mergec.runtime.program.validate import validate
from mergec.runtime.roles.inprocess import InProcessSession
from mergec.runtime.session.drafting import Speculation
from mergec.runtime.session.drafting.lookup import Lookup
from mergec.runtime.session.generation import answer
from mergec.runtime.session.plain import PlainSession
from mergec.runtime.session.public_text import check_public
from mergec.runtime.session.sampling import Chooser, Sampling
from tests.encoder_decoders import (
    FAMILIES,
    QUICK,
    SOURCES,
    VOCAB,
    answer_of,
    compiled,
    double_step,
    every_family,
    model_and_step,
    random_model,
)
from tests.families import slow
from tests.test_speculation import Fixed

TOKENS, DRAFTS = 8, 3
LOGIT_ERROR = 0.02
"""Of logits up to about 5, without the server's noise."""


def plain_answer(
    program: Program,
    source: list[int],
    max_tokens: int = TOKENS,
    manifest: Manifest | None = None,
) -> list[int]:
    """The program's greedy answer in the clear. manifest: with other generation settings."""
    plain = PlainExecutor(program.roles["server"])
    manifest = manifest or program.manifest
    pick = Chooser(Sampling(), manifest, source, max_tokens)
    return [token for token, _ in plain.generate(source, max_tokens, pick, manifest.stop_tokens)]


# ------------------------------------------------------------------------------- capture and passes


@every_family()
def test_the_graph_is_the_model(family: str) -> None:
    """On a source and answers of several lengths, fed as a prompt and token by token."""
    model, captured = model_and_step(family)
    generator = torch.Generator().manual_seed(2)
    caches = [torch.zeros(1, 4, 0, 4) for _ in captured.inputs[2:]]
    for source in SOURCES:
        ids = torch.tensor([source])
        answered = torch.randint(0, VOCAB, (1, 6), generator=generator)
        with torch.inference_mode():
            wanted = model(input_ids=ids, decoder_input_ids=answered).logits[0]
            given = caches
            for cut, row in ((answered[:, :4], 3), (answered[:, 4:5], 4), (answered[:, 5:], 5)):
                logits, *found = captured.graph_module(ids, cut, *given)
                given = found[: len(caches)]
                assert torch.allclose(logits[0, -1], wanted[row], atol=1e-4)


def test_tables_that_a_model_makes_longer() -> None:
    """M2M-100 does at its longest text, and is as it was after a capture."""
    model, captured = model_and_step("m2m_100")
    assert captured.limit is not None
    assert (captured.limit.length, captured.branch) == (64, None)
    for part in (model.get_encoder(), model.get_decoder()):
        assert len(part.embed_positions.weights) == 64 + 2
    source = [5 + n % 90 for n in range(62)]
    program = compile_decoder(model, captured=captured)
    assert program.any_role.manifest.max_length == 64
    assert plain_answer(program, source, 2) == answer_of(model, source, 2)


@every_family()
def test_the_decoder_reads_the_source_through_filled_caches_alone(family: str) -> None:
    graph = model_and_step(family)[1].graph_module.graph
    *_, output = graph.nodes
    source = next(node for node in graph.nodes if node.op == "placeholder")
    assert source.meta["name"] == "input_ids"
    results = output.args[0]
    filled = [node for node in results if calls(node, target("cache_fill"))]
    assert len(filled) == 2 * 2, "keys and values of two layers"
    assert results[-len(filled) :] == filled
    asked, seen = [node for node in results if node not in filled], set()
    while asked:
        node = asked.pop()
        if node not in seen and node not in filled:
            seen.add(node)
            asked += node.all_input_nodes
    assert source not in seen


@every_family()
def test_every_pass_keeps_the_outputs_in_double_precision(family: str) -> None:
    """`check_passes` runs the graph before and after each pass, and names one that changes it."""
    captured = double_step(family).copy()
    config = CompileConfig(max_length=40, check_passes=True)
    reports = rewrite(captured, config, sequences=calibration(config, captured))
    assert {report.name for report in reports if report.sites} > {"fuse_attention", "fuse_cache"}


@pytest.mark.parametrize(
    ("family", "tolerance"),
    # T5's norms round to float32 whatever its weights are; the rewritten graph does not.
    [("t5", 1e-5), ("bart", 1e-12)],
)
def test_encoder_states_are_the_models_after_all_passes(family: str, tolerance: float) -> None:
    """Keys and values of the source in float64, from the rewritten graph, and from the model."""
    captured = double_step(family).copy()
    config = CompileConfig(max_length=40)
    rewrite(captured, config, sequences=calibration(config, captured))
    model = copy.deepcopy(model_and_step(family)[0]).double()
    for source in SOURCES:
        ids, start = torch.tensor([source]), torch.tensor([[captured.start]])
        with torch.inference_mode():
            cache = model(input_ids=ids, decoder_input_ids=start, use_cache=True).past_key_values
            empty = [torch.zeros(1, 4, 0, 4, dtype=torch.float64) for _ in captured.inputs[2:]]
            found = captured.graph_module(ids, start, *empty)[1 + len(empty) :]
        layers = cache.cross_attention_cache.layers
        wanted = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        assert len(found) == len(wanted)
        for mine, theirs in zip(found, wanted, strict=True):
            assert torch.allclose(mine, theirs, rtol=0, atol=tolerance)


def test_a_bias_that_the_server_holds_is_fused_with_the_mask() -> None:
    """The relative position bias of T5: known to the server, read by every self-attention."""
    _, program = compiled("t5")
    by_name = {item.name: item for item in program.any_role.instructions}
    found = [item for item in by_name.values() if item.target == "mpc.attention"]
    biases = [item.args[7] for item in found if len(item.args) > 7 and item.args[7] is not None]
    assert len(found) == 6
    assert len(biases) == 4, "cross-attention has none"
    assert {by_name[bias.name].vis for bias in biases} == {Vis.SERVER}


# --------------------------------------------------------------------------------- the program


@every_family()
def test_greedy_answers_are_those_of_transformers(family: str) -> None:
    model, program = compiled(family)
    validate(program.any_role, family)
    answers = [plain_answer(program, source) for source in SOURCES]
    assert answers == [answer_of(model, source, TOKENS) for source in SOURCES]
    assert len({tuple(tokens) for tokens in answers}) > 1


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"encoder_repetition_penalty": 3.0},
        {"forced_bos_token_id": 7},
        {"forced_eos_token_id": 2},
        {"min_length": 5, "eos_token_id": 28},
        *slow(
            {"no_repeat_ngram_size": 2},
            {"encoder_no_repeat_ngram_size": 1},
            {"suppress_tokens": [28, 55]},
            {"bad_words_ids": [[86], [45, 40]]},
        ),
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_generation_settings_are_those_of_transformers(settings: dict[str, Any]) -> None:
    """Processors see the answer from its first token on, and the source where they ask for it."""
    model, program = compiled("bart")
    changed = copy.deepcopy(model)
    changed.generation_config.forced_eos_token_id = None
    for name, value in settings.items():
        setattr(changed.generation_config, name, value)
    stated = generation_settings(changed, reveal="logits", vocab_size=VOCAB)
    stop = [changed.generation_config.eos_token_id]
    manifest = replace(program.manifest, generation=stated, stop_tokens=stop)
    assert stated.to_dict().items() >= {k: v for k, v in settings.items() if k in NAMES}.items()
    for source in SOURCES:
        found = plain_answer(program, source, manifest=manifest)
        assert found == answer_of(changed, source, TOKENS)


@every_family()
def test_private_logits_are_the_plain_ones(family: str) -> None:
    """Every step of all three roles, and a second source in the same session."""
    _, program = compiled(family)
    plain = PlainExecutor(program.roles["server"])
    with InProcessSession(program.roles) as session:
        for source in SOURCES if family in QUICK else SOURCES[:1]:
            past, fed = 0, list(source)
            for token, wanted in plain.generate(source, 3):
                logits = session.step(fed, past)
                assert float((logits - wanted).abs().max()) < LOGIT_ERROR
                past, fed = past + len(fed), [token]


@pytest.mark.parametrize(
    "options",
    [
        *slow({"weights": "shared"}, {"rounding": "exact"}, {"network": "wan"}),
        {"reveal": "token"},
    ],
    ids=lambda options: next(iter(options.values())),
)
@pytest.mark.parametrize("family", ["t5", *slow("bart")])
def test_answers_with_other_options(family: str, options: dict[str, Any]) -> None:
    if family == "bart" and options.get("reveal"):
        pytest.skip("BART's configuration forces a token, which needs the logits")
    model, program = compiled(family, **options)
    source = SOURCES[0]
    past, fed, found = 0, list(source), []
    with InProcessSession(program.roles) as session:
        for _ in range(3):
            result = session.step(fed, past)
            token = int(result[0]) if options.get("reveal") == "token" else int(result.argmax())
            found.append(token)
            past, fed = past + len(fed), [token]
    assert found == answer_of(model, source, 3, forced_eos_token_id=None)


def test_costs_are_those_counted() -> None:
    """By the op formulas, by the rehearsal, and as the executors counted them."""
    _, program = compiled("t5")
    role, source = program.any_role, SOURCES[0]
    with InProcessSession(program.roles) as session:
        past, fed = 0, list(source)
        for _ in range(3):
            session.step(fed, past)
            given = len(source) if past else None
            stated = cost_report(role, len(fed), past, source=given).total
            assert session.record.total == stated
            assert len(Rehearsal(role).step(len(fed), past, source=given)) == stated.rounds
            past, fed = past + len(fed), [7]


def test_keys_and_values_of_the_source_are_opened_once() -> None:
    """A decode step does not pay for the source but by what attends to it."""
    _, program = compiled("bart")
    phases = {phase.name: phase for phase in program.any_role.phases}
    assert list(phases) == [PROMPT, DECODE]
    cross = [spec for spec in phases[DECODE].inputs if "source" in spec.shape]
    assert [spec.form for spec in cross] == ["masked"] * 4
    report = cost_report(program.any_role, 1, 20, source=20)
    assert not [row for row in report.rows if "encoder." in row.module.replace("encoder_attn", "")]
    long, short = (cost_report(program.any_role, 1, n, source=n).total for n in (20, 10))
    assert long.rounds == short.rounds


def test_several_tokens_and_rolling_back() -> None:
    """A step of several tokens, and one that drops what came after it; the source stays."""
    _, program = compiled("t5")
    source, tokens = list(SOURCES[0]), [11, 12, 13]
    with InProcessSession(program.roles) as session:
        session.step(source, 0)
        one = [session.step([token], len(source) + n) for n, token in enumerate(tokens)][-1]
        both = session.step(tokens[1:], len(source) + 1)
        assert float((one - both).abs().max()) < LOGIT_ERROR
        with pytest.raises(BundleError, match="out of turn"):
            session.step([1], len(source) - 1)
        with pytest.raises(BundleError, match="out of turn"):
            session.step([1], len(source) + 9)


@every_family()
def test_drafts_leave_answers_as_they_are(family: str) -> None:
    """With mistakes at several places, with steps that look alike, and under a seed."""
    model, program = compiled(family, speculate_up_to=DRAFTS)
    session = PlainSession(PlainExecutor(program.roles["server"]))
    heated = Sampling(temperature=1.5, seed=3)
    for source in SOURCES[:2]:
        length, wanted = len(source), answer_of(model, source, TOKENS)
        drawn = [t.token for t in answer(session, source, max_tokens=TOKENS, sampling=heated)]
        for wrong, fixed in itertools.product((0, 2, 3, TOKENS), (None, 1.5)):
            for expected, sampling in ((wanted, Sampling()), (drawn, heated)):
                drafts = [(t + (n == wrong)) % VOCAB for n, t in enumerate(expected)]
                drafter = Fixed(lambda known, to=drafts, at=length: to[len(known) - at :])
                made = Speculation(drafter, DRAFTS, fixed=fixed)
                options = {"max_tokens": TOKENS, "sampling": sampling, "speculation": made}
                found = list(answer(session, source, **options))
                assert [token.token for token in found] == expected
                steps = sum(len(token.reports) for token in found)
                if fixed is None and wrong >= len(expected):
                    assert steps == 1 + math.ceil((len(expected) - 1) / (1 + DRAFTS))


@pytest.mark.parametrize("family", QUICK)
def test_the_parties_check_drafts(family: str) -> None:
    """A step gives what single ones give, at each of its positions; then it is rolled back."""
    model, program = compiled(family, speculate_up_to=DRAFTS)
    source, tokens = list(SOURCES[0]), [11, 12, 13]
    with InProcessSession(program.roles) as parties:
        first = parties.step(source, 0)
        single = [parties.step([token], len(source) + n) for n, token in enumerate(tokens)]
        found = parties.rows(tokens, len(source))
        assert found.shape == (3, VOCAB)
        for mine, theirs in zip(found, single, strict=True):
            assert float((mine - theirs).abs().max()) < LOGIT_ERROR
        again = parties.step([40], len(source) + 1)
    assert int(first.argmax()) == answer_of(model, source, 1, forced_eos_token_id=None)[0]
    with InProcessSession(program.roles) as parties:
        parties.step(source, 0)
        parties.step(tokens[:1], len(source))
        other = parties.step([40], len(source) + 1)
    assert float((again - other).abs().max()) < LOGIT_ERROR


def test_drafts_that_encoder_decoders_do_not_have() -> None:
    _, program = compiled("t5", speculate_up_to=DRAFTS)
    session = PlainSession(PlainExecutor(program.roles["server"]))
    tree = Speculation(Lookup(), DRAFTS, tree=True)
    with pytest.raises(PromptError, match="trees of drafts are for decoders so far"):
        next(answer(session, SOURCES[0], speculation=tree, max_tokens=2))
    with pytest.raises(CompileError, match="needs tokens after each step"):
        compiled("t5", speculate_up_to=DRAFTS, preset="merge-er")


def test_bundles_keep_the_phases(tmp_path: Path) -> None:
    model, program = compiled("t5")
    loaded = Program.load(program.save(tmp_path / "program"))
    assert loaded.any_role.phases == program.any_role.phases
    assert loaded.manifest.answer_start == 0
    assert plain_answer(loaded, SOURCES[0]) == answer_of(model, SOURCES[0], TOKENS)


def test_inspect_and_audit() -> None:
    _, program = compiled("t5")
    first, later = program.inspect(1, 12), program.inspect(1, 12, source=4)
    assert first.total == program.inspect(1, 12, source=12).total
    assert later.total != first.total
    assert program.inspect(6, 0).total.rounds > first.total.rounds
    found = audit(program.any_role)
    assert not found.unmasked
    assert "of which the source has half" in found.to_text()
    assert json.loads(found.to_json())["facts"]["encodes"] is True
    assert "cache_fill" in str(program.graph)


# ---------------------------------------------------------------------------------- three processes


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_three_processes(family: str) -> None:
    model, program = compiled(family)
    source = list(SOURCES[0])
    found = program.generate_local(source, max_tokens=5)
    assert found.tokens == answer_of(model, source, 5)
    assert program.plaintext(found).tokens == found.tokens
    assert not found.continues


@pytest.mark.slow
@pytest.mark.parametrize("family", QUICK)
def test_three_processes_draft(family: str) -> None:
    model, program = compiled(family, speculate_up_to=DRAFTS)
    for source in SOURCES[:2]:
        options = {"speculate": "lookup", "speculate_tokens": DRAFTS, "max_tokens": TOKENS}
        found = program.generate_local(list(source), **options)
        assert found.tokens == answer_of(model, source, TOKENS)
        decode = found.phases["decode"]
        assert decode.steps < decode.tokens, "some drafts were right"


@pytest.mark.slow
def test_crypten_stock_protocols() -> None:
    model, program = compiled("bart")
    found = program.generate_local(list(SOURCES[0]), max_tokens=2, mode="crypten")
    assert found.tokens == answer_of(model, SOURCES[0], 2)


# ------------------------------------------------------------------------------------------ refused


def _fsmt() -> Any:
    import transformers

    return transformers.FSMTForConditionalGeneration(
        transformers.FSMTConfig(
            langs=["en", "de"], src_vocab_size=VOCAB, tgt_vocab_size=VOCAB, d_model=16,
            encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        )
    )  # fmt: skip


def _led() -> Any:
    import transformers

    return transformers.LEDForConditionalGeneration(
        transformers.LEDConfig(
            vocab_size=VOCAB, d_model=16, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
            decoder_ffn_dim=16, attention_window=4,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            _led,
            "LEDForConditionalGeneration cannot be compiled: its encoder attends in overlapping",
        ),
        (_fsmt, "its positions depend on which tokens are padding"),
        (lambda: random_model("bart").get_encoder(), "no language-model head|is an encoder"),
        (lambda: random_model("bart").model, "load it as AutoModelForSeq2SeqLM"),
    ],
)
def test_other_models_are_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(CompileError, match=words) as caught:
        capture(make())
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_length": 65}, "max_position_embeddings is 64"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], words: str) -> None:
    model, captured = model_and_step("bart")
    with pytest.raises(CompileError, match=words):
        compile_decoder(model, config=CompileConfig(**options), captured=captured)


def test_a_beam_search_is_refused_with_its_length_penalty() -> None:
    model, captured = model_and_step("bart")
    changed = copy.deepcopy(model)
    changed.generation_config.length_penalty = 2.0
    compile_decoder(changed, config=CompileConfig(max_length=20), captured=captured)
    changed.generation_config.num_beams = 4
    with pytest.raises(CompileError, match="it ranks the answers of a beam search") as caught:
        compile_decoder(changed, config=CompileConfig(max_length=20), captured=captured)
    assert "num_beams=4 (beam search is not supported), length_penalty=2.0" in str(caught.value)


def test_prompts_that_are_refused() -> None:
    _, program = compiled("bart")
    with pytest.raises(PromptError, match="is more than this program's 40"):
        program.generate_local([5] * 39, max_tokens=2)
    with pytest.raises(PromptError, match="not in the vocabulary"):
        program.generate_local([VOCAB], max_tokens=2)
    with pytest.raises(PromptError, match="whose encoder reads a prompt as a whole"):
        program.generate_local([5, 6], max_tokens=2, public_prefix=[5])
    with pytest.raises(PromptError, match="reads a prompt as a whole"):
        check_public(program.any_role, 1, [5])
    for past, source in ((0, 3), (9, 10)):
        with pytest.raises(PromptError, match="source"):
            program.inspect(1, past, source=source)
    with pytest.raises(PromptError, match="decode step of an encoder-decoder"):
        from tests.session import compiled as decoder

        decoder("gpt2")[1].inspect(1, 9, source=3)


def test_a_model_folder_is_loaded(tmp_path: Path) -> None:
    model, _ = model_and_step("t5")
    model.save_pretrained(tmp_path)
    loaded, tokenizer = load_model(tmp_path)
    assert type(loaded) is type(model)
    assert tokenizer is None
    found = loaded(input_ids=torch.tensor([[5]]), decoder_input_ids=torch.tensor([[0]])).logits
    wanted = model(input_ids=torch.tensor([[5]]), decoder_input_ids=torch.tensor([[0]])).logits
    assert torch.allclose(found, wanted, atol=1e-5)


def test_faulty_phases_are_refused() -> None:
    """A phase that lacks the source's caches, or a manifest without the first token."""
    _, program = compiled("t5")
    role = program.roles["client"]
    validate(role, "here")
    decode = role.phases[1]
    fewer = replace(decode, inputs=decode.inputs[:-1])
    with pytest.raises(BundleError, match="the phase decode lacks"):
        validate(replace(role, phases=[role.phases[0], fewer]), "here")
    lost = replace(decode, outputs=decode.outputs[:-1])
    with pytest.raises(BundleError, match="does not give the cache"):
        validate(replace(role, phases=[role.phases[0], lost]), "here")
    with pytest.raises(BundleError, match="answer_start is -1"):
        validate(replace(role, manifest=replace(role.manifest, answer_start=-1)), "here")
    with pytest.raises(BundleError, match="answer_start is 97"):
        replace(role.manifest, answer_start=VOCAB)


def test_the_sizes_of_steps() -> None:
    role = compiled("t5")[1].any_role
    assert role.sizes(7, 0) == (BEGUN, 0, 7)
    assert role.sizes(1, 7) == (1, BEGUN, 7)
    assert role.sizes(2, 10, 7) == (2, BEGUN + 3, 7)
