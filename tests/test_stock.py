"""CrypTen's stock protocols of every op, and of a whole step, in three processes."""

from __future__ import annotations

import json

import pytest

from mergec.runtime.core.cases import Case
from mergec.runtime.ops import load_all
from tests.roles import Finished, run_roles

CASES = [
    (name, i, case)
    for name, op in sorted(load_all().items())
    for i, case in enumerate(op.cases())
    if case.stock is not None
]
"""Every call whose stock protocol an op's file promises an error for."""

SCRIPT = """
    import inspect
    import json
    from mergec.runtime.crypten import compat as crypten
    from mergec.runtime.ops import load_all
    from mergec.runtime.core.spec import Vis
    from mergec.runtime.core.values import Held
    from mergec.runtime.transport.communicator import ChannelCommunicator
    crypten.use_provider("dealer")
    ChannelCommunicator(role, channels, 60.0).install()
    if role == "dealer":
        crypten.serve_third_party()
        sys.exit()
    crypten.start_party()
    ops = load_all()
    errors = {}
    def given(case, form, value):
        if not isinstance(value, torch.Tensor) or form == "public":
            return value
        if not value.is_floating_point():
            return Held(Vis.CLIENT, value if role == "client" else value.to("meta"))
        if not value.numel():
            return crypten.MPCTensor.from_shares(value.long())
        return crypten.cryptensor(value, src=1)
    with crypten.quiet(), crypten.no_grad():
        for name, op in sorted(ops.items()):
            for i, case in enumerate(op.cases()):
                if case.stock is None:
                    continue
                signature = inspect.signature(op.reference)
                # CrypTen's operands are float32.
                arguments = [
                    a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
                    for a in case.args
                ]
                # As the executor does, by name and with all defaults.
                bound = signature.bind(*arguments)
                bound.apply_defaults()
                result = op.stock(**{
                    p: given(case, case.forms.get(p), a) for p, a in bound.arguments.items()
                })
                expected = op.reference(*arguments)
                if op.result == "revealed":
                    found = result.value if role == "client" else expected
                else:
                    found = crypten.plain_text(result)
                assert found.shape == expected.shape, (name, found.shape)
                errors[f"{name}-{i}"] = float((found - expected).abs().max())
    print(json.dumps(errors), flush=True)
    from mergec.runtime.engine.plain import PlainExecutor
    from mergec.runtime.engine.stock import StockExecutor
    from tests.stock_program import NEXT, PROMPT, program
    executor, plain = StockExecutor(program(role)), PlainExecutor(program("server"))
    executor.setup()
    caches, clear, steps = executor.start(), plain.start(), []
    for new in (PROMPT, NEXT):
        ids = torch.tensor(new)
        expected = plain.step({"ids": ids, **clear})
        ids = Held(Vis.CLIENT, ids if role == "client" else ids.to("meta"))
        found = executor.step({"ids": ids, **caches})
        assert set(found) == {"logits", "cache.out"}
        caches, clear = {"cache": found["cache.out"]}, {"cache": expected["cache.out"]}
        cache = crypten.plain_text(caches["cache"])
        errors = {"cache": float((cache - clear["cache"]).abs().max())}
        if role == "client":
            difference = found["logits"].value - expected["logits"]
            errors["logits"] = float(difference.abs().max())
        else:
            assert found["logits"].value.is_meta
        steps.append(errors)
    words = torch.arange(-(2**18), 2**18)
    shared = crypten.MPCTensor.from_shares(words if role == "client" else torch.zeros_like(words))
    exact = bool((crypten.plain_text(shared) == words / 2**16).all())
    if role == "client":
        crypten.end_third_party()
    print(json.dumps(steps))
    print(json.dumps(exact))
"""


@pytest.fixture(scope="module")
def finished() -> dict[str, Finished]:
    return run_roles(SCRIPT, timeout=120)


def test_every_op_has_a_stock_protocol_or_says_why_not(finished: dict[str, Finished]) -> None:
    assert {role: (f.code, f.err) for role, f in finished.items() if f.code} == {}
    without = {name for name, op in load_all().items() if op.no_stock}
    assert {name for name, _, _ in CASES} | without == set(load_all())
    assert not {name for name, _, _ in CASES} & without


@pytest.mark.parametrize(
    ("name", "number", "case"), CASES, ids=[f"{name}-{i}" for name, i, _ in CASES]
)
def test_a_stock_protocol_computes_the_op(
    finished: dict[str, Finished], name: str, number: int, case: Case
) -> None:
    lines = [finished[role].out.splitlines()[0] for role in ("client", "server")]
    assert max(json.loads(line)[f"{name}-{number}"] for line in lines) < case.stock


def test_a_shared_number_is_decoded_exactly(finished: dict[str, Finished]) -> None:
    """All numbers from -4 to 4: CrypTen's own decoder is wrong for some below zero."""
    assert [json.loads(finished[role].out.splitlines()[2]) for role in ("client", "server")] == [
        True,
        True,
    ]


def test_a_program_runs_by_stock_protocols(finished: dict[str, Finished]) -> None:
    """The prompt, then one token over the cache; the server does not learn the logits."""
    prompt, token = json.loads(finished["client"].out.splitlines()[1])
    assert set(prompt) == set(token) == {"cache", "logits"}
    # A norm, then products of numbers below 4; the attention's own error on top.
    assert max(prompt["cache"], token["cache"]) < 1e-2
    assert max(prompt["logits"], token["logits"]) < 2e-2
