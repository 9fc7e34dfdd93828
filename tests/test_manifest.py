"""The manifest: typed fields in memory, the same JSON on disk as ever."""

from __future__ import annotations

import dataclasses
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from mergec.compiler.program import Program
from mergec.runtime.core.errors import BundleError
from mergec.runtime.core.spec import ROLES
from mergec.runtime.program import bundle
from mergec.runtime.program.bundle import load_bundle, read_manifest, save_bundle
from mergec.runtime.program.generation_settings import GenerationSettings
from mergec.runtime.program.manifest import Manifest, digest
from mergec.runtime.session.hello import Hello
from tests.fixtures import decoder, tiny
from tests.test_former_bundles import ARCHIVE as FORMER
from tests.test_program import TYPES

KEYS = [
    "format_version", "mergec_version", "torch_version", "role", "ring_bits", "program_hash",
    "model", "fractional_bits", "max_length", "vocab_size", "stop_tokens", "tokenizer", "lossy",
    "deviation", "weights", "reveal", "logit_noise", "network", "rounding",
    "speculate_up_to", "medusa", "mode", "shapes",
    "cost", "passes", "left_out", "files", "digest",
]  # fmt: skip
"""In the order of every manifest.json of format version 2; settings are left out if there are none.
"""

SETTINGS = GenerationSettings(do_sample=True, top_p=0.9, sequence_bias=[[[3, 4], -1.5]])


PASS = {
    "pass": "fuse_glu", "summary": "x", "exact": True, "sites": 2, "nodes_before": 9,
    "nodes_after": 7, "skips": [],
}  # fmt: skip


STEP = {"new": 1, "past": 128, "rounds": 9, "online": 80, "offline": 0}
DEVIATION = {"places": 4, "agreed": 3, "worst": 2, "mean": 0.5, "spread": 1.5}


@pytest.mark.parametrize("role", ROLES)
def test_a_bundle_from_before_is_read_and_written_alike(role: str, tmp_path: Path) -> None:
    """Its manifest was a dictionary then, and its hash covered no tokenizer."""
    with tarfile.open(FORMER) as archive:
        archive.extractall(tmp_path, filter="data")
    before = tmp_path / "bundles-0.1.0" / role
    program = load_bundle(before, role)
    assert (program.manifest.vocab_size, program.manifest.role) == (32, role)
    kept = {
        name: before / name
        for name in program.manifest.files
        if name not in (bundle.PROGRAM, bundle.TENSORS)
    }
    after = save_bundle(program, tmp_path / "after", kept)
    for name in program.manifest.files:
        assert (after / name).read_bytes() == (before / name).read_bytes()
    old, new = ((f / bundle.MANIFEST).read_text().splitlines() for f in (before, after))
    changed = {line.strip().partition(":")[0] for line in {*old} ^ {*new}}
    assert changed <= {
        '"format_version"', '"mergec_version"', '"torch_version"', '"program_hash"',
        '"tokenizer"', '"logit_noise"', '"rounding"', '"speculate_up_to"', '"medusa"', '"digest"',
    }  # fmt: skip
    assert '"logit_noise": 0.0,' in (after / bundle.MANIFEST).read_text()


def test_a_manifest_is_written_as_ever(tmp_path: Path) -> None:
    folder = save_bundle(tiny("client", lossy=True), tmp_path / "b")
    text = (folder / bundle.MANIFEST).read_text()
    data = json.loads(text)
    fields = [field.name for field in dataclasses.fields(Manifest)]
    left_out = ("generation", "answer_start", "pad_token")
    assert list(data) == KEYS == [name for name in fields if name not in left_out]
    assert data["format_version"] == 2
    assert text == json.dumps(data, indent=1) + "\n"
    assert data == read_manifest(folder).to_dict()
    assert data["digest"] == digest(data)


def test_settings_are_part_of_the_program(tmp_path: Path) -> None:
    """They decide how long answers are: a bias can make one stop where its prompt says so."""
    hashes = set()
    for role in ROLES:
        folder = save_bundle(tiny(role, generation=SETTINGS), tmp_path / role)
        data = json.loads((folder / bundle.MANIFEST).read_text())
        assert data["generation"] == SETTINGS.to_dict()
        manifest = load_bundle(folder, role).manifest
        assert manifest.generation == SETTINGS
        hashes.add(manifest.program_hash)
    assert len(hashes) == 1
    for n, other in enumerate(({}, {**SETTINGS.to_dict(), "min_length": 3})):
        settings = GenerationSettings.from_dict(other)
        folder = save_bundle(tiny("client", generation=settings), tmp_path / str(n))
        hashes.add(read_manifest(folder).program_hash)
    assert len(hashes) == 3


@pytest.mark.parametrize("role", ROLES)
def test_settings_that_were_changed_are_another_program(role: str, tmp_path: Path) -> None:
    folder = save_bundle(tiny(role, generation=SETTINGS), tmp_path / "b")
    file = folder / bundle.MANIFEST
    data = json.loads(file.read_text()) | {"generation": {"sequence_bias": [[[3, 4], 1e9]]}}
    file.write_text(json.dumps(data | {"digest": digest(data)}))
    with pytest.raises(BundleError, match=r"has the program hash .*, but the manifest lists"):
        load_bundle(folder, role)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([], "'generation' is not dict"),
        ({"top_z": 1}, "the generation setting 'top_z' is not known"),
        ({"do_sample": 1}, "do_sample must be true or false, not 1"),
        ({"temperature": "hot"}, "temperature must be a number, 0 or more, not 'hot'"),
        ({"top_p": 1.5}, "top_p must be a number above 0 and at most 1, not 1.5"),
        ({"top_k": -1}, "top_k must be a whole number, 0 or more, not -1"),
        ({"repetition_penalty": 10**400}, "repetition_penalty must be a number above 0, not 100"),
        ({"suppress_tokens": [10**400]}, "suppress_tokens must be a list of tokens"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0, not 0"),
        ({"repetition_penalty": True}, "repetition_penalty must be a number above 0, not True"),
        ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size must be a whole number"),
        ({"eta_cutoff": 1}, "eta_cutoff must be a number, 0 or more and below 1, not 1"),
        ({"bad_words_ids": [3]}, r"bad_words_ids must be a list of lists of tokens, not \[3\]"),
        ({"bad_words_ids": [[11]]}, "bad_words_ids names token 11, .* vocabulary of 11"),
        ({"forced_bos_token_id": 99}, "forced_bos_token_id names token 99"),
        ({"forced_eos_token_id": [1, 99]}, "forced_eos_token_id names token 99"),
        ({"sequence_bias": [[[99], 1.0]]}, "sequence_bias names token 99"),
        ({"sequence_bias": [[[1], "x"]]}, "sequence_bias must be a list of pairs"),
        ({"sequence_bias": [[1, 2, 3]]}, "sequence_bias must be a list of pairs"),
        ({"exponential_decay_length_penalty": [1]}, "exponential_decay_length_penalty must be"),
        ({"suppress_tokens": ["a"] * 99}, r"suppress_tokens must be a list of tokens, not .{60}…;"),
    ],
)
def test_wrong_settings_in_a_bundle_are_refused_in_one_line(
    settings: Any, words: str, tmp_path: Path
) -> None:
    folder = save_bundle(tiny("client"), tmp_path / "b")
    file = folder / bundle.MANIFEST
    data = json.loads(file.read_text()) | {"format_version": 2, "generation": settings}
    file.write_text(json.dumps(data | {"digest": digest(data)}))
    with pytest.raises(BundleError, match=words) as caught:
        load_bundle(folder, "client")
    assert str(caught.value).startswith(f"{file}: ")
    assert len(str(caught.value).splitlines()) == 1


def test_what_a_compiler_does_not_say() -> None:
    manifest = Manifest()
    assert (manifest.fractional_bits, manifest.ring_bits) == (16, 64)
    assert (manifest.max_length, manifest.vocab_size, manifest.stop_tokens) == (0, 0, [])
    assert (manifest.weights, manifest.reveal, manifest.network) == ("server", "logits", "loopback")
    assert manifest.reveals_logits
    assert not Manifest(reveal="token").reveals_logits
    assert Manifest.from_dict(manifest.to_dict()) == manifest


def test_a_manifest_is_not_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Manifest().model = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"max_length": "64"}, "max_length must be int, not '64'"),
        ({"vocab_size": True}, "vocab_size must be int, not True"),
        ({"lossy": 1}, "lossy must be bool, not 1"),
        ({"model": None}, "model must be str"),
        ({"stop_tokens": (3,)}, "stop_tokens must be list"),
        ({"stop_tokens": [3, "4"]}, "stop_tokens must hold int, not '4'"),
        ({"passes": ["x" * 10**6]}, f"passes must hold dict, not '{'x' * 59}…$"),
        ({"passes": ["fuse_glu"]}, "passes must hold dict, not 'fuse_glu'"),
        ({"cost": []}, "cost must be dict"),
        ({"speculate_up_to": 32}, "speculate_up_to is 32; it can be 0 to 31"),
        ({"speculate_up_to": -1}, "speculate_up_to is -1; it can be 0 to 31"),
        ({"logit_noise": 0}, "logit_noise must be float, not 0"),
        ({"logit_noise": -0.001}, "logit_noise is -0.001; it can be 0 to 0.0625"),
        ({"logit_noise": 0.5}, "logit_noise is 0.5; it can be 0 to 0.0625"),
        ({"reveal": "all"}, "reveal is 'all'; it can be: logits, token"),
        ({"max_length": -1}, "max_length is -1"),
        ({"cost": {"decode": 3}}, "cost must hold dict, not 3"),
        ({"cost": {"decode": {}}}, "cost of 'decode' needs new as int, not None"),
        ({"cost": {"decode": STEP | {"rounds": "9"}}}, "needs rounds as int, not '9'"),
        ({"cost": {"decode": STEP | {"past": -1}}}, "needs past as int, not -1"),
        ({"passes": [PASS | {"sites": None}]}, "report of a pass needs sites as int, not None"),
        ({"passes": [{"pass": "fuse_glu"}]}, "report of a pass needs summary as str"),
        ({"passes": [PASS | {"skips": ["x"]}]}, "skips must hold dict, not 'x'"),
        ({"passes": [PASS | {"skips": [{"node": "x"}]}]}, "skip of a pass needs module as str"),
        ({"deviation": {"places": 1}}, "deviation needs agreed as int"),
        ({"deviation": DEVIATION | {"mean": float("inf")}}, "deviation needs mean as float"),
        ({"left_out": {"quad": 3}}, "left_out must hold str, not 3"),
    ],
)
def test_a_wrong_value_is_refused_where_it_is_given(said: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        Manifest(**said)
    with pytest.raises(BundleError):
        Manifest.from_dict(Manifest().to_dict() | said)


def test_more_keys_of_a_later_compiler_are_ignored() -> None:
    later: dict[str, Any] = {"later": 1}
    told = {"cost": {"decode": STEP | later}, "passes": [PASS | later], "deviation": DEVIATION}
    program = Program({role: decoder(role, **told) for role in ROLES}, TYPES)
    assert "9 rounds" in program._repr_html_()
    assert program.inspect(1, 4).steps[0].rounds == 9
    assert program.inspect(1, 4).passes[0].sites == 2


def test_an_unknown_field_is_an_error_in_code_and_ignored_on_disk() -> None:
    with pytest.raises(TypeError, match="modle"):
        Manifest(modle="x")  # type: ignore[call-arg]
    assert Manifest.from_dict(Manifest().to_dict() | {"later": 1}) == Manifest()


def test_what_roles_tell_each_other_of_it() -> None:
    hello = Hello.of("client", Manifest(program_hash="ab", passes=[PASS], fractional_bits=16))
    assert json.loads(hello.encode()) == {
        "role": "client", "mode": "mergec", "program_hash": "ab", "passes": ["fuse_glu:2"],
        "fixed": 16, "ring": 64, "debug": 0, "version": 3,
    }  # fmt: skip
