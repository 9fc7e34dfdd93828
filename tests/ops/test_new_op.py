"""An op is one file: what another package offers by an entry point runs, costs, and is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ops.toy import TRIPLE, install, python

COMPILE = """
import json, sys
import torch
from pathlib import Path
from mergec import CompileConfig, compile_decoder
from mergec.compiler.backend.cost import cost_report
from mergec.compiler.program import Answer
from mergec.runtime.core.structural import target_name
from mergec.runtime.roles.local import run_local
from tests.families import random_decoder
from mergec.runtime.ops import load_all

load_all()

class Act(torch.nn.Module):
    def forward(self, x):
        return torch.ops.mpc.triple(x)

model = random_decoder("gpt2").float()
for layer in model.transformer.h:
    layer.mlp.act = Act()
program = compile_decoder(model, config=CompileConfig(max_length=64, logit_noise=0))

# Hoisted: of the last layer's MLP the prompt's last position is all that is computed.
report = cost_report(program.any_role, 5, 0)
rows = [row for row in report.rows if row.target == "mpc.triple"]
assert [row.shape[1] for row in rows] == [5, 1], rows
assert [row.cost.online for row in rows] == [16 * 5 * 128, 16 * 128], rows

# Legalized: its operand is truncated, as it asks for.
items = {item.name: item for item in program.any_role.instructions}
for row in rows:
    operand = items[items[row.name].args[0].name]
    assert operand.frac == 16, operand

# Drawn under its kind.
text = program.to_html(1, 8)
data = json.loads(text.partition('type="application/json">')[2].partition("</script>")[0])
nodes = [node for group in data["graphs"][1]["groups"] for node in group["nodes"]]
assert {node["kind"] for node in nodes if node["op"] == "triple"} == {"activation"}

# Run by three processes, at the predicted cost.
path = program.save(Path(sys.argv[1]))
result = run_local(path, [3, 14, 15], max_tokens=2, ignore_stop=True)
plain = program.plaintext(Answer("", [3, 14, 15], result.tokens))
assert plain.tokens == result.tokens[: len(plain.tokens)]
for record in result.records:
    predicted = cost_report(program.any_role, record.new, record.past).total
    assert record.rounds == predicted.rounds
    assert record.sent + record.received == predicted.online
    assert record.offline_bytes == predicted.offline
"""

LOAD = """
import sys
from mergec import Program
Program.load(sys.argv[1])
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("toys"), TRIPLE, "Triple")


@pytest.mark.slow
def test_an_op_in_one_file(package: Path, tmp_path: Path) -> None:
    """Compiled, hoisted, legalized, drawn, run; without its package its bundles are refused."""
    bundles = tmp_path / "bundles"
    done = python("-c", COMPILE, str(bundles), package=package)
    assert done.returncode == 0, done.stderr
    refused = python("-c", LOAD, str(bundles))
    last = refused.stderr.splitlines()[-1]
    assert "BundleError" in last
    assert "needs the op mpc.triple, which this mergec" in last
    assert "or, if you trust it, install the package of that op (mergec.ops)" in last
    assert python("-c", LOAD, str(bundles), package=package).returncode == 0


@pytest.mark.slow
def test_the_tests_of_every_op_check_it(package: Path) -> None:
    """Its protocol against its reference and its cost, its messages, its positions, its domain."""
    files = ["tests/ops/test_every_op.py", "tests/test_legalize.py"]
    options = ["-q", "-p", "no:cacheprovider", "-k", "triple", "--no-header", "-rA"]
    done = python("-m", "pytest", *options, *files, package=package)
    assert done.returncode == 0, done.stdout
    passed = {
        line.partition("::")[2].split("[")[0]
        for line in done.stdout.splitlines()
        if line.startswith("PASSED")
    }
    assert passed == {
        "test_protocol",
        "test_protocol_with_exact_rounding",
        "test_the_forms_are_known",
        "test_messages_are_uniform_and_of_one_shape",
        "test_an_op_without_messages_is_local",
        "test_the_last_position_alone",
        "test_calibration_near_the_end_of_a_domain_is_refused",
    }


def test_it_says_that_crypten_has_none(package: Path) -> None:
    done = python(
        "-c",
        "from mergec.runtime.ops import load_all\nload_all()['triple'].stock(1.0)",
        package=package,
    )
    assert "CrypTen has no stock protocol for mpc.triple: this op is a test" in done.stderr


REFUSED = """
import re, sys
from mergec.runtime.core.errors import OpError
from mergec.runtime.core.op import REGISTRY
from mergec.runtime.ops import load_all

for package, words in zip(sys.argv[1::2], sys.argv[2::2]):
    sys.path.insert(0, package)
    for _ in range(2):
        try:
            load_all()
        except OpError as error:
            assert re.search(words, str(error)), error
            assert "triple" not in REGISTRY
        else:
            raise SystemExit(f"it was loaded, but: {words}")
    sys.path.remove(package)
    sys.modules.pop("toys", None)
assert "add" in load_all()
"""


def test_an_op_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    """And asked for once more, it is refused in the same words: nothing stays of it."""
    cases = (
        (
            TRIPLE,
            "Missing",
            "the entry point toys:Missing of mergec.ops cannot be loaded: .*Missing",
        ),
        (TRIPLE, "Cost", "the entry point toys:Cost of mergec.ops is not a subclass of mergec.Op"),
        (TRIPLE, "Op", "the entry point toys:Op of mergec.ops is an abstract class"),
        (
            TRIPLE.replace('"triple"', '"add"'),
            "Triple",
            "toys:Triple of mergec.ops cannot be loaded: .*class Triple: mpc.add is defined",
        ),
        (
            TRIPLE.replace('"fixed"', '"fxied"'),
            "Triple",
            "toys:Triple of mergec.ops cannot be loaded: .*toys.py: class Triple: the form 'fxied'",
        ),
    )
    arguments = []
    for number, (source, name, words) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        arguments += [str(install(folder, source, name)), words]
    done = python("-c", REFUSED, *arguments)
    assert done.returncode == 0, done.stderr
