"""The public interface, the content of a wheel, and that a checkout loads each module once."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mergec

ROOT = Path(__file__).resolve().parents[1]
SITE = Path(sysconfig.get_path("purelib"))
FOLDERS = ("compiler", "passes", "runtime")
EXTRAS = ("accelerate", "fast_sugiyama", "fastapi", "gguf", "onnx", "transformers", "uvicorn")
"""Packages of the extras `compile` and `proxy`."""
DATA = (
    "py.typed",
    *("compiler/report/page.html", "compiler/report/page.css", "compiler/report/page.js"),
    "runtime/proxy/page.html",
)


def python(code: str, *, cwd: Path = ROOT, interpreter: str = sys.executable) -> str:
    """What `code` prints, run from `cwd` by an interpreter that sees nothing of this checkout."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [interpreter, "-c", code],
        cwd=cwd,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# The public face.

BLOCK = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""

REFUSED = """
try:
    mergec.compile_decoder(None)
except mergec.MergecError as error:
    print(error)
"""

REFUSAL = (
    "compile_decoder needs the package 'onnx', which is not installed here; install mergec[compile]"
)


def test_every_public_name_is_there_and_documented() -> None:
    for name in mergec.__all__:
        value = getattr(mergec, name)
        assert name == "__version__" or value.__doc__, name
    assert dir(mergec) == sorted(mergec.__all__)
    assert not hasattr(mergec, "compile")


def test_importing_it_loads_no_torch() -> None:
    print_loaded = "import sys, mergec; dir(mergec); print(*sys.modules)"
    loaded = set(python(print_loaded).split())
    assert "mergec" in loaded
    assert not loaded & {"torch", "numpy", "numba", "mergec.compiler", "mergec.passes", *EXTRAS}


def test_without_the_extras_every_name_is_there_and_a_call_says_what_is_missing() -> None:
    said = python(
        f"{BLOCK}\nfrom mergec import *\nprint(Pass, Op, Program)\nimport mergec{REFUSED}"
    )
    assert said.splitlines()[1:] == [REFUSAL]


def test_a_missing_module_of_our_own_is_not_taken_for_an_extra() -> None:
    said = python(
        "import sys, mergec\n"
        "sys.modules['mergec.compiler.driver'] = None\n"
        "try:\n    mergec.compile_decoder\n"
        "except ModuleNotFoundError as error:\n    print(error.name)"
    )
    assert said == "mergec.compiler.driver"


# What is installed.


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, because an earlier `build` folder would be packed too."""
    copy = tmp_path_factory.mktemp("source") / "mergec"
    away = shutil.ignore_patterns(
        *(".git", ".venv", ".nox", ".*_cache", "__pycache__", "*.egg-info"),
        *("build", "dist", "bundles", "site", "tests", "results"),
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=away)
    return copy


def built(kind: str, source: Path, to: Path) -> Path:
    """A wheel or sdist, made by the backend that pyproject.toml names."""
    name = python(
        f"from setuptools import build_meta; print(build_meta.build_{kind}({str(to)!r}))",
        cwd=source,
    )
    return to / name.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("wheel", source, tmp_path_factory.mktemp("wheel"))


def contents(wheel: Path) -> dict[str, int]:
    """Name and checksum of each file."""
    with zipfile.ZipFile(wheel) as archive:
        found = archive.infolist()
        assert not [info for info in found if info.external_attr >> 16 & 0o170000 == 0o120000]
        names = {info.filename: info.CRC for info in found if not info.filename.endswith("RECORD")}
        assert len(names) == len(found) - 1, "a file is in the wheel twice"
        return names


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_bytes(archive.read(name))


def test_the_wheel_has_one_package_and_every_file_once(wheel: Path) -> None:
    names = contents(wheel)
    assert {name.split("/")[0] for name in names} == {
        "mergec",
        f"mergec-{mergec.__version__}.dist-info",
    }
    modules = {
        f"mergec/{file.relative_to(ROOT)}"
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("*.py")
    }
    modules |= {f"mergec/{file.name}" for file in (ROOT / "mergec").glob("*.py")}
    data = {f"mergec/{name}" for name in DATA}
    assert {name for name in names if name.startswith("mergec/")} == modules | data


def test_the_sdist_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    sdist = built("sdist", source, tmp_path)
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        archive.extractall(tmp_path, filter="data")
    again = built("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path)
    assert contents(again) == contents(wheel)


def installed(wheel: Path, folder: Path, packages: Path) -> Path:
    """Install a wheel into a new environment that takes all else from `packages`; its Python."""
    venv.create(folder, symlinks=os.name != "nt")
    binaries = folder / ("Scripts" if os.name == "nt" else "bin")
    interpreter = binaries / Path(sys.executable).name
    pip = (sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--quiet")
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True, timeout=120)
    [site] = {*(folder / "lib").glob("python*/site-packages"), *folder.glob("Lib/site-packages")}
    # Files of this kind in `packages` are not read, so neither is that of an editable mergec.
    (site / "others.pth").write_text(f"{packages}\n")
    assert {entry.name for entry in site.iterdir()} == {
        "mergec",
        f"mergec-{mergec.__version__}.dist-info",
        "others.pth",
    }
    return interpreter


SCRIPT = """
import importlib.metadata, sys
import torch
import compiler, passes, runtime
import mergec
from mergec import CompileConfig, Op, Pass, Program, compile_decoder

class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8)
    def forward(self, ids):
        return self.head(self.table(ids))

assert compiler.MINE and passes.MINE and runtime.MINE
program = compile_decoder(Tiny(), config=CompileConfig(max_length=8))
program.save("bundles")
assert isinstance(Program.load("bundles"), Program)
assert issubclass(Op, object) and issubclass(Pass, object)
page = program.to_html(new=1, past=0)
assert page.startswith("<!doctype html>")
assert importlib.metadata.version("mergec") == mergec.__version__
print(mergec.__file__)
"""


def test_a_wheel_works_beside_scripts_of_the_same_names(wheel: Path, tmp_path: Path) -> None:
    interpreter = installed(wheel, tmp_path / "environment", SITE)
    work = tmp_path / "work"
    work.mkdir()
    for name in FOLDERS:
        (work / f"{name}.py").write_text("MINE = True\n")
    (work / "script.py").write_text(SCRIPT)
    said = python("import script", cwd=work, interpreter=str(interpreter))
    assert Path(said.splitlines()[-1]).is_relative_to(tmp_path / "environment")
    for command in ((str(interpreter.with_name("mergec")),), (str(interpreter), "-m", "mergec")):
        for option, text in (("--version", f"mergec {mergec.__version__}"), ("--help", "compile")):
            done = subprocess.run(
                [*command, option], cwd=work, capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 0, done.stderr
            assert text in done.stdout


def required(names: list[str]) -> set[str]:
    """The distributions that these require, directly or indirectly."""
    found: set[str] = set()
    while names:
        requirement = Requirement(names.pop())
        name = canonicalize_name(requirement.name)
        marker = requirement.marker
        if name in found or not (marker is None or marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        names += importlib.metadata.requires(name) or []
    return found


@pytest.mark.slow
def test_a_party_needs_no_more_than_the_requirements(wheel: Path, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in required(metadata(wheel).get_all("Requires-Dist") or []):
        distribution = importlib.metadata.distribution(name)
        for file in distribution.files or ():
            place = packages / file.parts[0]
            if file.parts[0] != ".." and not place.exists():
                place.symlink_to(
                    distribution.locate_file(file.parts[0]), file.parts[0][-3:] != ".py"
                )
    interpreter = str(installed(wheel, tmp_path / "environment", packages))
    assert not (packages / "transformers").exists()
    said = python(
        "import mergec, mergec.runtime.roles.party\n"
        "from mergec.compiler.cli import main\n"
        f"print(mergec.__file__){REFUSED}",
        cwd=tmp_path,
        interpreter=interpreter,
    )
    place, refusal = said.splitlines()
    assert Path(place).is_relative_to(tmp_path)
    assert refusal == REFUSAL


# In a checkout.


@pytest.mark.slow
def test_every_module_is_loaded_once() -> None:
    """Under its name with the prefix and without it, whichever is imported first."""
    said = python(
        "import importlib, pkgutil, sys, warnings\n"
        "from pathlib import Path\n"
        "warnings.simplefilter('ignore')\n"
        "import runtime, mergec\n"
        "walk = pkgutil.walk_packages(mergec.__path__, 'mergec.')\n"
        "names = [found.name for found in walk if not found.name.endswith('__main__')]\n"
        "for number, name in enumerate(names):\n"
        "    pair = [name, name.removeprefix('mergec.')]\n"
        f"    if pair[1].split('.')[0] not in {FOLDERS!r}:\n"
        "        pair.pop()\n"
        "    same = set(map(importlib.import_module, pair[:: (-1) ** number]))\n"
        "    assert len(same) == 1, name\n"
        "files = {}\n"
        "for module in set(sys.modules.values()):\n"
        "    if str(getattr(module, '__name__', '')).split('.')[0] == 'mergec':\n"
        "        files.setdefault(Path(module.__file__).resolve(), []).append(module)\n"
        "print(len(names), max(map(len, files.values())), len(files))\n"
    )
    names, most, files = map(int, said.split())
    assert most == 1
    assert files == names + 1
    assert names > 100


@pytest.mark.slow
def test_coverage_tells_of_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import mergec.runtime.core.spec, runtime.core.errors\n"
        "runtime.core.errors.LimitError('later', 1)\n"
    )
    coverage = (sys.executable, "-m", "coverage")
    data = f"--data-file={tmp_path / 'data'}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in (
        ("run", data, str(tmp_path / "script.py")),
        ("combine", data, "--quiet"),
        ("json", data, "--quiet", "-o", str(tmp_path / "report.json")),
    ):
        subprocess.run([*coverage, *command], cwd=ROOT, env=environment, check=True, timeout=120)
    report = json.loads((tmp_path / "report.json").read_text())["files"]
    told = [file for file in report if file.endswith("core/errors.py")]
    assert told == ["runtime/core/errors.py"]
    assert report["runtime/core/errors.py"]["summary"]["percent_covered"] > 80
    assert report["compiler/driver.py"]["summary"]["covered_lines"] == 0
    assert not [file for file in report if file.startswith(("tests", "mergec/runtime"))]
