"""The bundle of a role on disk: a manifest, the program as JSON, tensors as safetensors.

Nothing in a bundle is executable: no pickle, no code, only literals and names of installed ops. A
bundle is written to a temporary folder and then renamed, so it is never incomplete. It is checked
from the outside in when it is read, so that the error names the first fault and its file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mergec.runtime.core.errors import BundleError
from mergec.runtime.core.memory import WordsFile
from mergec.runtime.core.spec import CLIENT, RING_BITS, ROLES, SERVER
from mergec.runtime.core.version import VERSION
from mergec.runtime.program.encoding import (
    RECOMPILE,
    decode_program,
    encode_program,
    program_hash,
)
from mergec.runtime.program.json_values import is_a
from mergec.runtime.program.manifest import (
    FORMAT_VERSION,
    READABLE_VERSIONS,
    Manifest,
    digest,
    tokenizer_digest,
)
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.program.tensor_file import Content, places, write_tensors
from mergec.runtime.program.validate import validate

MANIFEST, PROGRAM, TENSORS, WORDS, GRAPH = (
    "manifest.json",
    "program.json",
    "tensors.safetensors",
    "words.safetensors",
    "graph.onnx",
)
TOKENIZER = "tokenizer"
"""Folder of the tokenizer's files in a client bundle."""

_OF = "SHA-256 of the tensors"
"""Key in the metadata of words; no constant has such a name."""

_COPY = "copy the bundle again, or compile the model again"


# ------------------------------------------------------------------------------------ writing


File = bytes | Path | Callable[[Path], bytes]
"""A file of a bundle: its bytes, a file to copy, or a function of the bundle's folder."""


def save_bundle(
    program: RoleProgram,
    path: str | Path,
    files: Mapping[str, File] | None = None,
    words: tuple[Mapping[str, Content], Mapping[str, str]] | None = None,
) -> Path:
    """Write the bundle of one role to the folder `path`, and return the folder.

    files: further files, by their names in the bundle. words: the server's weights as integers, as
    `engine.weights.words_to_store` returns them; a server encodes them itself if there are none.
    Afterwards `program.manifest` is the manifest that was written. An existing bundle at `path` is
    replaced as a whole, or not at all. Raises BundleError if the program is invalid or the folder
    cannot be written.
    """
    target = Path(path)
    validate(program, str(target))
    # Generated files may depend on it, as the ONNX graph does.
    manifest = program.manifest = complete(program)
    with replacing(target) as folder:
        write_tensors(folder / TENSORS, *_storable(program.tensors))
        if words and words[0]:
            made_of = {_OF: _file_digest(folder / TENSORS)}
            write_tensors(folder / WORDS, words[0], {**words[1], **made_of})
        (folder / PROGRAM).write_text(_pretty(encode_program(program)), encoding="utf-8")
        for name, content in (files or {}).items():
            place = folder / _inside(name, str(target))
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, place)
            else:
                place.write_bytes(content if isinstance(content, bytes) else content(folder))
        listed = {
            file.relative_to(folder).as_posix(): {
                "bytes": file.stat().st_size,
                "sha256": _file_digest(file),
            }
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        manifest = replace(manifest, files=listed)
        manifest = replace(manifest, digest=digest(manifest.to_dict()))
        text = json.dumps(manifest.to_dict(), indent=1)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    program.manifest = manifest
    return target


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A fresh folder that replaces `path` when the block ends without an error."""
    check_place(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise BundleError(
            f"{path}: cannot be written ({error.strerror}); choose another place"
        ) from error
    old = fresh.with_name(fresh.name + ".old")
    try:
        fresh.chmod(0o755)
        yield fresh
        if path.exists():
            path.rename(old)
        fresh.rename(path)
    except OSError as error:
        if old.exists() and not path.exists():
            old.rename(path)
        raise BundleError(
            f"{path}: cannot be written ({error.strerror or error}); free some space or choose "
            "another place"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_place(path: Path) -> None:
    """Raise BundleError if a bundle cannot be written to `path`, or would replace something else.

    Something that exists there must be a bundle or an empty folder.
    """
    above = path.absolute()
    while not above.exists():
        above = above.parent
    if not (above.is_dir() or above == path.absolute()):
        raise BundleError(f"{path}: cannot be written: {above} is not a folder")
    if not os.access(above, os.W_OK):
        raise BundleError(f"{path}: cannot be written: no permission to write to {above}")
    if path.exists() and not (path.is_dir() and (_is_ours(path) or not any(path.iterdir()))):
        raise BundleError(
            f"{path}: exists and is not a mergec bundle; choose another place or remove it"
        )


def role_path(bundle_dir: str | Path, role: str) -> Path:
    """The path of the bundle of `role` in a directory that contains all three."""
    return Path(bundle_dir) / role


def complete(program: RoleProgram) -> Manifest:
    """The manifest with the fields that follow from the program; `files` and `digest` are empty."""
    return replace(
        program.manifest,
        mergec_version=VERSION,
        torch_version=str(torch.__version__),
        role=program.role,
        ring_bits=RING_BITS,
        program_hash=program_hash(program, FORMAT_VERSION),
        files={},
        digest="",
    )


def _storable(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, Content], dict[str, str]]:
    """Tensors to write, and names of tensors that are stored under another name.

    Tied weights (an embedding and a head) share memory and are stored once; the file's metadata
    maps the other names to the stored one.
    """
    stored: dict[str, Content] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        key = (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
        )
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            stored[name] = Content.of(tensor)
    return stored, aliases


# ------------------------------------------------------------------------------------ reading


def load_bundle(path: str | Path, role: str) -> RoleProgram:
    """Read the bundle of `role` at `path`; checks everything before anything is used.

    Raises BundleError at the first fault, with one line that names the file.
    """
    folder = Path(path)
    manifest = read_manifest(folder, role)
    _check_files(folder, manifest)
    _check_tokenizer(folder, manifest)
    where = str(folder / PROGRAM)
    program = decode_program(_read_json(folder / PROGRAM), role, where)
    program.manifest = manifest
    program.tensors = _load_tensors(folder / TENSORS, program)
    validate(program, where)
    program.words, program.words_file = _load_words(folder, program)
    found = program_hash(program)
    if found != manifest.program_hash:
        raise BundleError(
            f"{where}: has the program hash {found[:12]}, but the manifest lists "
            f"{manifest.program_hash[:12]}; {RECOMPILE}"
        )
    return program


def expect(manifest: Manifest, wanted: str, own_tokenizer: bool = False) -> None:
    """Raise BundleError unless the program is the one whose hash a user expects.

    wanted: the hash, in full. own_tokenizer: the user brings a tokenizer, so one in the bundle that
    the hash does not cover does not matter. A hash of format version 1 covers nothing that decides
    how long an answer is, so no such bundle is the expected one.
    """
    if manifest.program_hash != wanted.lower():
        raise BundleError(
            f"the bundle is of program {manifest.program_hash}, but {wanted[:80]!r} is "
            "expected; ask its owner, and do not use it until you know why"
        )
    if manifest.format_version == 1:
        raise BundleError(
            "the bundle has format version 1, whose hash covers neither the tokenizer nor the stop "
            f"tokens, so no program can be expected; {RECOMPILE}"
        )
    covered = manifest.tokenizer or not any(name.startswith(TOKENIZER) for name in manifest.files)
    if not covered and not own_tokenizer:
        raise BundleError(
            "the program's hash does not cover the tokenizer in the bundle; compile the model "
            "again, or give a tokenizer of your own"
        )


def check_alike(path: str | Path) -> None:
    """Compare the programs of all bundles in a folder, as one of them is shown for all.

    Raises BundleError if they differ.
    """
    folders = {role: role_path(path, role) for role in ROLES}
    hashes = {
        role: read_manifest(folder, role).program_hash
        for role, folder in folders.items()
        if (folder / MANIFEST).is_file()
    }
    if len(set(hashes.values())) > 1:
        listed = ", ".join(f"{role} {value[:12]}" for role, value in hashes.items())
        raise BundleError(
            f"{path}: the bundles are of different programs ({listed}); compile again"
        )


def read_manifest(path: str | Path, role: str | None = None) -> Manifest:
    """The manifest of the bundle at `path`, checked without reading the other files.

    Raises BundleError, with one line that names the file, if there is no bundle, if it has another
    role than `role`, another format version or another ring, or if the manifest was changed.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is not a directory" if folder.exists() else "no such bundle"
        raise BundleError(f"{folder}: {what}; make one with `mergec compile`")
    file = folder / MANIFEST
    if not file.exists() and any(role_path(folder, r).is_dir() for r in ROLES):
        raise BundleError(
            f"{folder}: contains the bundles of all roles; name one of them, as {folder / 'client'}"
        )
    data = _read_json(file)
    if not isinstance(data, dict) or not is_a(data.get("format_version"), int):
        raise BundleError(f"{file}: is not a mergec manifest; {_COPY}")
    if data["format_version"] not in READABLE_VERSIONS:
        raise BundleError(
            f"{file}: has format version {data['format_version']}, but this mergec ({VERSION}) "
            f"reads {' and '.join(map(str, READABLE_VERSIONS))}; {RECOMPILE} with this version"
        )
    try:
        manifest = Manifest.from_dict(data)
    except BundleError as error:
        raise BundleError(f"{file}: {error}; {_COPY}") from error
    if manifest.digest != digest(data):
        raise BundleError(f"{file}: does not match its own digest, so it was changed; {_COPY}")
    if manifest.role not in ROLES:
        raise BundleError(f"{file}: unknown role {manifest.role!r}; {RECOMPILE}")
    if role is not None and manifest.role != role:
        raise BundleError(
            f"{folder}: is the bundle of the {manifest.role}, but this party is the {role}; "
            f"use the {role}'s bundle"
        )
    if manifest.ring_bits != RING_BITS:
        raise BundleError(
            f"{file}: is for a ring of {manifest.ring_bits} bits, but this mergec uses "
            f"{RING_BITS}; {RECOMPILE}"
        )
    return manifest


def _check_files(folder: Path, manifest: Manifest) -> None:
    for needed in (PROGRAM, TENSORS):
        if needed not in manifest.files:
            raise BundleError(f"{folder / MANIFEST}: does not list {needed}; {RECOMPILE}")
    for name, listed in manifest.files.items():
        if not isinstance(listed, dict):
            raise BundleError(f"{folder / MANIFEST}: lists {name} without size and hash; {_COPY}")
        file = folder / _inside(name, str(folder / MANIFEST))
        if not file.is_file():
            raise BundleError(f"{file}: is missing; {_COPY}")
        size = file.stat().st_size
        if size != listed.get("bytes"):
            raise BundleError(
                f"{file}: has {size} bytes instead of {listed.get('bytes')}, so it was cut or "
                f"changed; {_COPY}"
            )
        if _file_digest(file) != listed.get("sha256"):
            raise BundleError(f"{file}: does not match its SHA-256, so it was damaged; {_COPY}")


def _check_tokenizer(folder: Path, manifest: Manifest) -> None:
    """The tokenizer must be the one of the program hash, and none of its files unlisted.

    A link could lead to another file later, or to a folder whose files are not looked at here.
    """
    prefix = f"{TOKENIZER}/"
    for file in [folder / TOKENIZER, *sorted((folder / TOKENIZER).rglob("*"))]:
        if file.is_symlink():
            raise BundleError(f"{file}: is a symbolic link; put the file itself there, or {_COPY}")
        if file.is_file() and file.relative_to(folder).as_posix() not in manifest.files:
            raise BundleError(f"{file}: is not listed in {MANIFEST}; remove it, or {_COPY}")
    if manifest.role != ROLES[CLIENT] or not manifest.tokenizer:
        return
    found = tokenizer_digest(
        {
            name.removeprefix(prefix): listed["sha256"]
            for name, listed in manifest.files.items()
            if name.startswith(prefix)
        }
    )
    if found != manifest.tokenizer:
        raise BundleError(
            f"{folder / TOKENIZER}: is not the tokenizer that the program was compiled with; "
            f"{_COPY}"
        )


def _load_tensors(file: Path, program: RoleProgram) -> dict[str, torch.Tensor]:
    tensors, aliases = _read_tensors(file)
    tensors |= _tied(file, tensors, aliases)
    return {name: tensors[name] for name in _in_order(program, tensors)}


def _load_words(
    folder: Path, program: RoleProgram
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], WordsFile | None]:
    """The weights as integers, each with the tensor that it was made of, and the file from which
    they are mapped; none if none are stored."""
    file, listed = folder / WORDS, program.manifest.files
    if WORDS not in listed:
        return {}, None
    words, metadata, mapped = _map_words(file)
    if metadata.pop(_OF, None) != listed[TENSORS]["sha256"]:
        raise BundleError(f"{file}: was made of other weights than {TENSORS}; {RECOMPILE}")
    words |= _tied(file, words, metadata)
    found = {}
    for name, tensor in words.items():
        source = program.tensors.get(name)
        if program.role != ROLES[SERVER] or source is None or source.shape != tensor.shape:
            raise BundleError(f"{file}: {name!r} is no weight that this role holds; {RECOMPILE}")
        if tensor.dtype not in (torch.int32, torch.int64):
            raise BundleError(f"{file}: {name!r} is {tensor.dtype}, not integers; {RECOMPILE}")
        found[name] = source, tensor
    return found, mapped


def _map_words(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str], WordsFile]:
    """As `_read_tensors`, in one mapping, which the ranks of a party can share; and that."""
    with _safetensors(file):
        with safe_open(file, framework="pt") as reader:  # checks it
            metadata = dict(reader.metadata() or {})
        mapped = WordsFile.open(file)
        found = {
            name: mapped.words(place.start, place.shape, place.dtype)
            for name, place in places(file).items()
        }
    return found, metadata, mapped


def words_watch(folder: Path) -> Callable[[], bool]:
    """A check that nobody has written to the mapped words of a bundle since this call.

    A mapping shows what is written to its file. A bundle that replaces this one as a whole, as
    `save_bundle` writes it, is in other files and changes nothing. Call this before `load_bundle`.
    """
    try:
        descriptor = os.open(folder / WORDS, os.O_RDONLY)
    except OSError:
        return lambda: True  # none are mapped; `load_bundle` knows whether there should be some
    then = _written(descriptor)
    return lambda: _written(descriptor) == then


def _written(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns


def _read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a file by name, each mapped from it; and the file's metadata."""
    with _safetensors(file):
        with safe_open(file, framework="pt") as reader:
            metadata = dict(reader.metadata() or {})
            names = reader.keys()
        return {name: _load_tensor(file, name) for name in names}, metadata


@contextmanager
def _safetensors(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise BundleError(f"{file}: is not a safetensors file ({error}); {_COPY}") from error


def _tied(
    file: Path, stored: Mapping[str, torch.Tensor], aliases: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """The tensors that are stored under another name, by their own."""
    for name, other in aliases.items():
        if other not in stored:
            raise BundleError(
                f"{file}: has no tensor {other!r}, to which {name!r} is tied; {RECOMPILE}"
            )
    return {name: stored[other] for name, other in aliases.items()}


def _load_tensor(file: Path, name: str) -> torch.Tensor:
    """One tensor in its own memory mapping, so that dropping the tensor frees its pages."""
    with safe_open(file, framework="pt") as reader:
        tensor: torch.Tensor = reader.get_tensor(name)
    return tensor


def _in_order(program: RoleProgram, tensors: Mapping[str, Any]) -> list[str]:
    """Tensor names in the order of the program's constants, unknown ones last."""
    declared = [spec.name for spec in program.constants if spec.name in tensors]
    return declared + sorted(set(tensors) - set(declared))


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except FileNotFoundError as error:
        raise BundleError(f"{file}: is missing; {_COPY}") from error
    except OSError as error:
        raise BundleError(f"{file}: cannot be read ({error.strerror}); check the file") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file}: is not JSON, so it was cut or damaged; {_COPY}") from error


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _is_ours(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() or any(
        (role_path(folder, role) / MANIFEST).is_file() for role in ROLES
    )


def _inside(name: str, where: str) -> Path:
    """The path of a file that a manifest names; BundleError if it is outside of the bundle."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts or "\\" in name:
        raise BundleError(f"{where}: the file name {name!r} leads out of the bundle; {RECOMPILE}")
    return Path(*parts.parts)


def _pretty(encoded: Mapping[str, Any]) -> str:
    """JSON with one line per record, because people read and compare programs too."""
    sections = []
    for key, items in encoded.items():
        lines = ",\n".join(f"  {json.dumps(item, allow_nan=False)}" for item in items)
        sections.append(
            f" {json.dumps(key)}: [\n{lines}\n ]" if items else f" {json.dumps(key)}: []"
        )
    return "{\n" + ",\n".join(sections) + "\n}\n"


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
