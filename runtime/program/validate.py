"""Validates a whole program: names, ops, shapes, and who may hold what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from inspect import signature
from typing import Any

from mergec.runtime.core.errors import BundleError
from mergec.runtime.core.op import REGISTRY, Op
from mergec.runtime.core.spec import ROLES, Vis
from mergec.runtime.core.structural import SECRET_MOVES, SIZE, TABLE, secret_parameters
from mergec.runtime.core.version import VERSION
from mergec.runtime.ops import ENTRY_POINTS, load_all
from mergec.runtime.program.encoding import RECOMPILE, dtype_name, refs
from mergec.runtime.program.generation_settings import cut
from mergec.runtime.program.program import (
    DECODE,
    FINISH,
    PADS,
    PROMPT,
    Instruction,
    Ref,
    RoleProgram,
    needed,
)

# A shared constant comes from the server's bundle; it is shared at the start of a session.
_MAY_HOLD = {
    "client": frozenset({Vis.PUBLIC}),
    "server": frozenset({Vis.PUBLIC, Vis.SERVER, Vis.SHARED}),
    "dealer": frozenset({Vis.PUBLIC}),
}

_WHOLE, _TOKEN = "mpc.reveal", "mpc.reveal_token"
"""The ops that tell the client something: a value, and the token that it chooses."""


def validate(program: RoleProgram, where: str) -> None:
    """Raise BundleError at the first fault of a program: names, ops, shapes, who may hold what."""
    if program.role not in ROLES:
        raise BundleError(f"{where}: unknown role {program.role!r}; one of {', '.join(ROLES)}")
    _check_tensors(program, where)
    known = _check_values(program, where)
    _check_padding(program, where)
    _check_revealed(program, where)
    for output in program.outputs:
        if output not in known:
            raise BundleError(f"{where}: the output {output!r} is never computed; {RECOMPILE}")
    _check_phases(program, known, where)
    outputs = set(program.outputs)
    for spec in program.inputs:
        if spec.cache_output is not None and spec.cache_output not in outputs:
            raise BundleError(
                f"{where}: the cache {spec.name!r} continues as {spec.cache_output!r}, which is "
                f"not an output; {RECOMPILE}"
            )
        # What a step takes for public must not be a secret of the step before.
        if spec.cache_output is not None:
            for name, vis in ((spec.name, spec.vis), (spec.cache_output, known[spec.cache_output])):
                if vis is not Vis.SHARED:
                    raise BundleError(
                        f"{where}: {name!r} is {vis.value}, but caches are shared; do not use it, "
                        f"{RECOMPILE}"
                    )


def _check_padding(program: RoleProgram, where: str) -> None:
    """The number of padded tokens is the client's, and the manifest says that there is one."""
    for spec in program.inputs:
        held = (spec.vis, dtype_name(spec.dtype), spec.shape, spec.cache_output)
        if spec.name == PADS and held != (Vis.CLIENT, "int64", (1,), None):
            raise BundleError(
                f"{where}: the input {PADS!r} is not one number of the client's; do not use it, "
                f"{RECOMPILE}"
            )
    if program.pads != (program.manifest.pad_token >= 0) or (program.pads and program.phases):
        raise BundleError(
            f"{where}: the manifest's pad_token is {program.manifest.pad_token}, which does not "
            f"fit the inputs; {RECOMPILE}"
        )


def _check_revealed(program: RoleProgram, where: str) -> None:
    """What the program reveals, and with which noise, must be what the manifest tells people."""
    manifest = program.manifest
    for item in program.instructions:
        if item.target == _WHOLE:
            noise = _arguments(item).get("noise", 0.0)
            if not manifest.reveals_logits:
                fault = "reveals logits, but the manifest says the token alone"
            elif isinstance(noise, Ref) or noise != manifest.logit_noise:
                said = "a computed value" if isinstance(noise, Ref) else cut(noise)
                fault = f"reveals with noise {said}, but the manifest says {manifest.logit_noise}"
            else:
                continue
        elif item.target == _TOKEN and manifest.reveals_logits:
            fault = "reveals a token, but the manifest says logits"
        else:
            continue
        raise BundleError(
            f"{where}: {item.name!r} ({item.target}) {fault}; do not use it, {RECOMPILE}"
        )


def _check_phases(program: RoleProgram, known: Mapping[str, Vis], where: str) -> None:
    """A phase must be able to compute its outputs from its inputs and the constants alone."""
    names = [phase.name for phase in program.phases]
    # An encoder-decoder has two at least; a decoder has none, or resends its hidden state.
    fewest = [PROMPT, DECODE] if program.encodes else []
    if names not in (fewest, [PROMPT, DECODE, FINISH]):
        raise BundleError(
            f"{where}: the phases are not prompt and decode, and the finish; {RECOMPILE}"
        )
    if program.encodes != (program.manifest.answer_start >= 0):
        raise BundleError(
            f"{where}: the manifest's answer_start is {program.manifest.answer_start}, which does "
            f"not fit the phases; {RECOMPILE}"
        )
    defined = [
        (item.name, [ref.name for ref in refs((item.args, item.kwargs))])
        for item in program.instructions
    ]
    for phase in program.phases:
        # The tokens of an encoder-decoder's source come first, and those of its answer in any step
        # that does not start from a hidden state.
        answers = phase.name == PROMPT or not program.resends
        tokens = int(phase.name == PROMPT) + int(program.encodes and answers)
        for place, spec in enumerate(phase.inputs):
            wanted = Vis.CLIENT if place < tokens else Vis.SHARED
            if known.get(spec.name, wanted) is not wanted or spec.vis is not wanted:
                raise BundleError(
                    f"{where}: the input {spec.name!r} of the phase {phase.name} is not "
                    f"{wanted.value}; do not use it, {RECOMPILE}"
                )
        # The next step takes it for the hidden state, whatever it is; and for caches.
        passed_on = phase.outputs[:1] if program.resends and phase.name != FINISH else ()
        if program.encodes:
            passed_on += phase.outputs[1:]
        if any(known.get(name, Vis.SHARED) is not Vis.SHARED for name in passed_on):
            raise BundleError(
                f"{where}: the output {passed_on[0]!r} of the phase {phase.name} is not "
                f"shared; do not use it, {RECOMPILE}"
            )
        lacking = [
            spec.name
            for spec in phase.inputs
            if spec.cache_output is not None and spec.cache_output not in phase.outputs
        ]
        if lacking and program.encodes:
            raise BundleError(
                f"{where}: the phase {phase.name} does not give the cache {lacking[0]!r}; "
                f"{RECOMPILE}"
            )
        given = {spec.name for spec in phase.inputs}
        missing = sorted((given | set(phase.outputs)) - set(known))
        run = {defined[i][0] for i in needed(defined, given, phase.outputs)}
        there = given | run | {constant.name for constant in program.constants}
        missing += [
            used for name, uses in defined if name in run for used in uses if used not in there
        ]
        if missing or not set(phase.outputs) <= there:
            raise BundleError(
                f"{where}: the phase {phase.name} lacks {(missing or phase.outputs)[0]!r}; "
                f"{RECOMPILE}"
            )


def _check_tensors(program: RoleProgram, where: str) -> None:
    declared = {spec.name: spec for spec in program.constants}
    may_hold = _MAY_HOLD[program.role]
    for name, tensor in program.tensors.items():
        if name not in declared:
            raise BundleError(
                f"{where}: the {program.role}'s bundle holds a tensor {name!r} that the program "
                f"does not declare; {RECOMPILE}"
            )
        spec = declared[name]
        if spec.vis not in may_hold:
            raise BundleError(
                f"{where}: the {program.role}'s bundle holds {name!r}, which is for the "
                f"{spec.vis.value} alone; do not use it, {RECOMPILE}"
            )
        if dtype_name(tensor.dtype) != dtype_name(spec.dtype) or tuple(tensor.shape) != spec.shape:
            raise BundleError(
                f"{where}: the tensor {name!r} is {dtype_name(tensor.dtype)} "
                f"{list(tensor.shape)} instead of {dtype_name(spec.dtype)} {list(spec.shape)}; "
                f"{RECOMPILE}"
            )
    for spec in program.constants:
        if spec.vis in may_hold and spec.name not in program.tensors:
            raise BundleError(f"{where}: the tensor {spec.name!r} is missing; {RECOMPILE}")


def _check_values(program: RoleProgram, where: str) -> dict[str, Vis]:
    """Every value by name; each must be defined once, before its use, by a known op."""
    known: dict[str, Vis] = {}

    def define(name: str, vis: Vis) -> None:
        if name in known:
            raise BundleError(f"{where}: {name!r} is defined twice; {RECOMPILE}")
        known[name] = vis

    for constant in program.constants:
        define(constant.name, constant.vis)
    for given in program.inputs:
        define(given.name, given.vis)
    registry = load_all()
    for item in program.instructions:
        dialect = item.target.removeprefix("mpc.")
        is_op = dialect != item.target and dialect in registry
        if not is_op and item.target not in TABLE:
            remedy = f"{RECOMPILE} with this version"
            if dialect != item.target:
                remedy += f", or, if you trust it, install the package of that op ({ENTRY_POINTS})"
            raise BundleError(
                f"{where}: {item.name!r} needs the op {item.target}, which this mergec "
                f"({VERSION}) does not have; {remedy}"
            )
        uses = [ref.name for ref in refs((item.args, item.kwargs))]
        for used in uses:
            if used not in known:
                raise BundleError(
                    f"{where}: {item.name!r} ({item.target}) uses {used!r} before it is defined; "
                    f"{RECOMPILE}"
                )
        fault = _fault(item, known)
        if fault:
            raise BundleError(
                f"{where}: {item.name!r} ({item.target}) {fault}; do not use it, {RECOMPILE}"
            )
        define(item.name, item.vis)
    return known


def _fault(item: Instruction, known: Mapping[str, Vis]) -> str:
    """Why an instruction may not run, as the end of a sentence; empty if it may.

    A length and a failure of one party are visible to the other. So what an instruction does with
    a secret must not depend on the secret's value: neither the shape of the result nor whether
    there is one. And the result must be known to those roles that it is declared for, no more.
    """
    operands = [known[ref.name] for ref in refs((item.args, item.kwargs))]
    held: set[int | str] = set()
    if item.target.startswith("mpc."):
        op = REGISTRY[item.target.removeprefix("mpc.")]
        try:
            _arguments(item)
        except TypeError as error:
            return f"does not fit the op's schema {cut(op.schema)} ({error})"
        secret, moves, joined = _secret_parameters(op, operands), True, op.visibility(*operands)
        held = _keys(op, {name for name in op.tensors if op.operands.get(name) == "held"})
    else:
        secret = secret_parameters(item.target)
        moves = item.target in SECRET_MOVES
        joined = reduce(Vis.join, operands, Vis.PUBLIC)
        if item.target == SIZE:
            joined = Vis.PUBLIC
    for key, argument in [*enumerate(item.args), *item.kwargs.items()]:
        for ref in refs(argument):
            vis = known[ref.name]
            if key not in secret and vis is not Vis.PUBLIC:
                return f"depends on the value of {ref.name!r}, which is {_whose(vis)}"
            if key in held and vis is Vis.SHARED:
                return f"needs {ref.name!r} in the clear, but it is shared"
            if not moves and vis is Vis.SHARED:
                return f"computes with single shares of {ref.name!r}"
    if item.vis is Vis.PUBLIC and joined is not Vis.PUBLIC:
        return "makes a secret public"
    if item.vis is not joined:
        return f"is declared as {item.vis.value}, but is {joined.value}"
    return ""


def _arguments(item: Instruction) -> Mapping[str, Any]:
    """The arguments of a dialect op by parameter; TypeError if there are too many or too few."""
    reference = REGISTRY[item.target.removeprefix("mpc.")].reference
    return signature(reference).bind(*item.args, **item.kwargs).arguments


def _secret_parameters(op: type[Op], operands: Sequence[Vis]) -> set[int | str]:
    """Which arguments of a dialect op may be secret, as positions and names.

    Where one party computes the op alone, no operand whose values may make it fail is among these.
    """
    chosen = op.choosers if op.known_to(*operands) is not None else ()
    return _keys(op, set(op.tensors) - set(chosen))


def _keys(op: type[Op], names: set[str]) -> set[int | str]:
    """Parameters of a dialect op, as positions and names."""
    parameters = enumerate(signature(op.reference).parameters)
    return {key for place, name in parameters if name in names for key in (place, name)}


def _whose(vis: Vis) -> str:
    return "shared" if vis is Vis.SHARED else f"known to the {vis.value} alone"
