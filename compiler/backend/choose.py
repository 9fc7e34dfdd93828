"""The choice among protocols that compute the same: by the cost formulas, for a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mergec.compiler.backend.cost import CostWalker, ghost_inputs
from mergec.runtime.core.network import Network
from mergec.runtime.core.op import Op
from mergec.runtime.engine.executor import Planned
from mergec.runtime.program.program import RoleProgram

NEW, PAST = 1, 128
"""The step that protocols are chosen for: a further token, after a text of usual length."""


def choose_variants(roles: Mapping[str, RoleProgram], network: Network, fixed: int) -> None:
    """Set the literals that an op leaves open (`Op.variants`) to what is cheapest on `network`."""
    program = next(iter(roles.values()))
    walker = _Chooser(program, network, fixed)
    if not any(planned.op and _has_variants(planned.op) for planned in walker.plan):
        return
    walker.setup()
    walker.step(ghost_inputs(program, NEW, PAST))
    for role in roles.values():
        role.instructions = [
            replace(item, args=walker.chosen.get(item.name, item.args))
            for item in role.instructions
        ]


class _Chooser(CostWalker):
    def __init__(self, program: RoleProgram, network: Network, fixed: int) -> None:
        super().__init__(program, fixed)
        self.network = network
        self.chosen: dict[str, tuple[Any, ...]] = {}

    def _shared(self, planned: Planned, bound: dict[str, Any]) -> Any:
        op, instruction = planned.op, planned.instruction
        if op is not None and _has_variants(op):
            fixed = self.context.fixed
            variant = min(
                op.variants(*bound.values()),
                key=lambda option: self.network.weight(op.cost(**bound | option, fixed=fixed)),
            )
            given = planned.bind(instruction.args, instruction.kwargs)
            self.chosen[instruction.name] = tuple((given | variant).values())
            bound = bound | variant
        return super()._shared(planned, bound)


def _has_variants(op: type[Op]) -> bool:
    return "variants" in vars(op)
