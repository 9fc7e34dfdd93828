"""Runs a program for one party: a dataflow scheduler in which independent ops share rounds."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
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
from mergec.runtime.engine.packing import exchange, online_bytes, replies, send
from mergec.runtime.engine.plan import Plan, Planned, Schedule
from mergec.runtime.engine.rehearsal import Rounds, form
from mergec.runtime.engine.weights import Constants, load_constants
from mergec.runtime.kernels.spread import whole
from mergec.runtime.kernels.transfers import watched
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.transport.pipeline import Arriving, pipelined
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

    def add(self, other: _Spent) -> None:
        self.rounds += other.rounds
        self.online += other.online
        self.offline += other.offline


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
        return {name: whole(w.difference) for name, w in weights.items() if isinstance(w, Weight)}

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
        run = self._run(inputs, outputs)
        rounds = 0
        while run.start():
            batch, due = run.due()
            if rehearsed is not None:
                _compare(rehearsed, rounds, due, [self.plan.steps[i].name for i in batch])
            rounds += 1
            run.resume(exchange(self.context, self._link, due))
        _ended(rehearsed, rounds)
        self._note(rounds, run.spent)
        return run.outputs()

    def pieces(
        self,
        first: dict[str, Any],
        second: dict[str, Any],
        handed: Mapping[str, str],
        outputs: Sequence[str],
        rehearsed: Rounds | None = None,
    ) -> dict[str, Any]:
        """Run two steps that overlap: the second one begins where caches of the first are complete.

        first, second: their inputs. handed: outputs of the first step, by the name of the second
        one's input; the first has no other outputs. Each step has messages of its own, and those of
        one travel while this party computes the other. Returns the second step's `outputs`.

        Which instruction runs when follows from the program alone: in turns, each step takes the
        replies that it waits for, runs all that is ready, and sends what is due. So all roles draw
        masks in the same order, and messages arrive in the order in which they are waited for.
        rehearsed: the messages, from `Rehearsal.pieces`.
        """
        with watched(self.context.device), pipelined(self._link) as link:
            runs = [self._run(first, list(handed.values())), self._run(second, outputs, handed)]
            runs[0].hand(handed, runs[1])
            steps, rounds = self.plan.steps, 0
            travelling: list[tuple[list[Message], Arriving | None] | None] = [None, None]
            while True:
                for number, run in enumerate(runs):
                    waited, travelling[number] = travelling[number], None
                    if waited is not None:
                        run.resume(replies(self.context, waited[0], waited[1]))
                    if run.start():
                        batch, due = run.due()
                        if rehearsed is not None:
                            _compare(rehearsed, rounds, due, [steps[i].name for i in batch])
                        rounds += 1
                        travelling[number] = due, send(self.context, link, due)
                if travelling == [None, None]:
                    break
            _ended(rehearsed, rounds)
            spent: defaultdict[int, _Spent] = defaultdict(_Spent)
            for run in runs:
                for i, of in run.spent.items():
                    spent[i].add(of)
            self._note(rounds, spent)
            return runs[1].outputs()

    def _run(
        self,
        inputs: dict[str, Any],
        outputs: Sequence[str] | None,
        awaited: Collection[str] = (),
    ) -> _Run:
        """A step that is ready to start. awaited: names of inputs that it gets later."""
        self.record = StepRecord()
        wanted = tuple(self.program.outputs if outputs is None else outputs)
        values = {**self._constants.held, **inputs}
        schedule = self.plan.schedule(frozenset({*inputs, *awaited}), wanted)
        return _Run(
            self.plan, self.context, self._constants.weights, schedule, values, wanted, awaited
        )

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


class _Run:
    """A step under way: what is known, what can start, and which protocols wait for a reply."""

    def __init__(
        self,
        plan: Plan,
        context: Context,
        weights: Mapping[str, Any],
        schedule: Schedule,
        values: dict[str, Any],
        wanted: Sequence[str],
        awaited: Collection[str],
    ) -> None:
        self.spent: defaultdict[int, _Spent] = defaultdict(_Spent)
        self._steps, self._context, self._weights = plan.steps, context, weights
        self._values, self._wanted, self._consumers = values, wanted, schedule.consumers
        self._left, self._uses = schedule.left.copy(), schedule.uses.copy()
        self._ready = schedule.ready.copy()
        self._waiting: dict[int, tuple[Protocol, Any]] = {}
        self._batch: list[tuple[int, tuple[Protocol, Any]]] = []
        self._groups: list[tuple[Message, ...]] = []
        self._handed: dict[str, list[str]] = {}
        self._next: _Run | None = None
        self._readers: dict[str, list[int]] = {name: [] for name in awaited}
        if awaited:
            for i in plan.active({*values, *awaited}, wanted):
                for name in set(self._steps[i].refs) & self._readers.keys():
                    self._readers[name].append(i)
                    self._left[i] += 1
            self._ready = [i for i in self._ready if not self._left[i]]

    def hand(self, handed: Mapping[str, str], other: _Run) -> None:
        """Give results to another step as soon as they are there: its inputs, by name."""
        self._next = other
        for given, name in handed.items():
            self._handed.setdefault(name, []).append(given)

    def start(self) -> bool:
        """Run all that can run; returns whether something waits for a reply then."""
        while self._ready:
            i = heapq.heappop(self._ready)
            result = self._begin(self._steps[i])
            if isinstance(result, GeneratorType):
                self._advance(i, result, None)
            else:
                self._finish(i, result)
        return bool(self._waiting)

    def due(self) -> tuple[list[int], list[Message]]:
        """The instructions that wait, and their messages, in the order in which they are sent."""
        self._batch = sorted(self._waiting.items())
        self._waiting.clear()
        self._groups = [as_tuple(yielded) for _, (_, yielded) in self._batch]
        return [i for i, _ in self._batch], [m for group in self._groups for m in group]

    def resume(self, answers: Sequence[Any]) -> None:
        """Take the replies to what was due."""
        rest = iter(answers)
        for (i, (protocol, yielded)), group in zip(self._batch, self._groups, strict=True):
            self.spent[i].rounds += 1
            self.spent[i].online += sum(map(online_bytes, group))
            self._advance(i, protocol, as_reply(yielded, [next(rest) for _ in group]))
        self._batch, self._groups = [], []

    def outputs(self) -> dict[str, Any]:
        """The wanted values, at the end."""
        return {name: self._values[name] for name in self._wanted}

    def _begin(self, planned: Planned) -> Any:
        # A function of its own, so that no operand outlives its last use by a round.
        operands = [self._values[name] for name in planned.refs]
        result = evaluate(self._context, planned, operands, self._weights)
        if isinstance(result, Call):
            return result.op.protocol(self._context, *result.bound.values())
        return result

    def _advance(self, i: int, protocol: Protocol, reply: Any) -> None:
        before = self._context.offline_bytes
        try:
            self._waiting[i] = (protocol, protocol.send(reply))
        except StopIteration as stop:
            self._finish(i, stop.value)
        if self._context.offline_bytes != before:
            self.spent[i].offline += self._context.offline_bytes - before

    def _finish(self, i: int, result: Any) -> None:
        planned = self._steps[i]
        self._values[planned.name] = result
        self._release(self._consumers[i])
        for name in planned.refs:
            self._uses[name] -= 1
            if self._uses[name] == 0:
                del self._values[name]
        if self._next is not None:
            for given in self._handed.get(planned.name, ()):
                self._next._provide(given, result)

    def _provide(self, name: str, value: Any) -> None:
        self._values[name] = value
        self._release(self._readers[name])

    def _release(self, readers: Sequence[int]) -> None:
        for j in readers:
            self._left[j] -= 1
            if self._left[j] == 0:
                heapq.heappush(self._ready, j)


def _ended(rehearsed: Rounds | None, rounds: int) -> None:
    """Raise BundleError unless as many rounds were sent as were rehearsed."""
    if rehearsed is not None and rounds != len(rehearsed):
        raise BundleError(
            f"this step ended after {rounds} rounds instead of {len(rehearsed)}, so it might "
            "depend on secrets; do not use this bundle"
        )


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
