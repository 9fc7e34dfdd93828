"""Chooses among protocols that compute the same result: the cheapest on a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mergec.compiler.backend.cost import call_cost, walk
from mergec.runtime.core.network import Network
from mergec.runtime.core.op import Op
from mergec.runtime.engine.plan import Plan
from mergec.runtime.engine.rehearsal import ghost_inputs
from mergec.runtime.program.program import RoleProgram

NEW, PAST = 1, 128
"""The step that protocols are chosen for: one more token after a text of usual length."""


def choose_variants(
    roles: Mapping[str, RoleProgram], network: Network, fixed: int, exact: bool = False
) -> None:
    """Set the literals that an op leaves open (`Op.variants`) to the cheapest on `network`.

    Costs are those of a decode step. fixed: the program's fractional bits. exact: whether roundings
    are exact. All roles get the same choice; their instructions are replaced in place.
    """
    program = next(iter(roles.values()))
    plan = Plan(program)
    if not any(planned.op and _has_variants(planned.op) for planned in plan.steps):
        return
    chosen: dict[str, tuple[Any, ...]] = {}
    for walked in walk(plan, fixed, ghost_inputs(program, NEW, PAST), program.outputs):
        planned, bound, item = walked.planned, walked.bound, walked.planned.instruction
        op = planned.op
        if op is None or bound is None or not _has_variants(op):
            continue

        def weight(
            option: dict[str, Any], op: type[Op] = op, bound: dict[str, Any] = bound
        ) -> float:
            return network.weight(call_cost(op, bound | option, fixed, exact))

        variant = min(op.variants(*bound.values()), key=weight)
        chosen[item.name] = tuple((planned.bind(item.args, item.kwargs) | variant).values())
    for role in roles.values():
        role.instructions = [
            replace(item, args=chosen.get(item.name, item.args)) for item in role.instructions
        ]


def _has_variants(op: type[Op]) -> bool:
    return "variants" in vars(op)
