"""Chooses among protocols that compute the same result: the cheapest on a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mergec.compiler.backend.cost import Walked, call_cost, cost_report, dealt_bytes, walk
from mergec.runtime.core.network import Network, Waiting
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.structural import MOVE_NAMES
from mergec.runtime.core.values import Shared, Wide
from mergec.runtime.engine.plan import LATER, Plan, Planned
from mergec.runtime.engine.rehearsal import call_dealt, ghost_inputs
from mergec.runtime.ops.gelu import Gelu
from mergec.runtime.ops.glu import Glu
from mergec.runtime.ops.normed_linear import NormedLinear
from mergec.runtime.ops.part import Part
from mergec.runtime.ops.rotary import Rotary
from mergec.runtime.ops.truncate import Truncate
from mergec.runtime.program.program import Instruction, RoleProgram, phase_of

NEW, PAST = 1, 128
"""The step that protocols are chosen for: one more token after a text of usual length, or after as
many tokens as the program takes."""

PROMPT = 64
"""Tokens of the prompt for which it is chosen to whom the dealer sends most."""

_ALONE = MOVE_NAMES - {"aten.cat.default", "aten.stack.default"}
"""Moves of one value: what joins several may join shares of another ring."""

Options = Callable[[Mapping[str, Any]], Iterable[dict[str, Any]]]
"""`Op.variants` or `Op.supplies` of an op."""

Choices = Mapping[str, tuple[Any, ...]]
"""Arguments of calls, by the names of their instructions."""


@dataclass(frozen=True)
class _Step:
    """The step that protocols are chosen for: `new` tokens after `past` ones on `network`.

    fixed, exact: the program's fractional bits, and whether its roundings are exact.
    """

    network: Network
    fixed: int
    exact: bool
    new: int
    past: int

    def times(self, program: RoleProgram) -> tuple[Waiting, float]:
        """What the step waits for the network, and seconds of the roles' work for dealt bytes."""
        given = program, self.new, self.past, self.fixed, self.exact
        dealt = dealt_bytes(*given)
        return self.network.waiting(cost_report(*given).total, dealt), self.network.making(dealt)


def choose_variants(
    roles: Mapping[str, RoleProgram],
    network: Network,
    fixed: int,
    exact: bool = False,
    max_length: int = NEW + PAST,
) -> None:
    """Set the literals that an op leaves open (`Op.variants`) to the cheapest on `network`.

    Where parties are far from each other, `Op.far_variants` are compared with the others.
    Costs are those of a decode step, with a latency for each round: how many latencies a call adds
    to a step depends on the calls around it (`engine.rehearsal.latencies`). The dealer's bytes are
    on their way while the parties exchange messages, so they count only if the step would otherwise
    wait for them. Of ops that need the same messages either way (`Op.supplies`), either all take
    keys, or each the dealt bytes that take the least time in a prompt: of both links, and of the
    roles' work for them. fixed: the program's fractional bits. exact: whether roundings are exact.
    max_length: most tokens that the program takes. All roles get the same choice; their
    instructions are replaced in place.
    """
    program = next(iter(roles.values()))
    decode = _Step(network, fixed, exact, NEW, min(PAST, max_length - NEW))
    for waits in (False, True):
        best = dict(_choices(program, _variants, decode, waits))
        _replace(roles, best)
        if waits or not best:
            break
        waiting, _ = decode.times(program)
        if waiting.total <= waiting.prepared:
            break
    if not exact:
        _replace(roles, dict(_widened(program, decode)))
    # Only a decode step of an encoder-decoder runs its decoder.
    prompt = replace(decode, new=min(PROMPT, max_length), past=0)
    step = decode if program.encodes else prompt
    each, keys = (dict(_choices(program, _supplies, step, True, first)) for first in (False, True))

    def seconds(choices: Choices) -> float:
        other = replace(program, instructions=_replaced(program, choices))
        waiting, making = step.times(other)
        return waiting.total + making

    # The links work at the same time, and which is the slower depends on all ops together.
    _replace(roles, each if each == keys else min(each, keys, key=seconds))


def _replace(roles: Mapping[str, RoleProgram], choices: Choices) -> None:
    """Give the calls of all roles the chosen arguments."""
    for role in roles.values():
        role.instructions = _replaced(role, choices)


def _replaced(program: RoleProgram, choices: Choices) -> list[Instruction]:
    return [replace(item, args=choices.get(item.name, item.args)) for item in program.instructions]


def chosen_otherwise(program: RoleProgram, network: Network, fixed: int) -> dict[str, int]:
    """How many calls of each op would be others on `network`, by op and by what differs.

    These have other literals there. Where a message takes no time, no norm is deferred either
    (`passes.defer_norm`), nothing is computed in the ring of 128 bits behind one, and no activation
    from one opening (`passes.open_once`).
    """
    manifest = program.manifest
    exact, most = manifest.rounding == "exact", manifest.max_length or NEW + PAST
    other = replace(program, instructions=list(program.instructions))
    choose_variants({program.role: other}, network, fixed, exact, most)
    waits = bool(network.parties.latency)
    found = Counter[str]()
    for planned, item in zip(Plan(program).steps, other.instructions, strict=True):
        deferred = planned.op is not None and issubclass(planned.op, NormedLinear)
        if deferred and not waits:
            found[f"{item.target} (norm deferred{', wide' * planned.argument('wide')})"] += 1
        elif planned.op in (Gelu, Glu) and planned.argument("alone") and not waits:
            found[f"{item.target} (one opening)"] += 1
        elif _bound(planned, planned.instruction) != _bound(planned, item):
            found[item.target] += 1
    return dict(found)


def _widened(program: RoleProgram, step: _Step) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The products behind norms, and arguments: `wide` where it saves a round for less time.

    All that reads such a product must be truncations, directly or behind what is local.
    """
    plan = Plan(program)
    found = {walked.planned.name: walked for walked in _walked(plan, program, step)}
    readers: dict[str, list[Planned]] = {}
    for planned in plan.steps:
        for name in planned.refs:
            readers.setdefault(name, []).append(planned)

    def seconds(calls: Iterable[tuple[type[Op], Mapping[str, Any]]]) -> float:
        total, dealt = Cost(), {"client": 0, "server": 0}
        for op, bound in calls:
            cost = call_cost(op, bound, step.fixed, False)
            total = total.beside(cost) if op is Truncate else total + cost
            for role, size in call_dealt(op, step.fixed, False, *bound.values()).items():
                dealt[role] += size
        return step.network.weight(total, dealt)

    for name, walked in found.items():
        op, bound, item = walked.planned.op, walked.bound, walked.planned.instruction
        if op is None or bound is None or not issubclass(op, NormedLinear):
            continue
        ends = None if name in program.outputs else _truncations(name, readers)
        wide = False
        if ends and op.fits_wide(bound, step.fixed):
            # What is truncated must be known in this form, not as what it becomes.
            plain = [(Truncate, {"x": _narrow(found[end.refs[0]].result)}) for end in ends]
            apart = seconds([*plain, (op, bound | {"wide": False})])
            wide = seconds([(op, bound | {"wide": True})]) < apart
        given = walked.planned.bind(item.args, item.kwargs) | {"wide": wide}
        yield item.name, tuple(Planned.written(given, {"columns", "wide"}).values())


def _narrow(value: Shared | Wide) -> Shared:
    """A share of this shape modulo 2**64."""
    return Shared(value.low, value.frac) if isinstance(value, Wide) else value


def _truncations(name: str, readers: Mapping[str, list[Planned]]) -> list[Planned] | None:
    """The truncations that read a value, moved or mapped locally; None if anything else does."""
    ends: list[Planned] = []
    for planned in readers.get(name, []):
        if planned.op is Truncate:
            ends.append(planned)
        elif planned.op in (Part, Rotary) or planned.instruction.target in _ALONE:
            further = _truncations(planned.name, readers)
            if further is None:
                return None
            ends += further
        else:
            return None
    return ends


def _bound(planned: Planned, item: Instruction) -> list[Any]:
    return list(planned.bind(item.args, item.kwargs).values()) if planned.op else []


def _variants(op: type[Op]) -> Options | None:
    stated: Any = op.variants
    return None if stated.__func__ is Op.variants.__func__ else stated  # type: ignore[attr-defined]


def _supplies(op: type[Op]) -> Options | None:
    stated: Any = op.supplies
    return None if stated.__func__ is Op.supplies.__func__ else stated  # type: ignore[attr-defined]


def _choices(
    program: RoleProgram,
    kind: Callable[[type[Op]], Options | None],
    step: _Step,
    waits: bool,
    first: bool = False,
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The calls that leave something open: an instruction's name, and its best arguments.

    waits: whether the step waits for the dealer. first: take the first option instead, which is
    keys where it is about supplies.
    """
    plan = Plan(program)
    if not any(planned.op and kind(planned.op) for planned in plan.steps):
        return
    for walked in _walked(plan, program, step):
        planned, bound, item = walked.planned, walked.bound, walked.planned.instruction
        op = planned.op
        stated = kind(op) if op else None
        if op is None or bound is None or stated is None:
            continue
        options = list(stated(bound))
        if kind is _variants and step.network.far:
            options += op.far_variants(bound)

        def weight(
            option: dict[str, Any], op: type[Op] = op, bound: dict[str, Any] = bound
        ) -> float:
            arguments = bound | option
            cost = call_cost(op, arguments, step.fixed, step.exact)
            dealt = call_dealt(op, step.fixed, step.exact, *arguments.values())
            return step.network.weight(cost, dealt, waits=waits)

        given = planned.bind(item.args, item.kwargs)
        best = given | (options[0] if options and first else min(options, key=weight, default={}))
        if kind is _supplies and best == given:
            # The call stays as it is written.
            continue
        yield item.name, tuple(Planned.written(best, LATER).values())


def _walked(plan: Plan, program: RoleProgram, step: _Step) -> Iterator[Walked]:
    """The instructions of a step; of an encoder-decoder, then those that only a prompt or the
    finish runs.

    Half of what comes before a decode step is the source.
    """
    new, past = step.new, step.past
    if not program.encodes:
        yield from walk(plan, step.fixed, ghost_inputs(program, new, past), program.outputs)
        return
    source, seen = (past + 1) // 2, set[str]()
    lengths = [(new, past)]
    if past:
        lengths.append((source, 0))
    if program.resends:
        lengths.append((0, 1))
    for sizes in lengths:
        part = program.phase(phase_of(*sizes))
        inputs = ghost_inputs(part, *program.sizes(*sizes, source))
        for walked in walk(plan, step.fixed, inputs, part.outputs):
            if walked.planned.name not in seen:
                yield walked
            seen.add(walked.planned.name)
