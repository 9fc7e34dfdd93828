"""Runs a program for one party: a dataflow scheduler that lets independent ops share rounds."""

from __future__ import annotations

import heapq
import inspect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch

from mergec.runtime.core.context import NUMPY, Context, ShapeContext
from mergec.runtime.core.messages import (
    Message,
    Protocol,
    Swap,
    ToClient,
    ToServer,
    as_reply,
    as_tuple,
)
from mergec.runtime.core.op import REGISTRY, Op
from mergec.runtime.core.spec import CLIENT, DEALER, FRACTIONAL_BITS, SERVER, Cost, Vis
from mergec.runtime.core.structural import decode_literal, function
from mergec.runtime.core.values import (
    OWNER,
    Held,
    Masked,
    Sent,
    Shared,
    Weight,
    encode,
    scale_rows,
    visibility,
)
from mergec.runtime.ops import load_all
from mergec.runtime.program.program import Instruction, Ref, RoleProgram, needed
from mergec.runtime.protocols.local import as_share
from mergec.runtime.protocols.shared_weights import (
    open_constant,
    share_constant,
    tell_constant_seed,
)
from mergec.runtime.protocols.weights import Constant, reuse_weight, share_weight
from mergec.runtime.transport.traffic import Exchange

_INT32_LIMIT = 2**31 - 1

_CPU = torch.device("cpu")

_PARTS: dict[type[Any], tuple[str, ...]] = {
    Shared: ("share",),
    Masked: ("opened", "mask"),
    Sent: ("opened", "mask"),
}
"""The tensors that a secret value consists of, in their order."""

_SECRET = tuple(_PARTS)

_PIECE = 1 << 20
"""Elements of a weight that are encoded at once."""


@dataclass
class StepRecord:
    """What one step cost, counted as it ran: in all, and by instruction."""

    total: Cost = field(default_factory=Cost)
    by_instruction: dict[str, Cost] = field(default_factory=dict)


@dataclass(slots=True)
class _Spent:
    """What an instruction took so far, counted many times in a step."""

    rounds: int = 0
    online: int = 0
    offline: int = 0


class Executor:
    """One party's side of a session: `setup` once, then `step` for the prompt and each token."""

    def __init__(
        self,
        program: RoleProgram,
        context: Context,
        link: Exchange | None,
        encoded: Mapping[str, torch.Tensor] | None = None,
        kept: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """`link` is None at the dealer, which exchanges nothing with the two parties.

        encoded: the server's weights as `take_weights` gave them, which sessions can share.
        kept: `hidden_weights` of an earlier session under the same masks, at the client; anything
        but None at the server. Then they are not sent.
        """
        load_all()
        self.program = program
        self.context = context
        self.record = StepRecord()
        self._link = link
        self._held: dict[str, Any] = {}
        self._weights: dict[str, Constant] = {}
        self._encoded = dict(encoded or {})
        self._kept = kept
        self.plan = [Planned(item, context.device) for item in program.instructions]
        self._parts = self._weight_parts()
        index = {planned.name: i for i, planned in enumerate(self.plan)}
        self.dependencies = [
            {index[name] for name in planned.refs if name in index} for planned in self.plan
        ]
        self._schedules: dict[tuple[frozenset[str], tuple[str, ...]], _Schedule] = {}

    def setup(self) -> None:
        """Load the constants, and put the server's weights under their static masks."""
        wanted, device = self._weight_bits(), self.context.device
        if any(spec.vis is Vis.SHARED for spec in self.program.constants):
            self._drive(tell_constant_seed(self.context))
        for spec in self.program.constants:
            data = self.program.tensors.get(spec.name)
            if spec.vis is Vis.PUBLIC:
                if data is None:
                    raise KeyError(f"the bundle lacks the public tensor {spec.name}")
                self._held[spec.name] = data.to(device)
                continue
            dtype = getattr(torch, spec.dtype.removeprefix("torch."))
            if self.context.party != OWNER.get(spec.vis, SERVER) or data is None:
                data = torch.empty(spec.shape, dtype=dtype, device="meta")
            if spec.vis is Vis.SHARED:
                self._share(spec.name, data, wanted)
                continue
            self._held[spec.name] = Held(spec.vis, data if data.is_meta else data.to(device))
            if spec.name in wanted:
                bits = self.context.fixed + wanted[spec.name]
                words = self._words(spec.name, data, bits)
                if self._kept is None:
                    sent = share_weight(self.context, spec.name, words, bits)
                    self._weights[spec.name] = self._drive(sent)
                else:
                    hidden = self._kept.get(spec.name, words)
                    self._weights[spec.name] = reuse_weight(self.context, words, hidden, bits)

    def hidden_weights(self) -> dict[str, torch.Tensor]:
        """What the client has of the server's weights: W - B, by name."""
        return {n: w.difference for n, w in self._weights.items() if isinstance(w, Weight)}

    def step(self, inputs: dict[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Run what leads from `inputs` to `outputs`, by default the program's; gives them by name.

        An input may stand for the result of an instruction. `record` then says what it cost.
        """
        self.record = StepRecord()
        wanted = tuple(self.program.outputs if outputs is None else outputs)
        schedule = self._schedule(frozenset(inputs), wanted)
        values: dict[str, Any] = {**self._held, **inputs}
        left, uses, ready = schedule.left.copy(), schedule.uses.copy(), schedule.ready.copy()
        waiting: dict[int, tuple[Protocol, Any]] = {}
        spent: defaultdict[int, _Spent] = defaultdict(_Spent)
        rounds = 0

        def finish(i: int, result: Any) -> None:
            planned = self.plan[i]
            values[planned.name] = result
            for j in schedule.consumers[i]:
                left[j] -= 1
                if left[j] == 0:
                    heapq.heappush(ready, j)
            for name in planned.refs:
                uses[name] -= 1
                if uses[name] == 0:
                    del values[name]

        def advance(i: int, protocol: Protocol, reply: Any) -> None:
            before = self.context.offline_bytes
            try:
                waiting[i] = (protocol, protocol.send(reply))
            except StopIteration as stop:
                finish(i, stop.value)
            if self.context.offline_bytes != before:
                spent[i].offline += self.context.offline_bytes - before

        while ready or waiting:
            while ready:
                i = heapq.heappop(ready)
                result = self._start(self.plan[i], values)
                if isinstance(result, _Running):
                    advance(i, result.protocol, None)
                else:
                    finish(i, result)
            if waiting:
                batch = sorted(waiting.items())
                waiting.clear()
                messages = [as_tuple(yielded) for _, (_, yielded) in batch]
                replies = iter(self._exchange([m for group in messages for m in group]))
                rounds += 1
                for (i, (protocol, yielded)), group in zip(batch, messages, strict=True):
                    spent[i].rounds += 1
                    spent[i].online += sum(map(_online_bytes, group))
                    reply = [next(replies) for _ in group]
                    advance(i, protocol, as_reply(yielded, reply))
        self._note(rounds, spent)
        return {name: values[name] for name in wanted}

    def _note(self, rounds: int, spent: Mapping[int, _Spent]) -> None:
        for i, of in spent.items():
            cost = Cost(of.rounds, of.online, of.offline)
            self.record.by_instruction[self.plan[i].name] = cost
        online = sum(of.online for of in spent.values())
        offline = sum(of.offline for of in spent.values())
        self.record.total = Cost(rounds, online, offline)

    def _schedule(self, given: frozenset[str], wanted: tuple[str, ...]) -> _Schedule:
        """The schedule of a step, made when such a step is first run."""
        if (given, wanted) not in self._schedules:
            defined = [(planned.name, planned.refs) for planned in self.plan]
            active = needed(defined, given, wanted)
            uses = Counter(wanted)
            consumers: list[list[int]] = [[] for _ in self.plan]
            left = [0] * len(self.plan)
            for i in active:
                uses.update(self.plan[i].refs)
                operands = self.dependencies[i].intersection(active)
                left[i] = len(operands)
                for j in operands:
                    consumers[j].append(i)
            ready = [i for i in active if not left[i]]
            self._schedules[given, wanted] = _Schedule(consumers, left, dict(uses), ready)
        return self._schedules[given, wanted]

    def _start(self, planned: Planned, values: dict[str, Any]) -> Any:
        operands = [values[name] for name in planned.refs]
        op = planned.op
        if op is None:
            return apply_function(self.context, planned.call, operands)
        known = op.known_to(*[visibility(value) for value in operands if is_tensor(value)])
        if known is not None:
            return apply_locally(known, planned.call, operands)
        bound = dict(zip(planned.parameters, planned.arguments(operands), strict=True))
        known_of = [visibility(v) if is_tensor(v) else v for v in bound.values()]
        for parameter, form in op.forms(*known_of).items():
            if form in ("share", "fixed", "window") and isinstance(bound[parameter], Masked):
                masked = bound[parameter]
                bound[parameter] = Shared(as_share(self.context, masked, masked.frac), masked.frac)
        for parameter, name in planned.constants:
            if name in self._weights:
                bound[parameter] = self._weights[name]
        return self._shared(planned, bound)

    def _shared(self, planned: Planned, bound: dict[str, Any]) -> Any:
        """Begin the protocol of an op that nobody can compute alone."""
        op = planned.op
        if op is None:
            raise TypeError(f"{planned.instruction.target} has no protocol")
        return _Running(op.protocol(self.context, *bound.values()))

    def _weight_bits(self) -> dict[str, int]:
        """The server's constants, held or shared, that an op wants under a static mask.

        And how many fractional bits they have beyond the program's.
        """
        held = {spec.name for spec in self.program.constants if spec.vis is not Vis.PUBLIC}
        bits: dict[str, int] = {}
        for planned in self.plan:
            if planned.op is None or planned.instruction.vis is not Vis.SHARED:
                continue
            for _, name in planned.constants:
                if name in held:
                    bits[name] = planned.argument("bits") or 0
        return bits

    def _weight_parts(self) -> dict[str, Sequence[int]]:
        """Constants some of whose rows have further fractional bits, see `mpc.linear`."""
        found = {}
        for planned in self.plan:
            parts = planned.argument("parts") if planned.op is not None else None
            if parts:
                found[planned.argument("weight").name] = parts
        return found

    @classmethod
    def take_weights(cls, program: RoleProgram) -> dict[str, torch.Tensor]:
        """The server's weights as integers, by name; at the other roles there are none.

        The program gives up the real numbers that nothing else needs, one weight after the other,
        so that not all are held twice.
        """
        fixed = program.manifest.get("fractional_bits", FRACTIONAL_BITS)
        executor, tensors = cls(program, ShapeContext(fixed=fixed), None), program.tensors
        kept = {name for planned in executor.plan for name in planned.in_the_clear()}
        tied: dict[tuple[int, torch.Size, int], list[str]] = {}
        for name, bits in sorted(executor._weight_bits().items()):
            if name in tensors:
                key = (tensors[name].data_ptr(), tensors[name].shape, bits)
                tied.setdefault(key, []).append(name)
        result: dict[str, torch.Tensor] = {}
        for (_, _, bits), names in tied.items():
            encoded = executor._encode(names[0], tensors[names[0]], fixed + bits)
            result |= dict.fromkeys(names, encoded)
            for name in set(names) - kept:
                del tensors[name]
        return result

    def _encode(self, name: str, data: torch.Tensor, frac: int) -> torch.Tensor:
        """Fixed-point words, int32 where all fit, made in pieces: a weight in float64 is large."""
        flat = scale_rows(data, self._parts.get(name, ())).reshape(-1)
        largest = max(map(abs, map(float, torch.aminmax(flat)))) if flat.numel() else 0.0
        narrow = round(largest * 2.0**frac) <= _INT32_LIMIT
        words = torch.empty(flat.shape, dtype=torch.int32 if narrow else torch.int64)
        for piece, source in zip(words.split(_PIECE), flat.split(_PIECE), strict=True):
            piece.copy_(encode(source, frac))
        return words.reshape(data.shape).to(self.context.device)

    def _share(self, name: str, data: torch.Tensor, wanted: dict[str, int]) -> None:
        """Share a constant of the server's; a weight is used under its static mask alone."""
        frac = self.context.fixed + wanted.get(name, 0)
        words = self._words(name, data, frac)
        if name in wanted:
            weight: Masked = self._drive(open_constant(self.context, name, words, frac))
            self._weights[name] = self._held[name] = weight
        else:
            self._held[name] = share_constant(self.context, name, words, frac)

    def _words(self, name: str, data: torch.Tensor, frac: int) -> torch.Tensor:
        """A constant of the server's as integers; without data elsewhere."""
        if name in self._encoded:
            return self._encoded.pop(name).to(self.context.device)
        if data.is_meta:
            return torch.empty(data.shape, dtype=torch.int64, device="meta")
        return self._encode(name, data, frac)

    def _drive(self, protocol: Protocol) -> Any:
        reply = None
        while True:
            try:
                yielded = protocol.send(reply)
            except StopIteration as stop:
                return stop.value
            reply = as_reply(yielded, self._exchange(list(as_tuple(yielded))))

    def _exchange(self, messages: Sequence[Message]) -> list[Any]:
        """One round: everything that is due in either direction, in one message each way."""
        party = self.context.party
        if self._link is None or party == DEALER:
            return [_ghost(message) for message in messages]
        sent, received = _sent_by(party), _sent_by(SERVER - party)
        outgoing = [m.payload for m in messages if not isinstance(m, received)]
        incoming = [m.payload for m in messages if not isinstance(m, sent)]
        reply = self._link.exchange(_pack(outgoing), sum(p.nbytes for p in incoming))
        parts = iter(_unpack(reply, incoming, self.context.device))
        return [None if isinstance(m, sent) else next(parts) for m in messages]


@dataclass
class _Running:
    protocol: Protocol


@dataclass(frozen=True)
class _Schedule:
    """What of a step follows from the names of its inputs and outputs, by instruction or value.

    consumers: who waits for an instruction. left: for how many it waits itself. uses: how often a
    value is read, wanted outputs once more. ready: the instructions that can start at once.
    """

    consumers: list[list[int]]
    left: list[int]
    uses: dict[str, int]
    ready: list[int]


class Planned:
    """An instruction as a function of its operands: all else is looked up before the first step.

    refs: the names of the operands, in the order of the arguments. parameters: of an op, the names
    of its arguments. constants: those parameters that may be weights, and the names given for them.
    """

    def __init__(self, instruction: Instruction, device: torch.device = _CPU) -> None:
        self.instruction = instruction
        self.name, target = instruction.name, instruction.target
        self.op: type[Op] | None = REGISTRY[target[4:]] if target.startswith("mpc.") else None
        self.parameters: tuple[str, ...] = ()
        self._keywords: tuple[str, ...] = ()
        self._defaults: dict[str, Any] = {}
        if self.op is None:
            self._function = function(target)
            self._keywords = tuple(instruction.kwargs)
            arguments = [*instruction.args, *instruction.kwargs.values()]
        else:
            self._function = self.op.reference
            self._defaults = _defaults(self.op.reference)
            self.parameters = tuple(self._defaults)
            arguments = list(self.bind(instruction.args, instruction.kwargs).values())
        self.refs = list(_refs(arguments))
        self._arguments = [_decoded(argument, device) for argument in arguments]
        self._open = [(i, arg) for i, arg in enumerate(self._arguments) if any(_refs([arg]))]
        weights = self.op.weights if self.op is not None else ()
        named = [(parameter, self.argument(parameter)) for parameter in weights]
        self.constants = [(key, arg.name) for key, arg in named if isinstance(arg, Ref)]

    def arguments(self, operands: Sequence[Any]) -> list[Any]:
        """All arguments, with the operands in the places of the references."""
        rest = iter(operands)
        found = self._arguments.copy()
        for place, argument in self._open:
            found[place] = next(rest) if isinstance(argument, Ref) else _filled(argument, rest)
        return found

    def call(self, *operands: Any) -> Any:
        """The function, or the op's meaning in the clear, of these operands."""
        return self.apply(self.arguments(operands))

    def apply(self, arguments: Sequence[Any]) -> Any:
        """The same of all its arguments."""
        if not self._keywords:
            return self._function(*arguments)
        cut = len(arguments) - len(self._keywords)
        named = zip(self._keywords, arguments[cut:], strict=True)
        return self._function(*arguments[:cut], **dict(named))

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters of the op by name, in the order of the schema."""
        return {**self._defaults, **dict(zip(self._defaults, args, strict=False)), **kwargs}

    def in_the_clear(self) -> list[str]:
        """What the instruction reads but for weights, which it uses under their masks."""
        names = list(self.refs)
        if self.instruction.vis is Vis.SHARED:
            for _, name in self.constants:
                names.remove(name)
        return names

    def argument(self, parameter: str) -> Any:
        """The argument of a parameter as it is written; None where the op has no such parameter."""
        return self.bind(self.instruction.args, self.instruction.kwargs).get(parameter)


@cache
def _defaults(reference: Callable[..., Any]) -> dict[str, Any]:
    """The parameters of an op, and what stands for those that are not given."""
    parameters = inspect.signature(reference).parameters
    return {
        name: None if parameter.default is inspect.Parameter.empty else parameter.default
        for name, parameter in parameters.items()
    }


def _decoded(arg: Any, device: torch.device) -> Any:
    """An argument with its literals decoded; references stay."""
    if isinstance(arg, (list, tuple)):
        return [_decoded(item, device) for item in arg]
    return arg if isinstance(arg, Ref) else decode_literal(arg, device)


def _filled(arg: Any, operands: Iterator[Any]) -> Any:
    """A decoded argument with the next operands in the places of its references."""
    if isinstance(arg, list):
        return [_filled(item, operands) for item in arg]
    return next(operands) if isinstance(arg, Ref) else arg


def _refs(args: Sequence[Any]) -> Iterator[str]:
    for arg in args:
        if isinstance(arg, Ref):
            yield arg.name
        elif isinstance(arg, (list, tuple)):
            yield from _refs(arg)


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor, or a secret one."""
    return isinstance(value, (torch.Tensor, Shared, Masked, Sent, Held, Weight))


def apply_locally(vis: Vis, call: Callable[..., Any], operands: Sequence[Any]) -> Any:
    """Run a plaintext function on public operands and those that one party holds.

    Elsewhere the operands are meta tensors, and so is the result.
    """
    if vis is Vis.PUBLIC:
        return call(*operands)
    away = any(isinstance(value, Held) and value.value.is_meta for value in operands)

    def strip(value: Any) -> Any:
        if isinstance(value, Held):
            return value.value
        if isinstance(value, list):
            return [strip(item) for item in value]
        return value.to("meta") if away and isinstance(value, torch.Tensor) else value

    return _wrap(call(*map(strip, operands)), lambda tensor: Held(vis, tensor))


def apply_function(context: Context, call: Callable[..., Any], operands: Sequence[Any]) -> Any:
    """Run a structural or public function; on secret values, on each tensor they consist of.

    An operand may be a list of values, as a function such as a split gives them.
    """
    flat = [v for operand in operands for v in (operand if type(operand) is list else [operand])]
    secret = [value for value in flat if isinstance(value, _SECRET)]
    held = [value for value in flat if isinstance(value, Held)]
    if not secret:
        return apply_locally(held[0].vis if held else Vis.PUBLIC, call, operands)
    kind, frac = type(secret[0]), secret[0].frac
    if held or any(type(value) is not kind for value in secret):
        kind, frac = Shared, max(value.frac for value in secret)

        def unify(value: Any) -> Any:
            if isinstance(value, list):
                return [unify(item) for item in value]
            if isinstance(value, (Shared, Masked, Held)):
                return Shared(as_share(context, value, frac), frac)
            return value

        operands = [unify(operand) for operand in operands]
    results = [call(*[_part(v, name) for v in operands]) for name in _PARTS[kind]]
    return _joined(kind, results, frac)


def _part(value: Any, name: str) -> Any:
    if isinstance(value, _SECRET):
        return getattr(value, name)
    return [_part(item, name) for item in value] if type(value) is list else value


def _joined(kind: type[Any], results: Sequence[Any], frac: int) -> Any:
    """The secret value, or the list of them, of which a function gave each tensor by itself."""
    if isinstance(results[0], torch.Tensor):
        return kind(*results, frac)
    if isinstance(results[0], (list, tuple)):
        return [_joined(kind, parts, frac) for parts in zip(*results, strict=True)]
    return results[0]


def _wrap(result: Any, wrap: Callable[[torch.Tensor], Any]) -> Any:
    if isinstance(result, torch.Tensor):
        return wrap(result)
    if isinstance(result, (list, tuple)):
        return [_wrap(item, wrap) for item in result]
    return result


def _sent_by(party: int) -> type[Message]:
    return ToServer if party == CLIENT else ToClient


def _online_bytes(message: Message) -> int:
    size = message.payload.nbytes
    return 2 * size if isinstance(message, Swap) else size


def _ghost(message: Message) -> torch.Tensor:
    """What the dealer has in place of a reply. It knows no payload either, most often."""
    return message.payload if message.payload.is_meta else message.payload.to("meta")


def _pack(payloads: Sequence[torch.Tensor]) -> torch.Tensor | None:
    if not payloads:
        return None
    parts = [p.cpu().contiguous().view(-1).view(torch.uint8) for p in payloads]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _unpack(
    reply: torch.Tensor, payloads: Sequence[torch.Tensor], device: torch.device
) -> Iterator[torch.Tensor]:
    """The parts of a message, each like one of the payloads."""
    data, start = reply.numpy(), 0
    for like in payloads:
        # A view by numpy takes a third of the time that slice, type and shape take in torch.
        words = np.ndarray(like.shape, NUMPY[like.dtype], data.data, start)
        part = torch.from_numpy(words if words.flags.aligned else words.copy())
        start += words.nbytes
        yield part if device.type == "cpu" else part.to(device)
