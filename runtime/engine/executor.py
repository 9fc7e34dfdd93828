"""Runs a program for one party: a dataflow scheduler in which independent ops share rounds."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import GeneratorType
from typing import Any

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.errors import BundleError
from mergec.runtime.core.messages import Message, Protocol, as_reply, as_tuple
from mergec.runtime.core.spec import Cost
from mergec.runtime.core.values import Weight
from mergec.runtime.engine.functions import Call, evaluate
from mergec.runtime.engine.packing import exchange, online_bytes
from mergec.runtime.engine.plan import Plan, Planned
from mergec.runtime.engine.rehearsal import Rounds, form
from mergec.runtime.engine.weights import Constants, load_constants
from mergec.runtime.kernels.transfers import watched
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.transport.traffic import Exchange


@dataclass
class StepRecord:
    """What one step cost, counted as it ran: in total, and by instruction."""

    total: Cost = field(default_factory=Cost)
    by_instruction: dict[str, Cost] = field(default_factory=dict)


@dataclass(slots=True)
class _Spent:
    """What an instruction took so far; updated many times in a step."""

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
        """link: None at the dealer, which exchanges no messages with the two parties.

        encoded: the server's weights as `take_weights` returns them; sessions can share them.
        kept: if not None, the masked weights of an earlier session under the same masks are used
        again and not sent: at the client `hidden_weights` of that session, at the server any
        mapping.
        """
        self.program = program
        self.context = context
        self.record = StepRecord()
        self.plan = Plan(program)
        self._link = link
        self._constants = Constants()
        self._encoded = dict(encoded or {})
        self._kept = kept

    def setup(self) -> None:
        """Load the constants, and put the server's weights under their static masks.

        Raises KeyError if the program lacks a public tensor.
        """
        with watched(self.context.device):
            self._constants = load_constants(
                self.plan, self.context, self.drive, self._encoded, self._kept
            )

    def hidden_weights(self) -> dict[str, torch.Tensor]:
        """The client's view of the server's weights: W - B, by name."""
        weights = self._constants.weights
        return {name: w.difference for name, w in weights.items() if isinstance(w, Weight)}

    def step(
        self,
        inputs: dict[str, Any],
        outputs: Sequence[str] | None = None,
        rehearsed: Rounds | None = None,
    ) -> dict[str, Any]:
        """Run the instructions that lead from `inputs` to `outputs`; return the outputs by name.

        outputs: by default the program's. An input may stand for the result of an instruction,
        which then does not run. rehearsed: the messages of this step, from `Rehearsal.step`; raises
        BundleError before a round is sent that differs. Afterwards `record` holds the rounds and
        bytes of this step.
        """
        with watched(self.context.device):
            return self._step(inputs, outputs, rehearsed)

    def _step(
        self,
        inputs: dict[str, Any],
        outputs: Sequence[str] | None,
        rehearsed: Rounds | None,
    ) -> dict[str, Any]:
        self.record = StepRecord()
        wanted = tuple(self.program.outputs if outputs is None else outputs)
        schedule = self.plan.schedule(frozenset(inputs), wanted)
        steps, context, weights = self.plan.steps, self.context, self._constants.weights
        values: dict[str, Any] = {**self._constants.held, **inputs}
        left, uses, ready = schedule.left.copy(), schedule.uses.copy(), schedule.ready.copy()
        waiting: dict[int, tuple[Protocol, Any]] = {}
        spent: defaultdict[int, _Spent] = defaultdict(_Spent)
        rounds = 0

        def finish(i: int, result: Any) -> None:
            planned = steps[i]
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
            before = context.offline_bytes
            try:
                waiting[i] = (protocol, protocol.send(reply))
            except StopIteration as stop:
                finish(i, stop.value)
            if context.offline_bytes != before:
                spent[i].offline += context.offline_bytes - before

        def start(planned: Planned) -> Any:
            # A function of its own, so that no operand outlives its last use by a round.
            operands = [values[name] for name in planned.refs]
            result = evaluate(context, planned, operands, weights)
            if isinstance(result, Call):
                return result.op.protocol(context, *result.bound.values())
            return result

        while ready or waiting:
            while ready:
                i = heapq.heappop(ready)
                result = start(steps[i])
                if isinstance(result, GeneratorType):
                    advance(i, result, None)
                else:
                    finish(i, result)
            if waiting:
                batch = sorted(waiting.items())
                waiting.clear()
                messages = [as_tuple(yielded) for _, (_, yielded) in batch]
                due = [message for group in messages for message in group]
                if rehearsed is not None:
                    _compare(rehearsed, rounds, due, [steps[i].name for i, _ in batch])
                replies = iter(exchange(context, self._link, due))
                rounds += 1
                for (i, (protocol, yielded)), group in zip(batch, messages, strict=True):
                    spent[i].rounds += 1
                    spent[i].online += sum(map(online_bytes, group))
                    reply = [next(replies) for _ in group]
                    advance(i, protocol, as_reply(yielded, reply))
        if rehearsed is not None and rounds != len(rehearsed):
            raise BundleError(
                f"this step ended after {rounds} rounds instead of {len(rehearsed)}, so it might "
                "depend on secrets; do not use this bundle"
            )
        self._note(rounds, spent)
        return {name: values[name] for name in wanted}

    def _note(self, rounds: int, spent: Mapping[int, _Spent]) -> None:
        for i, of in spent.items():
            cost = Cost(of.rounds, of.online, of.offline)
            self.record.by_instruction[self.plan.steps[i].name] = cost
        online = sum(of.online for of in spent.values())
        offline = sum(of.offline for of in spent.values())
        self.record.total = Cost(rounds, online, offline)

    def drive(self, protocol: Protocol) -> Any:
        """Run one protocol alone, and return its result."""
        reply = None
        while True:
            try:
                yielded = protocol.send(reply)
            except StopIteration as stop:
                return stop.value
            messages = list(as_tuple(yielded))
            reply = as_reply(yielded, exchange(self.context, self._link, messages))


def _compare(
    rehearsed: Rounds, number: int, messages: Sequence[Message], names: Sequence[str]
) -> None:
    """Raise BundleError unless the messages are those of the rehearsed round of this number."""
    if number < len(rehearsed) and rehearsed[number] == list(map(form, messages)):
        return
    listed = ", ".join(names[:3])
    raise BundleError(
        f"round {number + 1} of this step, of {listed}, is not the one that its lengths tell, so "
        "it might depend on secrets; it was not sent; do not use this bundle"
    )
