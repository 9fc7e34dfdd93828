"""Bundles on disk: a round trip keeps everything, and faults are reported before anything runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergec.runtime.core.errors import BundleError
from mergec.runtime.core.spec import CHOICES, ROLES, Vis
from mergec.runtime.program import bundle, encoding
from mergec.runtime.program.bundle import load_bundle, read_manifest, save_bundle
from mergec.runtime.program.encoding import program_hash
from mergec.runtime.program.manifest import Manifest, digest
from mergec.runtime.program.program import InputSpec, Instruction, Phase, Ref, RoleProgram
from mergec.runtime.program.tensor_file import Content, write_tensors
from mergec.runtime.program.validate import validate
from tests import fixtures
from tests.fixtures import tiny


@pytest.fixture
def server(tmp_path: Path) -> Path:
    return save_bundle(tiny("server"), tmp_path / "server")


def resign(folder: Path, **changes: Any) -> None:
    """Make the manifest match the files again, like an attacker who recomputes the hashes."""
    file = folder / bundle.MANIFEST
    manifest = json.loads(file.read_text()) | changes
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["digest"] = digest(manifest)
    file.write_text(json.dumps(manifest))


def edit_program(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / bundle.PROGRAM
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    resign(folder)


def refused(folder: Path, role: str, *words: str) -> str:
    with pytest.raises(BundleError) as caught:
        load_bundle(folder, role)
    message = str(caught.value)
    assert "\n" not in message
    assert "; " in message, "says what to do"
    for word in words:
        assert word in message
    return message


@pytest.mark.parametrize("role", ROLES)
def test_round_trip(tmp_path: Path, role: str) -> None:
    program = tiny(role, stop_tokens=[3], lossy=True)
    loaded = load_bundle(save_bundle(program, tmp_path / role), role)
    assert loaded.role == role
    assert loaded.instructions == program.instructions
    assert loaded.inputs == program.inputs
    assert loaded.outputs == program.outputs
    assert loaded.constants == program.constants
    assert list(loaded.tensors) == [c.name for c in program.constants if c.name in program.tensors]
    for name, tensor in program.tensors.items():
        assert torch.equal(loaded.tensors[name], tensor)
    assert loaded.manifest.stop_tokens == [3]
    assert loaded.manifest.lossy is True
    assert loaded.manifest.model == "tiny"
    assert program_hash(loaded) == program_hash(program) == loaded.manifest.program_hash


def test_a_loaded_bundle_can_be_saved_again(server: Path, tmp_path: Path) -> None:
    again = save_bundle(load_bundle(server, "server"), tmp_path / "again")
    assert read_manifest(again) == read_manifest(server)


def test_the_three_roles_have_one_hash() -> None:
    assert len({program_hash(tiny(role)) for role in ROLES}) == 1


def test_the_hash_sees_ops_literals_and_public_tables_but_not_source_lines() -> None:
    base = program_hash(tiny())
    moved = tiny()
    moved.instructions[2] = dataclasses.replace(moved.instructions[2], source="elsewhere.py:1")
    assert program_hash(moved) == base
    for change in (
        {"target": "mpc.mul"},
        {"args": (Ref("ids"), Ref("head.weight"))},
        {"frac": 15},
        {"vis": Vis.CLIENT},
    ):
        other = tiny()
        other.instructions[2] = dataclasses.replace(other.instructions[2], **change)
        assert program_hash(other) != base
    table = tiny()
    table.tensors["cos"] = table.tensors["cos"] + 1
    assert program_hash(table) != base
    assert program_hash(tiny(fractional_bits=14)) != base


@pytest.mark.parametrize("role", ["client", "dealer"])
def test_no_weight_reaches_client_or_dealer(tmp_path: Path, role: str) -> None:
    folder = save_bundle(tiny(role), tmp_path / role)
    assert set(load_file(folder / bundle.TENSORS)) == {"cos"}


def test_tied_weights_are_stored_once(server: Path) -> None:
    assert "head.weight" not in load_file(server / bundle.TENSORS)
    tensors = load_bundle(server, "server").tensors
    assert tensors["head.weight"].data_ptr() == tensors["embed.weight"].data_ptr()


def test_views_of_one_storage_are_stored_apart(tmp_path: Path) -> None:
    program = tiny("server")
    rows = torch.arange(128.0).reshape(16, 8)
    program.tensors["up.weight"], program.tensors["norm.weight"] = rows[:8], rows[9]
    loaded = load_bundle(save_bundle(program, tmp_path / "s"), "server")
    assert torch.equal(loaded.tensors["up.weight"], rows[:8])
    assert torch.equal(loaded.tensors["norm.weight"], rows[9])
    assert (tmp_path / "s" / bundle.TENSORS).stat().st_size < 2000


def test_extra_files_travel_and_are_checked(tmp_path: Path) -> None:
    source = tmp_path / "vocab.txt"
    source.write_text("a b c")
    folder = save_bundle(
        tiny("client"),
        tmp_path / "client",
        {"tokenizer/vocab.txt": source, "graph.onnx": b"\x08\x0a"},
    )
    assert (folder / "tokenizer/vocab.txt").read_text() == "a b c"
    (folder / "tokenizer/vocab.txt").write_text("a b d")
    refused(folder, "client", "vocab.txt", "SHA-256")


def test_saving_replaces_a_bundle_and_nothing_else(tmp_path: Path) -> None:
    folder = save_bundle(tiny("client"), tmp_path / "b")
    save_bundle(tiny("dealer"), folder)
    assert read_manifest(folder).role == "dealer"
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter1.txt").write_text("years of work")
    with pytest.raises(BundleError, match="not a mergec bundle"):
        save_bundle(tiny("client"), mine)
    assert (mine / "chapter1.txt").read_text() == "years of work"


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError if os.name == "nt" else BundleError):
        save_bundle(tiny("client"), tmp_path / "b", {"x": tmp_path / "is not there"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["/etc/passwd", "../up.txt", "a/../../b", ""])
def test_file_names_stay_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="leads out"):
        save_bundle(tiny("client"), tmp_path / "b", {name: b""})
    folder = save_bundle(tiny("client"), tmp_path / "c")
    files = read_manifest(folder).files | {name: {"bytes": 0, "sha256": ""}}
    manifest = read_manifest(folder).to_dict() | {"files": files}
    manifest["digest"] = digest(manifest)
    (folder / bundle.MANIFEST).write_text(json.dumps(manifest))
    refused(folder, "client", "leads out")


# ------------------------------------------------------------------------------- damaged bundles


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "none", "client", "no such bundle", "mergec compile")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "client", "not a directory")


def test_the_directory_of_all_roles_is_recognized(tmp_path: Path) -> None:
    for role in ROLES:
        save_bundle(tiny(role), tmp_path / role)
    refused(tmp_path, "client", "all roles", str(tmp_path / "client"))


@pytest.mark.parametrize("name", [bundle.MANIFEST, bundle.PROGRAM, bundle.TENSORS])
def test_missing_file(server: Path, name: str) -> None:
    (server / name).unlink()
    refused(server, "server", name, "missing")


@pytest.mark.parametrize("name", [bundle.MANIFEST, bundle.PROGRAM, bundle.TENSORS])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_truncated_file(server: Path, name: str, keep: float) -> None:
    data = (server / name).read_bytes()
    (server / name).write_bytes(data[: int(len(data) * keep)])
    refused(server, "server", name)


@pytest.mark.parametrize("name", [bundle.MANIFEST, bundle.PROGRAM, bundle.TENSORS])
def test_flipped_byte(server: Path, name: str) -> None:
    data = (server / name).read_bytes()
    for place in range(0, len(data), max(1, len(data) // 40)):
        damaged = bytearray(data)
        damaged[place] ^= 4
        (server / name).write_bytes(bytes(damaged))
        if name == bundle.MANIFEST and _same_json(damaged, data):
            continue
        refused(server, "server", "server")


def _same_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def test_garbled_files_that_hash_well(server: Path) -> None:
    good = (server / bundle.PROGRAM).read_bytes()
    (server / bundle.TENSORS).write_bytes(b"\xff" * 64)
    resign(server)
    refused(server, "server", bundle.TENSORS, "not a safetensors file")
    for text, words in {
        "[]": "must be an object",
        "{}": "must have the fields",
        "nonsense": "not JSON",
        "[" * 100_000: "not JSON",
        good.decode().replace("mpc.reveal", "mpc.reveal\xff", 1): "op",
    }.items():
        (server / bundle.PROGRAM).write_text(text)
        resign(server)
        with pytest.raises(BundleError, match=words):
            encoding.decode_program(bundle._read_json(server / bundle.PROGRAM), "server", "x")
            raise BundleError("op; decoded, the op is checked later")


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"format_version": "1"}', '{"a": NaN}'])
def test_garbled_manifest(server: Path, text: str) -> None:
    (server / bundle.MANIFEST).write_text(text)
    refused(server, "server", bundle.MANIFEST)


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(Manifest)])
def test_manifest_without_a_key(server: Path, key: str) -> None:
    manifest = json.loads((server / bundle.MANIFEST).read_text())
    for value in (None, [{}]):
        (server / bundle.MANIFEST).write_text(json.dumps(manifest | {key: value}))
        refused(server, "server", bundle.MANIFEST)


def test_other_version(server: Path) -> None:
    resign(server, format_version=3)
    refused(server, "server", "format version 3", "reads 1 and 2", "compile the model again")


def test_other_role(server: Path) -> None:
    refused(server, "client", "bundle of the server", "this party is the client")


@pytest.mark.parametrize(("option", "values"), CHOICES.items())
def test_unknown_choice(server: Path, option: str, values: tuple[str, ...]) -> None:
    words = f"{option} is 'any'; it can be: {', '.join(values)}"
    resign(server, **{option: "any"})
    refused(server, "server", words)
    with pytest.raises(BundleError, match=words):
        save_bundle(tiny("server", **{option: "any"}), server)


def test_other_ring(server: Path) -> None:
    resign(server, ring_bits=32)
    refused(server, "server", "32 bits")


def test_another_program(server: Path, tmp_path: Path) -> None:
    other = tiny("server")
    other.instructions.insert(5, Instruction("extra", "mpc.silu", (Ref("up"),), {}, Vis.SHARED, 16))
    foreign = save_bundle(other, tmp_path / "other")
    for name in (bundle.PROGRAM, bundle.TENSORS):
        (server / name).write_bytes((foreign / name).read_bytes())
    refused(server, "server", bundle.PROGRAM, "changed")
    resign(server)
    refused(server, "server", bundle.PROGRAM, "has the program hash", "but the manifest lists")


def _first(data: dict[str, Any]) -> dict[str, Any]:
    first: dict[str, Any] = data["instructions"][2]
    return first


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: _first(d).update(target="mpc.launch"), "mpc.launch"),
        (lambda d: _first(d).update(target="os.system"), "os.system"),
        (lambda d: _first(d).update(target="linear"), "the op linear"),
        (lambda d: _first(d).update(target=7), "'target' must be str"),
        (lambda d: _first(d).update(args=[{"ref": "norm"}]), "'norm' before it is defined"),
        (lambda d: _first(d).update(args=[{"ref": "embed"}]), "'embed' before it is defined"),
        (lambda d: _first(d).update(args=[[[{"ref": "no"}]]]), "'no' before it is defined"),
        (lambda d: _first(d).update(args=[{"call": "print"}]), "unknown argument"),
        (lambda d: _first(d).update(args=[{"dtype": "load"}]), "unknown argument"),
        (lambda d: _first(d).update(args=[{"ref": "ids", "x": 1}]), "unknown argument"),
        (lambda d: _first(d).update(args=[{"float": "1"}]), "unknown argument"),
        (lambda d: _first(d).update(args={}), "'args' must be list"),
        (lambda d: _first(d).update(vis="everyone"), "'everyone'"),
        (lambda d: _first(d).update(vis="public"), "makes a secret public"),
        (lambda d: _first(d).update(frac=True), "'frac' must be int"),
        (lambda d: _first(d).pop("frac"), "'frac' is missing"),
        (lambda d: _first(d).update(name="ids"), "'ids' is defined twice"),
        (lambda d: d["instructions"].append(3), "must be an object"),
        (lambda d: d.update(extra=1), "must have the fields"),
        (lambda d: d["outputs"].append("answer"), "'answer' is never computed"),
        (lambda d: d["outputs"].append(None), "outputs must be a list of names"),
        (lambda d: d["outputs"].remove("cache.out"), "which is not an output"),
        (lambda d: d["inputs"][0].update(shape=[1, "future"]), "the shape"),
        (lambda d: d["inputs"][0].update(shape=[-1]), "the shape"),
        (lambda d: d["inputs"][0].update(dtype="string"), "unknown dtype 'string'"),
        (lambda d: d["constants"][0].update(shape=[11, 9]), "instead of float32 [11, 9]"),
        (lambda d: d["constants"][0].update(dtype="int64"), "instead of int64"),
        (lambda d: d["constants"].append(d["constants"][0]), "defined twice"),
        (lambda d: d["constants"].pop(0), "does not declare"),
        (lambda d: d["constants"][0].update(vis="client"), "for the client alone"),
    ],
)
def test_program_that_makes_no_sense(
    server: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    edit_program(server, change)
    refused(server, "server", bundle.PROGRAM, words)


def test_a_weight_in_the_clients_bundle(tmp_path: Path) -> None:
    folder = save_bundle(tiny("client"), tmp_path / "client")
    tensors = load_file(folder / bundle.TENSORS) | {"up.weight": torch.zeros(8, 8)}
    save_file(tensors, folder / bundle.TENSORS)
    resign(folder)
    refused(folder, "client", "'up.weight'", "for the server alone")
    program = tiny("client")
    program.tensors["up.weight"] = torch.zeros(8, 8)
    with pytest.raises(BundleError, match="for the server alone"):
        save_bundle(program, tmp_path / "other")


def test_missing_and_unknown_tensors(server: Path) -> None:
    tensors = load_file(server / bundle.TENSORS)
    tied = {"head.weight": "embed.weight"}
    without = {k: v for k, v in tensors.items() if k != "up.weight"}
    save_file(without, server / bundle.TENSORS, tied)
    resign(server)
    refused(server, "server", "'up.weight' is missing")
    save_file(tensors | {"spare": torch.zeros(1)}, server / bundle.TENSORS, tied)
    resign(server)
    refused(server, "server", "'spare'", "does not declare")
    save_file(tensors, server / bundle.TENSORS, {"head.weight": "nowhere"})
    resign(server)
    refused(server, "server", "nowhere")


def test_words_that_are_not_the_weights(tmp_path: Path) -> None:
    def saved(role: str = "server", words: dict[str, torch.Tensor] | None = None) -> Path:
        given = {name: Content.of(tensor) for name, tensor in (words or {}).items()}
        return save_bundle(tiny(role), tmp_path / role, words=(given, {}))

    fit = {"up.weight": torch.ones(8, 8, dtype=torch.int32)}
    assert set(load_bundle(saved(words=fit), "server").words) == {"up.weight"}
    folder = saved(words={"up.weight": torch.ones(8, 8)})
    refused(folder, "server", bundle.WORDS, "'up.weight' is torch.float32, not integers")
    for words in ({"up.weight": fit["up.weight"][1:]}, {"spare": fit["up.weight"]}):
        refused(saved(words=words), "server", bundle.WORDS, "no weight that this role holds")
    refused(saved("client", fit), "client", bundle.WORDS, "no weight that this role holds")
    refused(saved("dealer", fit), "dealer", bundle.WORDS, "no weight that this role holds")
    folder = saved(words=fit)
    tensors = load_file(folder / bundle.TENSORS)
    tensors["up.weight"] += 1
    save_file(tensors, folder / bundle.TENSORS, {"head.weight": "embed.weight"})
    resign(folder)
    refused(folder, "server", bundle.WORDS, "was made of other weights")
    (folder / bundle.WORDS).write_bytes(b"\xff" * 64)
    resign(folder)
    refused(folder, "server", bundle.WORDS, "not a safetensors file")


def test_files_are_written_as_the_package_writes_them(tmp_path: Path) -> None:
    types = [torch.int64, torch.float64, torch.float32, torch.int32, torch.bfloat16]
    types += [torch.float16, torch.int16, torch.int8, torch.uint8, torch.bool]
    tensors = {f"{n % 3}.{n}": torch.arange(n).to(dtype) for n, dtype in enumerate(types)}
    tensors |= {"empty": torch.zeros(0, 3), "one": torch.tensor(2.5), "ä": torch.ones(3, 2).T}
    contents = {name: Content.of(tensor) for name, tensor in tensors.items()}
    halves = torch.ones(5, 2).split(2)
    contents["pieces"] = Content(torch.int32, (5, 2), lambda: halves)
    tensors["pieces"] = torch.ones(5, 2, dtype=torch.int32)
    for metadata in (None, {"tied": "one"}):
        write_tensors(tmp_path / "ours", contents, metadata)
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, tmp_path / "theirs", metadata)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    short = Content(torch.int32, (6, 2), lambda: halves)
    with pytest.raises(ValueError, match="have 40 bytes"):
        write_tensors(tmp_path / "short", {"short": short})


def test_what_a_program_cannot_hold(tmp_path: Path) -> None:
    program = tiny()
    program.instructions[2] = dataclasses.replace(
        program.instructions[2], args=(Ref("ids"), Ref("embed.weight"), print)
    )
    with pytest.raises(BundleError, match="'embed' has an argument of type builtin_function"):
        save_bundle(program, tmp_path / "b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        3.0,
        -0.1,
        2.0**-149,
        float("inf"),
        float("-inf"),
        "text",
        [1, [2.0, [Ref("x")]]],
        Ref("a.b"),
        -(2**63),
    ],
)
def test_literals(value: object) -> None:
    record = encoding._Record({}, "here", "it")
    encoded = json.loads(json.dumps(encoding.encode_literal(value, "x"), allow_nan=False))
    decoded = encoding.decode_literal(encoded, record)
    assert decoded == value
    assert type(decoded) is type(value)


def test_a_program_of_many_instructions_is_quick(tmp_path: Path) -> None:
    program: RoleProgram = tiny()
    for n in range(2000):
        before = "up" if n == 0 else f"s{n - 1}"
        program.instructions.append(
            Instruction(f"s{n}", "mpc.silu", (Ref(before),), {}, Vis.SHARED, 16)
        )
    loaded = load_bundle(save_bundle(program, tmp_path / "b"), "server")
    assert len(loaded.instructions) == len(program.instructions)


def in_phases(**changes: tuple[list[str], list[str]]) -> RoleProgram:
    """A program whose hidden state is the next input; `changes` replaces a phase's names."""
    program = fixtures.decoder("client")
    hidden = ("embed", "up.truncate")
    given = {spec.name: spec for spec in program.inputs} | {
        name: InputSpec(name, Vis.SHARED, "float32", (1, "new", fixtures.WIDTH)) for name in hidden
    }
    names = {
        "prompt": (["ids", "cache"], ["up.truncate", "cache.out"]),
        "decode": (["embed", "cache"], ["up.truncate", "cache.out"]),
        "finish": (["up.truncate"], ["logits"]),
    } | changes
    program.phases = [
        Phase(name, tuple(given[name] for name in inputs), tuple(outputs))
        for name, (inputs, outputs) in names.items()
    ]
    return program


def test_a_phase_has_all_that_its_instructions_use() -> None:
    validate(in_phases(), "here")
    for phase, inputs, outputs, lacks in (
        ("decode", ["embed"], ["up.truncate", "cache.out"], "cache"),
        ("decode", ["cache"], ["up.truncate", "cache.out"], "ids"),
        ("prompt", ["ids"], ["up.truncate", "cache.out"], "cache"),
        ("finish", ["up.truncate"], ["logits", "answer"], "answer"),
        ("finish", ["up.truncate"], ["cache"], "cache"),
    ):
        with pytest.raises(BundleError, match=f"the phase {phase} lacks '{lacks}'"):
            validate(in_phases(**{phase: (inputs, outputs)}), "here")
