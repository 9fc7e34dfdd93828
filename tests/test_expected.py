"""The program that a client expects: its hash, its tokenizer, and answers of one length."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from mergec import Program
from mergec.compiler.backend.onnx_export import ValueType
from mergec.runtime.cli import run
from mergec.runtime.core.errors import BundleError
from mergec.runtime.core.spec import ROLES
from mergec.runtime.program.bundle import (
    TOKENIZER,
    expect,
    load_bundle,
    read_manifest,
    role_path,
)
from mergec.runtime.program.encoding import program_hash
from mergec.runtime.roles.client import Connection
from mergec.runtime.session.generation import answer
from mergec.runtime.session.text import SETTINGS, TEMPLATE, VOCABULARY
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.connect import Security
from tests import characters, decoder
from tests.fixtures import tiny
from tests.test_bundle import resign
from tests.test_former_bundles import ARCHIVE
from tests.test_generation import Counting

WORD_LENGTHS = "{% for m in messages %}{{ ' ' * (m.content | length) }}{% endfor %}"
"""A chat template that writes its own message: here, of another length than the user's."""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program with a tokenizer and a chat template, as `Program.save` writes it."""
    roles = {role: decoder.program(role, stop_tokens=[characters.STOP]) for role in ROLES}
    types = {name: ValueType("float32", (1, 1)) for name in roles["client"].outputs}
    program = Program(roles, types, characters.files("{{ messages[0].content }}"))
    return program.save(tmp_path_factory.mktemp("expected") / "bundles")


@pytest.fixture
def copy(bundles: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundles, tmp_path / "bundles"))


def connection(bundles: Path, **options: object) -> Connection:
    nowhere = Address("127.0.0.1", 1)
    plain = Security("client", None, plaintext=True)
    given = {"server": nowhere, "dealer": nowhere, "security": plain, **options}
    return Connection(bundles / "client", **given)  # type: ignore[arg-type]


def test_all_roles_have_one_hash_that_covers_the_tokenizer(bundles: Path) -> None:
    manifests = [read_manifest(role_path(bundles, role)) for role in ROLES]
    assert len({manifest.program_hash for manifest in manifests}) == 1
    assert len({manifest.tokenizer for manifest in manifests}) == 1
    assert len(manifests[0].tokenizer) == 64


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer", "ab" * 32),
        ("stop_tokens", [3]),
        ("vocab_size", 5),
        ("max_length", 5),
        ("speculate_up_to", 2),
    ],
)
def test_the_hash_sees_what_decides_lengths(key: str, value: object) -> None:
    assert program_hash(tiny(**{key: value})) != program_hash(tiny())


@pytest.mark.parametrize("name", [VOCABULARY, SETTINGS, TEMPLATE])
def test_another_tokenizer_in_the_bundle_is_refused(copy: Path, name: str) -> None:
    """Even if the manifest lists it: the hash that the other roles have says otherwise."""
    client = copy / "client"
    file = client / TOKENIZER / name
    file.write_text(WORD_LENGTHS if name == TEMPLATE else file.read_text() + " ")
    resign(client)
    with pytest.raises(BundleError, match="is not the tokenizer that the program was compiled"):
        load_bundle(client, "client")


def test_a_digest_for_another_tokenizer_is_another_program(copy: Path) -> None:
    client = copy / "client"
    before = read_manifest(client).program_hash
    resign(client, tokenizer="ab" * 32)
    with pytest.raises(BundleError, match="is not the tokenizer"):
        load_bundle(client, "client")
    resign(client, tokenizer="")
    with pytest.raises(BundleError, match=f"but the manifest lists {before[:12]}"):
        load_bundle(client, "client")


def test_a_file_beside_the_listed_ones_is_refused(copy: Path) -> None:
    (copy / "client" / TOKENIZER / "more.jinja").write_text(WORD_LENGTHS)
    with pytest.raises(BundleError, match=r"more\.jinja: is not listed in manifest\.json"):
        load_bundle(copy / "client", "client")


def test_a_client_expects_a_program(bundles: Path) -> None:
    right = read_manifest(bundles / "client").program_hash
    assert connection(bundles, expected=right.upper()).text is not None
    for wrong in (right[:-1], right[:12], "", "0" * 64, "x\n" * 999):
        with pytest.raises(BundleError, match="is expected; ask its owner") as caught:
            connection(bundles, expected=wrong)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


def test_a_hash_of_a_former_version_is_not_enough(tmp_path: Path) -> None:
    """It covers no stop tokens, so whoever changes these decides how long answers are."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    client = tmp_path / "bundles-0.1.0" / "client"
    right = read_manifest(client).program_hash
    resign(client, stop_tokens=[3, 4, 5])
    manifest = read_manifest(client)
    assert manifest.program_hash == right
    assert load_bundle(client, "client").manifest.stop_tokens == [3, 4, 5]
    for own in (False, True):
        with pytest.raises(BundleError, match="has format version 1, whose hash covers neither"):
            expect(manifest, right, own_tokenizer=own)


def test_a_hash_that_covers_no_tokenizer_is_not_enough() -> None:
    """With a tokenizer of one's own it is."""
    manifest = tiny(program_hash="ab").manifest
    expect(manifest, "ab")  # it has no tokenizer at all
    named = {f"{TOKENIZER}/{VOCABULARY}": {"bytes": 1, "sha256": ""}}
    object.__setattr__(manifest, "files", named)
    with pytest.raises(BundleError, match="does not cover the tokenizer"):
        expect(manifest, "ab")
    expect(manifest, "ab", own_tokenizer=True)


@pytest.mark.parametrize("name", [TOKENIZER, f"{TOKENIZER}/{TEMPLATE}", f"{TOKENIZER}/more"])
def test_links_in_a_tokenizer_are_refused(copy: Path, tmp_path: Path, name: str) -> None:
    """Also those that lead to the same content, and to folders."""
    place, outside = copy / "client" / name, tmp_path / "outside"
    if place.exists():
        place.rename(outside)
    else:
        outside.mkdir()
        (outside / "additional_chat_templates").write_text(WORD_LENGTHS)
    place.symlink_to(outside)
    with pytest.raises(BundleError, match=f"{name}: is a symbolic link; put the file itself"):
        load_bundle(copy / "client", "client")


def test_a_tokenizer_of_ones_own(bundles: Path, tmp_path: Path) -> None:
    files = characters.files()
    text = files[VOCABULARY].decode()
    (tmp_path / "mine.json").write_text(text)
    own = connection(bundles, tokenizer=tmp_path / "mine.json").text
    assert own is not None
    assert not own.has_chat  # the bundle's template is not used
    theirs = connection(bundles).text
    assert theirs is not None
    assert theirs.has_chat
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in characters.files("{{ messages[0].content }}").items():
        (folder / name).write_bytes(content)
    again = connection(bundles, tokenizer=folder).text
    assert again is not None
    assert again.has_chat
    for place in (tmp_path / "nothing", bundles):
        with pytest.raises(BundleError, match=r"has no tokenizer\.json"):
            connection(bundles, tokenizer=place)
    (tmp_path / "bad.json").write_text(json.dumps({}))
    with pytest.raises(BundleError, match="cannot be read"):
        connection(bundles, tokenizer=tmp_path / "bad.json")


def test_a_program_takes_both(bundles: Path, tmp_path: Path) -> None:
    program = Program.load(bundles)
    program.check(program.manifest.program_hash)
    with pytest.raises(BundleError, match="is expected"):
        program.check("0" * 64)
    (tmp_path / "mine.json").write_bytes(characters.files()[VOCABULARY])
    program.check(None, tmp_path / "mine.json")
    assert not program.text().has_chat


def test_the_commands_take_both(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import mergec.compiler.cli  # noqa: F401  (registers `run`)

    client = str(bundles / "client")
    for arguments in (
        ["run", str(bundles), "--prompt", "a"],
        ["generate", client, "--plaintext", "--prompt", "a"],
        ["chat", client, "--plaintext"],
        ["proxy", client, "--plaintext", "--port", "0"],
    ):
        assert run([*arguments, "--expect", "0" * 64]) == 1
        assert "is expected; ask its owner" in " ".join(capsys.readouterr().err.split())
        assert run([*arguments, "--tokenizer", "/nowhere"]) == 1
        assert "has no tokenizer.json" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("cached", [True, False])
def test_an_answer_of_fixed_length_takes_all_steps(cached: bool) -> None:
    steps: list[list[tuple[int, int]]] = []
    for stop in ([], [5], [3]):
        session, told = Counting(cached=cached), []
        found = answer(
            session,
            [1, 2],
            max_tokens=5,
            stop=stop,
            fixed_length=True,
            announce=lambda new, past, told=told: told.append((new, past)),  # type: ignore[misc]
        )
        tokens = [token.token for token in found]
        assert tokens == list(range(3, stop[0] + 1 if stop else 8))
        steps.append(told)
    assert steps[0] == steps[1] == steps[2]
    assert len(steps[0]) == 5
