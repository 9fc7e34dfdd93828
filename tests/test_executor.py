"""Instructions as functions of their operands, and steps that are run again."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mergec.runtime.core.spec import CLIENT, Vis
from mergec.runtime.core.values import Held, Masked, Shared
from mergec.runtime.engine.executor import Executor
from mergec.runtime.engine.functions import evaluate
from mergec.runtime.engine.packing import pack, unpack
from mergec.runtime.engine.plan import Plan, Planned
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.ops import load_all
from mergec.runtime.program.program import Instruction, Ref, RoleProgram

load_all()


def instruction(name: str, target: str, *args: Any, **kwargs: Any) -> Instruction:
    return Instruction(name, target, args, kwargs, Vis.SHARED, 0)


def executor(*instructions: Instruction, outputs: list[str]) -> Executor:
    program = RoleProgram("client", list(instructions), [], outputs, [])
    return Executor(program, Simulation().contexts[CLIENT], None)


def test_operands_take_the_places_of_references() -> None:
    nested = Planned(instruction("y", "aten.cat.default", [Ref("a"), Ref("b")], dim=Ref("d")))
    assert nested.refs == ["a", "b", "d"]
    a, b = torch.zeros(2, 1), torch.ones(2, 2)
    assert nested.call(a, b, 1).tolist() == [[0, 1, 1], [0, 1, 1]]
    assert nested.call(b, b, 0).shape == (4, 2)
    literal = Planned(instruction("y", "aten.full.default", [2, Ref("n")], 7, dtype="torch.int8"))
    assert literal.call(3).dtype == torch.int8
    assert literal.call(4).shape == (2, 4)


def test_arguments_of_an_op_follow_its_schema_and_defaults() -> None:
    planned = Planned(instruction("y", "mpc.linear", Ref("x"), Ref("w"), bits=3))
    assert planned.parameters == ("x", "weight", "bias", "bits", "parts")
    assert planned.arguments([1, 2]) == [1, 2, None, 3, []]
    assert planned.constants == [("weight", "w")]
    swapped = Planned(instruction("y", "mpc.linear", weight=Ref("w"), x=Ref("x")))
    assert swapped.refs == ["x", "w"]


def test_a_program_may_call_nothing_else() -> None:
    with pytest.raises(KeyError, match="not a function that a program may call"):
        Planned(instruction("y", "aten.load.default", Ref("x")))


def test_structural_functions_move_every_tensor_of_a_secret() -> None:
    run = executor(
        instruction("parts", "aten.split.Tensor", Ref("x"), 2, 1),
        instruction("left", "sym.getitem", Ref("parts"), 0),
        instruction("right", "sym.getitem", Ref("parts"), 1),
        instruction("back", "aten.cat.default", [Ref("right"), Ref("left")], 1),
        instruction("size", "aten.sym_size.int", Ref("back"), 1),
        instruction("flat", "aten.reshape.default", Ref("back"), [Ref("size")]),
        outputs=["flat", "size"],
    )
    opened, mask = torch.arange(4).reshape(1, 4), torch.arange(10, 14).reshape(1, 4)
    found = run.step({"x": Masked(opened, mask, 5)})
    assert found["size"] == 4
    assert isinstance(found["flat"], Masked)
    assert found["flat"].opened.tolist() == [2, 3, 0, 1]
    assert found["flat"].mask.tolist() == [12, 13, 10, 11]
    assert found["flat"].frac == 5


def test_what_is_joined_is_held_in_one_form() -> None:
    run = executor(
        instruction("y", "aten.cat.default", [Ref("a"), Ref("b"), Ref("c")]), outputs=["y"]
    )
    a, b = Shared(torch.tensor([8]), 3), Masked(torch.tensor([9]), torch.tensor([5]), 2)
    found = run.step({"a": a, "b": b, "c": Held(Vis.CLIENT, torch.tensor([1.5]))})["y"]
    assert run.context.party == CLIENT
    assert isinstance(found, Shared)
    assert (found.share.tolist(), found.frac) == ([8, 8, 12], 3)


def test_a_step_may_begin_and_end_elsewhere_than_the_one_before() -> None:
    run = executor(
        instruction("b", "aten.add.Tensor", Ref("a"), 1),
        instruction("c", "aten.mul.Tensor", Ref("b"), Ref("b")),
        instruction("d", "aten.sub.Tensor", Ref("c"), Ref("a")),
        outputs=["d"],
    )
    for a in (2, 5, 2):
        assert run.step({"a": torch.tensor(a)})["d"] == (a + 1) ** 2 - a
        assert run.step({"a": torch.tensor(a), "b": torch.tensor(7)})["d"] == 49 - a
        assert run.step({"b": torch.tensor(3)}, ["c", "b"]) == {"c": 9, "b": 3}


def test_parts_of_a_message_are_found_wherever_they_begin() -> None:
    sent = [
        torch.arange(3, dtype=torch.uint8),
        torch.arange(6).reshape(2, 3).T,
        torch.empty(0, 2, dtype=torch.int32),
        torch.tensor(-5, dtype=torch.int16),
    ]
    message = pack(sent)
    assert message is not None
    assert message.numel() == 3 + 48 + 2
    for part, like in zip(unpack(message, sent, torch.device("cpu")), sent, strict=True):
        assert part.equal(like)
        assert part.data_ptr() % part.element_size() == 0
    assert pack([]) is None
    assert list(unpack(torch.empty(0, dtype=torch.uint8), [], torch.device("cpu"))) == []


def test_a_plan_schedules_what_leads_to_the_outputs() -> None:
    plan = Plan(
        RoleProgram(
            "client",
            [
                instruction("b", "aten.add.Tensor", Ref("a"), 1),
                instruction("unused", "aten.add.Tensor", Ref("b"), 1),
                instruction("c", "aten.mul.Tensor", Ref("b"), Ref("b")),
                instruction("d", "aten.sub.Tensor", Ref("c"), Ref("a")),
            ],
            [], ["d"], [],
        )
    )  # fmt: skip
    assert plan.dependencies == [set(), {0}, {0}, {2}]
    schedule = plan.schedule(frozenset({"a"}), ("d",))
    assert schedule.ready == [0]
    assert schedule.consumers == [[2], [], [3], []]
    assert schedule.left == [0, 0, 1, 1]
    assert schedule.uses == {"a": 2, "b": 2, "c": 1, "d": 1}
    assert plan.schedule(frozenset({"a"}), ("d",)) is schedule
    assert plan.schedule(frozenset({"a", "c"}), ("d",)).ready == [3]


def test_scheduling_reads_the_active_instructions_a_fixed_number_of_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Repeating it for each instruction would be quadratic, and programs have thousands."""
    reads = 0

    class Watched(list[int]):
        def __iter__(self) -> Iterator[int]:
            nonlocal reads
            reads += 1
            return super().__iter__()

    size = 50
    chain = [instruction(f"v{i + 1}", "aten.add.Tensor", Ref(f"v{i}"), 1) for i in range(size)]
    plan = Plan(RoleProgram("client", chain, [], [f"v{size}"], []))
    monkeypatch.setattr(plan, "active", lambda *_: Watched(range(size)))
    assert plan.schedule(frozenset({"v0"}), (f"v{size}",)).ready == [0]
    assert 0 < reads < 5


def test_values_are_forgotten_after_their_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session would otherwise hold every activation of every layer at once."""
    size, made, most = 30, [], 0

    def watched(*args: Any) -> Any:
        nonlocal most
        most = max(most, sum(value() is not None for value in made))
        result = evaluate(*args)
        made.append(weakref.ref(result))
        return result

    monkeypatch.setattr("mergec.runtime.engine.executor.evaluate", watched)
    chain = [instruction(f"v{i + 1}", "aten.add.Tensor", Ref(f"v{i}"), 1) for i in range(size)]
    run = executor(*chain, outputs=[f"v{size}"])
    assert run.step({"v0": torch.tensor(0)})[f"v{size}"] == size
    assert len(made) == size
    assert most <= 3
