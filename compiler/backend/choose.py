"""Chooses among protocols that compute the same result: the cheapest on a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mergec.compiler.backend.cost import call_cost, cost_report, dealt_bytes, walk
from mergec.runtime.core.network import Network
from mergec.runtime.core.op import Op
from mergec.runtime.engine.plan import Plan
from mergec.runtime.engine.rehearsal import call_dealt, ghost_inputs
from mergec.runtime.program.program import RoleProgram

NEW, PAST = 1, 128
"""The step that protocols are chosen for: one more token after a text of usual length, or after as
many tokens as the program takes."""


def choose_variants(
    roles: Mapping[str, RoleProgram],
    network: Network,
    fixed: int,
    exact: bool = False,
    max_length: int = NEW + PAST,
) -> None:
    """Set the literals that an op leaves open (`Op.variants`) to the cheapest on `network`.

    Costs are those of a decode step. The dealer's bytes are on their way while the parties exchange
    messages, so they count only if the step would otherwise wait for them. fixed: the program's
    fractional bits. exact: whether roundings are exact. max_length: most tokens that the program
    takes. All roles get the same choice; their instructions are replaced in place.
    """
    for waits in (False, True):
        program = next(iter(roles.values()))
        choices = _choices(program, network, fixed, exact, max_length, waits)
        best = {choice.name: choice.best for choice in choices}
        for role in roles.values():
            role.instructions = [
                replace(item, args=best.get(item.name, item.args)) for item in role.instructions
            ]
        if waits or not best or not _waits(program, network, fixed, exact, max_length):
            return


def chosen_otherwise(program: RoleProgram, network: Network, fixed: int) -> dict[str, int]:
    """How many calls of each op have other literals than the cheapest on `network`, by op.

    There no step waits for the dealer's bytes.
    """
    manifest = program.manifest
    exact, most = manifest.rounding == "exact", manifest.max_length or NEW + PAST
    choices = _choices(program, network, fixed, exact, most, waits=False)
    return dict(Counter(c.target for c in choices if list(c.best) != list(c.given)))


def _waits(
    program: RoleProgram, network: Network, fixed: int, exact: bool, max_length: int
) -> bool:
    """Whether a decode step takes as long as the dealer's bytes do."""
    past = min(PAST, max_length - NEW)
    cost = cost_report(program, NEW, past, fixed, exact).total
    waiting = network.waiting(cost, dealt_bytes(program, NEW, past, fixed, exact))
    return waiting.total > waiting.prepared


@dataclass(frozen=True)
class _Choice:
    """A call of an op with variants: the instruction's name and target, and all its arguments as
    they are and as they would be best."""

    name: str
    target: str
    given: tuple[Any, ...]
    best: tuple[Any, ...]


def _choices(
    program: RoleProgram,
    network: Network,
    fixed: int,
    exact: bool,
    max_length: int,
    waits: bool,
) -> Iterator[_Choice]:
    past = min(PAST, max_length - NEW)
    plan = Plan(program)
    if not any(planned.op and _has_variants(planned.op) for planned in plan.steps):
        return
    for walked in walk(plan, fixed, ghost_inputs(program, NEW, past), program.outputs):
        planned, bound, item = walked.planned, walked.bound, walked.planned.instruction
        op = planned.op
        if op is None or bound is None or not _has_variants(op):
            continue

        def weight(
            option: dict[str, Any], op: type[Op] = op, bound: dict[str, Any] = bound
        ) -> float:
            arguments = bound | option
            cost = call_cost(op, arguments, fixed, exact)
            dealt = call_dealt(op, fixed, exact, *arguments.values())
            return network.weight(cost, dealt, waits=waits)

        given = planned.bind(item.args, item.kwargs)
        best = given | min(op.variants(*bound.values()), key=weight)
        yield _Choice(item.name, item.target, tuple(given.values()), tuple(best.values()))


def _has_variants(op: type[Op]) -> bool:
    return op.variants.__func__ is not Op.variants.__func__  # type: ignore[attr-defined]
