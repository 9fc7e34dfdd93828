"""The bundle of a role on disk: a manifest, the program as JSON, tensors as safetensors.

Nothing in a bundle is executable: no pickle, no code, only names of known ops and literals. A
bundle is written beside its place and moved there whole; it is checked from the outside in when it
is read, so that the first thing that is wrong is named, with the file that holds it.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from runtime.errors import BundleError
from runtime.op import load_all
from runtime.program import (
    FORMAT_VERSION,
    InputSpec,
    Instruction,
    Ref,
    RoleProgram,
    TensorSpec,
)
from runtime.spec import FRACTIONAL_BITS, RING_BITS, ROLES, Vis
from runtime.version import VERSION

MANIFEST, PROGRAM, TENSORS, GRAPH = (
    "manifest.json",
    "program.json",
    "tensors.safetensors",
    "graph.onnx",
)
TOKENIZER = "tokenizer"
"""Folder of the tokenizer's files in a client bundle."""

LENGTHS = frozenset({"new", "past"})
"""The lengths of a step that are known only when it runs."""

DESCRIPTION: dict[str, tuple[type, Any]] = {
    "model": (str, ""),
    "fractional_bits": (int, FRACTIONAL_BITS),
    "max_length": (int, 0),
    "vocab_size": (int, 0),
    "stop_tokens": (list, []),
    "lossy": (bool, False),
    "mode": (str, "mergec"),
    "shapes": (dict, {}),
    "cost": (dict, {}),
    "passes": (list, []),
}
"""What a compiler says of a program in its manifest: type, and the value when it says nothing."""

_COMPUTED: dict[str, type] = {
    "format_version": int,
    "mergec_version": str,
    "torch_version": str,
    "role": str,
    "ring_bits": int,
    "program_hash": str,
    "files": dict,
    "digest": str,
}
_RECOMPILE = "compile the model again"
_COPY = "copy the bundle again, or compile the model again"
_MAY_HOLD = {
    "client": frozenset({Vis.PUBLIC}),
    "server": frozenset({Vis.PUBLIC, Vis.SERVER}),
    "dealer": frozenset({Vis.PUBLIC}),
}


# ------------------------------------------------------------------------------------ writing


Content = bytes | Path | Callable[[Path], bytes]
"""A file of a bundle: its bytes, a file to copy, or what makes it from the bundle's folder."""


def save_bundle(
    program: RoleProgram, path: str | Path, files: Mapping[str, Content] | None = None
) -> Path:
    """Write the bundle of one role; `files` are further ones by their names in the bundle.

    `program.manifest` may hold any key of DESCRIPTION; all others are filled in here. A bundle that
    stands at `path` already is replaced at once, or not at all.
    """
    target = Path(path)
    validate(program, str(target))
    manifest = _describe(program)
    with replacing(target) as folder:
        stored, aliases = _storable(program.tensors)
        save_file(stored, folder / TENSORS, metadata=aliases)
        (folder / PROGRAM).write_text(_pretty(encode_program(program)), encoding="utf-8")
        for name, content in (files or {}).items():
            place = folder / _inside(name, str(target))
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, place)
            else:
                place.write_bytes(content if isinstance(content, bytes) else content(folder))
        manifest["files"] = {
            file.relative_to(folder).as_posix(): {
                "bytes": file.stat().st_size,
                "sha256": _file_digest(file),
            }
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        manifest["digest"] = _digest(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return target


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A fresh folder that takes the place of `path` when the block ends without an error."""
    if path.exists() and not (path.is_dir() and (_is_ours(path) or not any(path.iterdir()))):
        raise BundleError(
            f"{path}: exists and is not a mergec bundle; choose another place or remove it"
        )
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


def role_path(bundle_dir: str | Path, role: str) -> Path:
    """Where the bundle of `role` stands in a directory of all three."""
    return Path(bundle_dir) / role


def program_hash(program: RoleProgram) -> str:
    """SHA-256 of what all roles must agree on; the same for the three bundles of a program.

    Of tensors it covers the public ones. Where an instruction comes from in the user's model is
    for reading only, and is left out.
    """
    encoded = encode_program(program)
    for instruction in encoded["instructions"]:
        del instruction["module"], instruction["source"]
    shared = {
        "format_version": FORMAT_VERSION,
        "ring_bits": RING_BITS,
        "fractional_bits": program.manifest.get("fractional_bits", FRACTIONAL_BITS),
        "public": {
            spec.name: _tensor_digest(program.tensors[spec.name])
            for spec in program.constants
            if spec.vis is Vis.PUBLIC and spec.name in program.tensors
        },
        **encoded,
    }
    return hashlib.sha256(_canonical(shared)).hexdigest()


def _describe(program: RoleProgram) -> dict[str, Any]:
    """The manifest but for the files: given keys checked, others filled in."""
    computed = set(_COMPUTED)
    unknown = sorted(set(program.manifest) - set(DESCRIPTION) - computed)
    if unknown:
        raise BundleError(f"the manifest cannot hold {unknown[0]!r}; known: {list(DESCRIPTION)}")
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "mergec_version": VERSION,
        "torch_version": str(torch.__version__),
        "role": program.role,
        "ring_bits": RING_BITS,
        "program_hash": program_hash(program),
    }
    for key, (kind, default) in DESCRIPTION.items():
        value = program.manifest.get(key, default)
        if not _is(value, kind):
            raise BundleError(f"the manifest's {key} must be {kind.__name__}, not {value!r}")
        manifest[key] = value
    return manifest


def _storable(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors as safetensors takes them, and the names that stand for one stored already.

    Tied weights (an embedding and a head) share memory, and are stored once; the file's metadata
    maps the other names to the stored one.
    """
    stored: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        key = (
            storage.data_ptr(),
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
        )
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        value = tensor.detach().cpu().contiguous()
        if value.untyped_storage().data_ptr() in storages or (
            value.untyped_storage().nbytes() != value.numel() * value.element_size()
        ):
            value = value.clone()
        storages.add(value.untyped_storage().data_ptr())
        stored[name] = value
    return stored, aliases


# ------------------------------------------------------------------------------------ reading


def load_bundle(path: str | Path, role: str) -> RoleProgram:
    """Read the bundle of `role` at `path`, after checking all that it says; BundleError if not."""
    folder = Path(path)
    manifest = read_manifest(folder, role)
    _check_files(folder, manifest)
    where = str(folder / PROGRAM)
    program = decode_program(_read_json(folder / PROGRAM), role, where)
    program.manifest = manifest
    program.tensors = _load_tensors(folder / TENSORS, program)
    validate(program, where)
    found = program_hash(program)
    if found != manifest["program_hash"]:
        raise BundleError(
            f"{where}: is the program {found[:12]}, the manifest speaks of "
            f"{manifest['program_hash'][:12]}; {_RECOMPILE}"
        )
    return program


def read_manifest(path: str | Path, role: str | None = None) -> dict[str, Any]:
    """The manifest of a bundle, checked by itself; the files it lists are not looked at."""
    folder = Path(path)
    if not folder.is_dir():
        what = "is not a directory" if folder.exists() else "no such bundle"
        raise BundleError(f"{folder}: {what}; make one with `mergec compile`")
    file = folder / MANIFEST
    if not file.exists() and any(role_path(folder, r).is_dir() for r in ROLES):
        raise BundleError(
            f"{folder}: holds the bundles of all roles; give one, as {folder / 'client'}"
        )
    manifest = _read_json(file)
    if not isinstance(manifest, dict) or not _is(manifest.get("format_version"), int):
        raise BundleError(f"{file}: is not a mergec manifest; {_COPY}")
    if manifest["format_version"] != FORMAT_VERSION:
        raise BundleError(
            f"{file}: has format version {manifest['format_version']}, this mergec ({VERSION}) "
            f"reads {FORMAT_VERSION}; {_RECOMPILE} with this version"
        )
    kinds = _COMPUTED | {key: kind for key, (kind, _) in DESCRIPTION.items()}
    for key, kind in kinds.items():
        if not _is(manifest.get(key), kind):
            raise BundleError(f"{file}: {key!r} is missing or not {kind.__name__}; {_COPY}")
    if manifest["digest"] != _digest(manifest):
        raise BundleError(f"{file}: does not match its own digest, it was changed; {_COPY}")
    if manifest["role"] not in ROLES:
        raise BundleError(f"{file}: unknown role {manifest['role']!r}; {_RECOMPILE}")
    if role is not None and manifest["role"] != role:
        raise BundleError(
            f"{folder}: is the bundle of the {manifest['role']}, this party is the {role}; "
            f"give the {role}'s bundle"
        )
    if manifest["ring_bits"] != RING_BITS:
        raise BundleError(
            f"{file}: is for a ring of {manifest['ring_bits']} bits, this mergec computes "
            f"with {RING_BITS}; {_RECOMPILE}"
        )
    return manifest


def _check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    for needed in (PROGRAM, TENSORS):
        if needed not in manifest["files"]:
            raise BundleError(f"{folder / MANIFEST}: does not list {needed}; {_RECOMPILE}")
    for name, listed in manifest["files"].items():
        if not isinstance(listed, dict):
            raise BundleError(f"{folder / MANIFEST}: lists {name} without size and hash; {_COPY}")
        file = folder / _inside(name, str(folder / MANIFEST))
        if not file.is_file():
            raise BundleError(f"{file}: is missing; {_COPY}")
        size = file.stat().st_size
        if size != listed.get("bytes"):
            raise BundleError(
                f"{file}: has {size} bytes instead of {listed.get('bytes')}, it was cut or "
                f"changed; {_COPY}"
            )
        if _file_digest(file) != listed.get("sha256"):
            raise BundleError(f"{file}: does not match its SHA-256, it was damaged; {_COPY}")


def _load_tensors(file: Path, program: RoleProgram) -> dict[str, torch.Tensor]:
    try:
        with safe_open(file, framework="pt") as reader:
            aliases = reader.metadata() or {}
            stored = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{file}: is not a safetensors file ({error}); {_COPY}") from error
    tensors = dict(stored)
    for name, other in aliases.items():
        if other not in stored:
            raise BundleError(f"{file}: has no tensor {other!r}, which {name!r} is; {_RECOMPILE}")
        tensors[name] = stored[other]
    return {name: tensors[name] for name in _in_order(program, tensors)}


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
        raise BundleError(f"{file}: is not JSON, it was cut or damaged; {_COPY}") from error


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


# --------------------------------------------------------------------------------- validation


def validate(program: RoleProgram, where: str) -> None:
    """Check a program as a whole: names, ops, shapes, and who may hold what."""
    if program.role not in ROLES:
        raise BundleError(f"{where}: unknown role {program.role!r}; one of {', '.join(ROLES)}")
    _check_tensors(program, where)
    known = _check_values(program, where)
    for output in program.outputs:
        if output not in known:
            raise BundleError(f"{where}: the output {output!r} is never computed; {_RECOMPILE}")
    outputs = set(program.outputs)
    for spec in program.inputs:
        if spec.cache_output is not None and spec.cache_output not in outputs:
            raise BundleError(
                f"{where}: the cache {spec.name!r} continues as {spec.cache_output!r}, which is no "
                f"output; {_RECOMPILE}"
            )


def _check_tensors(program: RoleProgram, where: str) -> None:
    declared = {spec.name: spec for spec in program.constants}
    may_hold = _MAY_HOLD[program.role]
    for name, tensor in program.tensors.items():
        if name not in declared:
            raise BundleError(
                f"{where}: the {program.role}'s bundle holds a tensor {name!r} that the program "
                f"does not declare; {_RECOMPILE}"
            )
        spec = declared[name]
        if spec.vis not in may_hold:
            raise BundleError(
                f"{where}: the {program.role}'s bundle holds {name!r}, which is for the "
                f"{spec.vis.value} alone; do not use it, {_RECOMPILE}"
            )
        if dtype_name(tensor.dtype) != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise BundleError(
                f"{where}: the tensor {name!r} is {dtype_name(tensor.dtype)} "
                f"{list(tensor.shape)} instead of {spec.dtype} {list(spec.shape)}; {_RECOMPILE}"
            )
    for spec in program.constants:
        if spec.vis in may_hold and spec.name not in program.tensors:
            raise BundleError(f"{where}: the tensor {spec.name!r} is missing; {_RECOMPILE}")


def _check_values(program: RoleProgram, where: str) -> dict[str, Vis]:
    """Every value by name; each is defined once, before its use, by an op that is known."""
    known: dict[str, Vis] = {}

    def define(name: str, vis: Vis) -> None:
        if name in known:
            raise BundleError(f"{where}: {name!r} is defined twice; {_RECOMPILE}")
        known[name] = vis

    for constant in program.constants:
        define(constant.name, constant.vis)
    for given in program.inputs:
        define(given.name, given.vis)
    registry = load_all()
    structural = structural_targets()
    for item in program.instructions:
        dialect = item.target.removeprefix("mpc.")
        is_op = dialect != item.target and dialect in registry
        if not is_op and item.target not in structural:
            raise BundleError(
                f"{where}: {item.name!r} needs the op {item.target}, which this mergec "
                f"({VERSION}) does not have; {_RECOMPILE} with this version"
            )
        uses = [ref.name for ref in refs((item.args, item.kwargs))]
        for used in uses:
            if used not in known:
                raise BundleError(
                    f"{where}: {item.name!r} ({item.target}) uses {used!r} before it is defined; "
                    f"{_RECOMPILE}"
                )
        if is_op and item.vis is Vis.PUBLIC and any(known[u] is not Vis.PUBLIC for u in uses):
            raise BundleError(
                f"{where}: {item.name!r} ({item.target}) makes a secret public; do not use it, "
                f"{_RECOMPILE}"
            )
        define(item.name, item.vis)
    return known


def refs(value: object) -> Iterator[Ref]:
    """Every `Ref` in an argument, however deep in lists."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from refs(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from refs(item)


# ----------------------------------------------------------------------------------- encoding


def encode_program(program: RoleProgram) -> dict[str, Any]:
    """The program as JSON values. The role is not part of it: it is in the manifest."""
    return {
        "constants": [
            {"name": c.name, "vis": c.vis.value, "dtype": c.dtype, "shape": list(c.shape)}
            for c in program.constants
        ],
        "inputs": [
            {
                "name": i.name,
                "vis": i.vis.value,
                "dtype": i.dtype,
                "shape": list(i.shape),
                "frac": i.frac,
                "cache_output": i.cache_output,
            }
            for i in program.inputs
        ],
        "instructions": [
            {
                "name": i.name,
                "target": i.target,
                "args": [encode_literal(a, i.name) for a in i.args],
                "kwargs": {k: encode_literal(v, i.name) for k, v in i.kwargs.items()},
                "vis": i.vis.value,
                "frac": i.frac,
                "module": i.module,
                "source": i.source,
            }
            for i in program.instructions
        ],
        "outputs": list(program.outputs),
    }


def decode_program(data: object, role: str, where: str) -> RoleProgram:
    """The inverse of `encode_program`; anything unexpected is named."""
    top = _Record(data, where, "the program")
    top.only("constants", "inputs", "instructions", "outputs")
    constants = [
        TensorSpec(r.text("name"), r.vis(), r.dtype(), cast(tuple[int, ...], r.shape(frozenset())))
        for r in top.records("constants")
    ]
    inputs = []
    for r in top.records("inputs"):
        cache = r.get("cache_output")
        inputs.append(
            InputSpec(
                r.text("name"),
                r.vis(),
                r.dtype(),
                r.shape(LENGTHS),
                r.whole("frac"),
                None if cache is None else r.text("cache_output"),
            )
        )
    instructions = [
        Instruction(
            r.text("name"),
            r.text("target"),
            tuple(decode_literal(a, r) for a in r.items("args")),
            {str(k): decode_literal(v, r) for k, v in r.mapping("kwargs").items()},
            r.vis(),
            r.whole("frac"),
            r.text("module"),
            r.text("source"),
        )
        for r in top.records("instructions")
    ]
    outputs = [o for o in top.items("outputs") if isinstance(o, str)]
    if len(outputs) != len(top.items("outputs")):
        raise top.wrong("outputs must be names")
    return RoleProgram(role, instructions, inputs, outputs, constants)


def encode_literal(value: object, owner: str) -> Any:
    """One argument as a JSON value; `owner` is named when it cannot be."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Ref):
        return {"ref": value.name}
    if isinstance(value, (list, tuple)):
        return [encode_literal(item, owner) for item in value]
    for key, kind, _ in _TAGGED:
        if isinstance(value, kind):
            return {key: str(value).removeprefix("torch.")}
    raise BundleError(
        f"{owner!r} has an argument of type {type(value).__name__}, which a bundle cannot hold: "
        "use numbers, strings, lists, dtypes and references"
    )


def decode_literal(value: Any, owner: _Record) -> Any:
    """The inverse of `encode_literal`; tuples come back as lists."""
    if isinstance(value, list):
        return [decode_literal(item, owner) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((key, text),) = value.items()
        if isinstance(text, str):
            if key == "ref":
                return Ref(text)
            if key == "float" and text in ("inf", "-inf", "nan"):
                return float(text)
            for tag, kind, make in _TAGGED:
                found = make(text) if key == tag else None
                if isinstance(found, kind):
                    return found
    raise owner.wrong(f"unknown argument {json.dumps(value)[:60]}")


def _device(text: str) -> torch.device | None:
    return torch.device(text) if text in ("cpu", "cuda", "meta") else None


def _torch_name(text: str) -> object:
    return getattr(torch, text, None) if text.isidentifier() else None


_TAGGED: tuple[tuple[str, type, Callable[[str], object]], ...] = (
    ("dtype", torch.dtype, _torch_name),
    ("layout", torch.layout, _torch_name),
    ("memory_format", torch.memory_format, _torch_name),
    ("device", torch.device, _device),
)


class _Record:
    """A JSON object whose fields are read with their types checked."""

    def __init__(self, data: object, where: str, what: str) -> None:
        self.where, self.what = where, what
        if not isinstance(data, dict):
            raise self.wrong("must be an object")
        self.data = data
        self.what = f"{what} {data['name']!r}" if isinstance(data.get("name"), str) else what

    def wrong(self, message: str) -> BundleError:
        return BundleError(f"{self.where}: {self.what}: {message}; {_RECOMPILE}")

    def only(self, *keys: str) -> None:
        if set(self.data) != set(keys):
            raise self.wrong(f"must have the fields {', '.join(keys)}")

    def get(self, key: str) -> Any:
        if key not in self.data:
            raise self.wrong(f"the field {key!r} is missing")
        return self.data[key]

    def typed(self, key: str, kind: type) -> Any:
        value = self.get(key)
        if not _is(value, kind):
            raise self.wrong(f"the field {key!r} must be {kind.__name__}")
        return value

    def text(self, key: str) -> str:
        return cast(str, self.typed(key, str))

    def whole(self, key: str) -> int:
        return cast(int, self.typed(key, int))

    def items(self, key: str) -> list[Any]:
        return cast(list[Any], self.typed(key, list))

    def mapping(self, key: str) -> dict[str, Any]:
        return cast(dict[str, Any], self.typed(key, dict))

    def records(self, key: str) -> list[_Record]:
        return [_Record(item, self.where, f"{key}[{n}]") for n, item in enumerate(self.items(key))]

    def vis(self) -> Vis:
        try:
            return Vis(self.get("vis"))
        except ValueError as error:
            raise self.wrong(f"unknown visibility {self.get('vis')!r}") from error

    def dtype(self) -> str:
        name = self.text("dtype")
        if not isinstance(_torch_name(name), torch.dtype):
            raise self.wrong(f"unknown dtype {name!r}")
        return name

    def shape(self, lengths: frozenset[str]) -> tuple[int | str, ...]:
        shape = tuple(self.items("shape"))
        for size in shape:
            if not (_is(size, int) and size >= 0) and not (
                isinstance(size, str) and size in lengths
            ):
                raise self.wrong(f"the shape {list(shape)} is not one")
        return shape


def structural_targets() -> frozenset[str]:
    """The ops beside the `mpc` dialect: views, copies, and arithmetic on public lengths."""
    try:
        from runtime.structural import TABLE
    except ModuleNotFoundError:
        return frozenset()
    return frozenset(TABLE)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as specs write it: `int64`, `float32`."""
    return str(dtype).removeprefix("torch.")


def _is(value: object, kind: type) -> TypeGuard[Any]:
    """isinstance, but a bool is no int."""
    return isinstance(value, kind) and (kind is not int or not isinstance(value, bool))


def _is_ours(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() or any(
        (role_path(folder, role) / MANIFEST).is_file() for role in ROLES
    )


def _inside(name: str, where: str) -> Path:
    """A file name of a manifest; one that leads out of the bundle is refused."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts or "\\" in name:
        raise BundleError(f"{where}: the file name {name!r} leads out of the bundle; {_RECOMPILE}")
    return Path(*parts.parts)


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def _pretty(encoded: Mapping[str, Any]) -> str:
    """One line per record: a program is read and compared by people, too."""
    sections = []
    for key, items in encoded.items():
        lines = ",\n".join(f"  {json.dumps(item, allow_nan=False)}" for item in items)
        sections.append(
            f" {json.dumps(key)}: [\n{lines}\n ]" if items else f" {json.dumps(key)}: []"
        )
    return "{\n" + ",\n".join(sections) + "\n}\n"


def _digest(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(_canonical(rest)).hexdigest()


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _tensor_digest(tensor: torch.Tensor) -> str:
    value = tensor.detach().cpu().contiguous()
    head = f"{dtype_name(value.dtype)} {list(value.shape)} ".encode()
    data = value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return hashlib.sha256(head + data).hexdigest()
