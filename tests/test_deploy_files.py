"""The files for services and containers fit the commands that they start."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from mergec.runtime.cli import run
from tests import decoder

FILES = Path(__file__).parents[1] / "examples" / "deploy"
COMMANDS = {"server": "serve", "dealer": "deal", "proxy": "proxy"}


@pytest.mark.parametrize("service", COMMANDS)
def test_options_are_known(service: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bundles = decoder.save(tmp_path / "bundles")
    config = str(FILES / "config" / f"{service}.toml")
    missing = str(tmp_path / "none")
    assert run([COMMANDS[service], str(bundles), "--config", config, "--certs", missing]) == 1
    assert f"{missing}/authority.pem: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("service", COMMANDS)
def test_units(service: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    name = f"mergec-{service}.service"
    text = (FILES / "systemd" / name).read_text()
    program, *arguments = re.search(r"^ExecStart=(.*)$", text, re.MULTILINE)[1].split()
    assert (program, arguments[0]) == ("/opt/mergec/bin/mergec", COMMANDS[service])
    assert f"/etc/mergec/{service}.toml" in arguments
    config = tmp_path / "empty.toml"
    config.write_text("")
    given = [str(config) if a.endswith(".toml") else a.replace("%", "no") for a in arguments]
    assert run([a.replace("nod/store.key", str(FILES)) for a in given]) == 1
    told = capsys.readouterr().err
    assert "No such option" not in told
    assert "cannot be read" in told, "keys or certificates, as %d is no folder here"
    if shutil.which("systemd-analyze") is None:
        return
    unit = tmp_path / name
    unit.write_text(text.replace(program, shutil.which("true")))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_containers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bundles = decoder.save(tmp_path / "bundles")
    recipe = (FILES / "containers" / "Dockerfile").read_text()
    stages = dict.fromkeys(re.findall(r"^FROM \S+ AS (\S+)$", recipe, re.MULTILINE))
    for _, copied in re.findall(r"^COPY (--\S+ )?(\w\S*) ?.* /source", recipe, re.MULTILINE):
        assert (FILES.parents[1] / copied).exists()
    composed = yaml.safe_load((FILES / "containers" / "compose.yaml").read_text())
    assert set(composed["services"]) == set(COMMANDS)
    for name, service in composed["services"].items():
        build = service["build"]
        assert build["target"] == name
        assert name in stages
        assert (FILES / "containers" / build["context"] / build["dockerfile"]).exists()
        stage = recipe.split(f" AS {name}\n")[1].split("\nFROM ")[0]
        program, *arguments = json.loads(re.search(r"^ENTRYPOINT (.*)$", stage, re.MULTILINE)[1])
        assert (program, arguments[0]) == ("mergec", COMMANDS[name])
        places = {
            "/bundle": str(bundles),
            "/certs": str(tmp_path / "none"),
            "/config.toml": str(FILES / "config" / f"{name}.toml"),
        }
        given = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", word) for word in service.get("command", [])]
        assert run([*(places.get(word, word) for word in arguments), *given]) == 1
        assert "none/authority.pem: cannot be read" in capsys.readouterr().err, "all else is known"
        mounted = dict(volume.removesuffix(":ro").split(":") for volume in service["volumes"])
        assert {"/bundle", "/certs", "/config.toml"} == set(mounted.values())
        assert (FILES / "containers" / f"../config/{name}.toml").exists()
        assert f"../config/{name}.toml" in mounted
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
    assert re.search(r"^USER (\d+):\1$", recipe, re.MULTILINE), "no root"
