"""The files about the project agree with each other and with the code."""

from __future__ import annotations

import configparser
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mergec import __version__
from mergec.runtime.program.manifest import FORMAT_VERSION
from mergec.runtime.session.hello import PROTOCOL_VERSION
from mergec.runtime.session.stores.format import FORMAT as STORE_FORMAT
from tests.test_layers import FLOORS

ROOT = Path(__file__).resolve().parents[1]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_changelog_keeps_its_form() -> None:
    headings = re.findall(r"^## (.*)$", text("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert headings[-1] == "What a version promises"
    releases = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d", h) for h in headings[1:-1]]
    assert all(releases)
    assert releases[0][1] == __version__, "a release needs a section of its own"
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    entries = text("CHANGELOG.md").partition("## What a version promises")[0]
    assert set(re.findall(r"^### (.*)$", entries, re.MULTILINE)) <= kinds


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["version"] == __version__
    assert f"[{__version__}] - {citation['date-released']}" in text("CHANGELOG.md")
    assert citation["preferred-citation"]["title"] == "MERGE: Fast Private Text Generation"


def test_the_version_policy_names_the_numbers_in_force() -> None:
    policy = text("CHANGELOG.md")
    assert f"`format_version` in the manifest, now {FORMAT_VERSION} " in policy
    assert f"`PROTOCOL_VERSION` in the greeting, now {PROTOCOL_VERSION} " in policy
    assert f"`format` in the store's header, now {STORE_FORMAT} " in policy


@pytest.mark.parametrize("name", ["CHANGELOG.md", "SECURITY.md"])
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text(name))
    assert links
    missing = [link for link in links if not ((ROOT / name).parent / link).exists()]
    assert not missing


def requirements() -> list[Requirement]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lists = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    return [Requirement(line) for entry in lists for line in entry.split("\n") if line.strip()]


def test_what_the_code_depends_on_in_detail_has_an_upper_bound() -> None:
    bounded = {
        requirement.name
        for requirement in requirements()
        if any(bound.operator == "<" for bound in requirement.specifier)
    }
    assert {"torch", "transformers", "numba", "llvmlite", "typer"} <= bounded


def test_nox_runs_the_oldest_and_the_newest_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nox", "--list"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    tried = re.findall(r"torch='(\d+)\.(\d+)\.\d+'", done.stdout)
    [torch] = [item for item in requirements() if item.name == "torch"]
    (major, oldest), (same, newest) = tried
    assert same == major
    assert torch.specifier == SpecifierSet(f">={major}.{oldest},<{major}.{int(newest) + 1}")


def test_pre_commit_runs_what_ci_runs() -> None:
    config = yaml.safe_load(text(".pre-commit-config.yaml"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"], "nothing is downloaded"
    entries = [hook["entry"] for hook in config["repos"][0]["hooks"]]
    hooks = [re.search(r"-m (ruff \w+|mypy)", entry)[1] for entry in entries]
    lint = text("Makefile").partition("\nlint:")[2].partition("\n\n")[0]
    assert hooks == re.findall(r"-m (ruff \w+|mypy)", lint)
    valid = (sys.executable, "-m", "pre_commit", "validate-config", ".pre-commit-config.yaml")
    subprocess.run(valid, cwd=ROOT, check=True, timeout=60)


@pytest.fixture
def size(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("size", ROOT / "benchmarks" / "size.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "size", module)  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def test_the_size_report_counts_code(
    size: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(size, "ROOT", tmp_path)
    identity = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org")

    def git(*arguments: str) -> None:
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, timeout=60)

    (tmp_path / "runtime" / "core").mkdir(parents=True)
    (tmp_path / "mergec").mkdir()
    module = tmp_path / "runtime" / "core" / "spec.py"
    module.write_text('"""Two\nlines."""\n\n# Why.\nVALUE = """\n"""  # code\n')
    (tmp_path / "mergec" / "runtime").symlink_to("../runtime")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    first = size.measure("HEAD")
    assert first == size.measure()
    assert first == {"runtime.core": size.Size(files=1, lines=6, code=2)}
    module.write_text("VALUE = 1\n")
    (tmp_path / "runtime" / "flat.py").write_text("def f(x):\n    return x\n")
    git("add", ".")
    assert size.table(size.measure(), first).splitlines()[2:] == [
        "| runtime.core | 1 | 1 (-5) | 1 (-1) |",
        "| runtime | 1 (+1) | 2 (+2) | 2 (+2) |",
        "| all floors | 2 (+1) | 3 (-3) | 3 (+1) |",
    ]


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="no checkout"
)
def test_the_size_report_has_every_floor(size: ModuleType) -> None:
    assert list(size.measure())[: len(FLOORS)] == list(FLOORS)
