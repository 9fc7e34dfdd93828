"""Graph text in, graph text out: a folder for each pass under golden/, with near misses.

A file holds an optional remark, the graph `# before`, and the result: the graph `# after`, or
`# unchanged`. Each node that the pass skipped follows, with the reason. A case whose name begins
with `not_` is a near miss, which the pass must not change. To add a case, write a file with its
first part and run pytest with --update-golden.
"""

from __future__ import annotations

import collections
from pathlib import Path

import pytest

from mergec.passes import available
from tests.conftest import Golden
from tests.passes.examples import run

FOLDER = Path(__file__).parent / "golden"
CASES = sorted(file.relative_to(FOLDER).with_suffix("") for file in FOLDER.glob("*/*.ir"))
BEFORE = "# before\n"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Path, golden: Golden) -> None:
    file = FOLDER / f"{case}.ir"
    remark, found, rest = file.read_text().partition(BEFORE)
    assert found, f"{file} has no line '# before' above its graph"
    assert case.parts[0] in available(), f"{file.parent} is not named after a pass"
    given = rest.partition("# after\n")[0].partition("# unchanged\n")[0]
    ran = run(available()[case.parts[0]], given)
    result = f"# after\n{ran.text}" if ran.sites else "# unchanged\n"
    skips = "".join(f"# skipped %{node}: {reason}\n" for node, reason in ran.skips)
    near_miss = case.name.startswith("not_")
    assert (ran.sites == 0) == near_miss, (
        f"the pass changed {ran.sites} sites; the name of a near miss, and of no other case, "
        "begins with not_"
    )
    assert ran.sites or ran.text == ran.given
    assert ran.same_values
    text = given if "constant causal" in given else ran.given
    golden(file, f"{remark}{BEFORE}{text}{result}{skips}")


def test_every_pass_has_a_rewrite_and_near_misses() -> None:
    passes = collections.Counter(case.parts[0] for case in CASES)
    missing = sorted(set(available()) - set(passes))
    assert not missing, f"add cases under {FOLDER} for: {', '.join(missing)}"
    # Of the pass that resends hidden states: a model that it does not fit is an error.
    near = collections.Counter(case.parts[0] for case in CASES if case.name.startswith("not_"))
    idle = [name for name in passes if passes[name] == near[name]]
    assert not idle, f"no case shows a rewrite by: {', '.join(idle)}"
    few = [name for name in passes if near[name] < 2 and name != "resend_hidden"]
    assert not few, f"add a second near miss (not_*.ir) for: {', '.join(few)}"
