"""Steps by mergec's own protocols."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from mergec.runtime.core.draw import Draw
from mergec.runtime.core.errors import BundleError
from mergec.runtime.core.messages import Protocol, together
from mergec.runtime.core.network import NETWORKS
from mergec.runtime.core.spec import DEALER, ROLES, SERVER
from mergec.runtime.core.values import Masked, Sent, Shared
from mergec.runtime.engine.rehearsal import (
    Rehearsal,
    Rounds,
    ghost_inputs,
    overlapped_seconds,
    step_cost,
)
from mergec.runtime.kernels.spread import pick_rows
from mergec.runtime.ops.cache_append import appended, make_room
from mergec.runtime.program.program import InputSpec, Phase
from mergec.runtime.protocols.public_text import enter
from mergec.runtime.session.ahead import Ahead, Prepared
from mergec.runtime.session.conversations import Place, block_marks, public_source
from mergec.runtime.session.public_text import PublicText, check_text
from mergec.runtime.session.steps import Cached, Session
from mergec.runtime.transport.traffic import Traffic

if TYPE_CHECKING:
    from mergec.runtime.core.context import Context
    from mergec.runtime.engine.executor import Executor

_LEAST_DIVIDED = 16
"""Steps of fewer tokens run as a whole: their messages are short beside the latency."""


class MergecSession(Session):
    """Runs steps with mergec's own protocols."""

    def __init__(
        self,
        executor: Executor,
        counted: Callable[[], Traffic],
        skip: Callable[[int], object] = lambda _: None,
    ) -> None:
        """skip: passes over bytes of the dealer's stream, at a party."""
        super().__init__(executor.program)
        self.ahead = Ahead()
        """Steps whose randomness was dealt, and that have not come yet."""
        self._skip = skip
        self._prepared: Prepared | None = None
        self.overlaps = False
        """At the client: whether `divide` may choose pieces."""
        self._executor = executor
        self._counted = counted
        # The dealer has nothing but shapes anyway, and sends neither party a message.
        if self.party != DEALER:
            self.rehearsal = Rehearsal(executor.program)
        self._step: tuple[int, int, Draw, int, tuple[int, ...], int] | None = None
        self._rounds: Rounds | None = None

    @property
    def _device(self) -> torch.device:
        return self._executor.context.device

    @property
    def salt(self) -> bytes:
        """The public salt of the randomness in use (`correlations.dpf`)."""
        return self._executor.context.salt

    def setup(self) -> None:
        self._executor.setup()

    def use(self, context: Context, skip: Callable[[int], object] = lambda _: None) -> None:
        """Take the masks of later steps from another context; static masks and ranks stay.

        skip: passes over bytes of what was dealt for them, at a party.
        """
        context.ranks = self._executor.context.ranks
        self._executor.context, self._skip = context, skip

    def follow(
        self, number: int, new: int, past: int, left_out: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Let the next step be step `number` of a plan, under masks of its own (`Context.branch`).

        left_out: steps of the plan before it that do not come. What was dealt for them is passed
        over, and nobody reads their masks' streams.
        """
        if self.party != DEALER:
            self._skip(sum(self.dealt(*step)[ROLES[self.party]] for step in left_out))
        self._prepared = Prepared(number, b"", new, past, self.dealt(new, past))

    def traffic(self) -> Traffic:
        result = self._counted().snapshot()
        # Corrections are counted when they are used, as the stream runs ahead of the step.
        result.offline_received = self._executor.context.offline_bytes
        result.offline_sent = 0
        return result

    def enter_public(self, texts: Sequence[PublicText]) -> None:
        for number, text in enumerate(texts):
            check_text(self.program, text)
            entered = self._executor.drive(
                together(*[self._enter(spec, text) for spec in self.cache_specs])
            )
            names = [spec.name for spec in self.cache_specs]
            caches = dict(zip(names, entered, strict=True))
            tokens = list(text.tokens)
            if text.head is not None:
                tokens = block_marks(number, len(tokens))
            self._others[public_source(number)] = Cached(caches, text.length, tokens)

    def _enter(self, spec: InputSpec, text: PublicText) -> Protocol:
        shape = [text.length if isinstance(size, str) else size for size in spec.shape]
        ghost = torch.empty(shape, dtype=torch.int64, device="meta")
        words = text.rows[spec.name] if self.party == SERVER else ghost
        return enter(self._executor.context, words, spec.frac, spec.form)

    def _fork(self, cache: Masked | Sent, joined: Sequence[Masked | Sent]) -> Masked | Sent:
        # In tensors of its own: the source may drop rows and write others over them.
        context = self._executor.context
        room = make_room(context, cache, sum(rows.shape[-2] for rows in joined))
        opened, mask = (part.narrow(-2, 0, room.used) for part in (room.opened, room.mask))
        result = replace(cache, opened=opened, mask=mask, room=room)
        for rows in joined:
            result = appended(context, result, rows)
        return result

    def _start(self) -> dict[str, Any]:
        return {spec.name: self._empty(spec) for spec in self.cache_specs}

    def _empty(self, spec: InputSpec) -> Masked | Sent:
        context = self._executor.context
        shape = spec.shape_of(0, 0)
        words = torch.zeros(shape, dtype=torch.int64, device=context.device)
        ghost = torch.empty(shape, dtype=torch.int64, device="meta")
        if spec.form == "sent":
            server = self.party == SERVER
            return Sent(words if server else ghost, ghost if server else words, spec.frac)
        return Masked(ghost if self.party == DEALER else words, words, spec.frac)

    def divide(self, new: int, past: int) -> None:
        self.split = 0
        network, rehearsal = NETWORKS[self.program.manifest.network], self.rehearsal
        latency = network.parties.latency
        if not (self.overlaps and self.continues and rehearsal and latency) or new < _LEAST_DIVIDED:
            return
        if self.ahead and (self.ahead.steps[0].new, self.ahead.steps[0].past) == (new, past):
            return  # it was dealt as a whole
        if new - new // 2 <= 1 + self.program.manifest.speculate_up_to:
            return  # the second half would reveal what only drafts are to be compared with
        whole = step_cost(rehearsal, new, past).waiting(network)
        halves = overlapped_seconds(rehearsal, new // 2, new, past, network)
        # Other than for the parties' messages both wait equally, for the dealer and for work.
        if halves < min(whole.prepared, whole.total):
            self.split = new // 2

    def divides(self, split: int, new: int) -> bool:
        whole = bool(self.branches.parents)
        return split == 0 or (self.continues and 0 < split < new and not whole)

    def rehearse(self, new: int, past: int, draw: Draw | None = None) -> None:
        source = self.source if past else new
        step = (new, past, draw or Draw(), source, self.branches.parents)
        if not self.divides(self.split, new):
            raise BundleError(f"a step of {new} tokens has no first piece of {self.split}")
        if self.rehearsal is None or (*step, self.split) == self._step:
            return
        if self.split:
            turns = self.rehearsal.pieces(self.split, new, past, draw)
            self._rounds = [turn.forms for turn in turns]
        else:
            self._rounds = self.rehearsal.step(*step)
        self._step = (*step, self.split)

    def _prepare(self, new: int, past: int, draw: Draw) -> None:
        self._executor.context.draw = draw
        self.rehearse(new, past, draw)

    @property
    def present(self) -> int:
        """Number of tokens in the parties' caches; the dealer's are ahead by what it has dealt."""
        return self.ahead.steps[0].past if self.ahead else self.length

    @property
    def ahead_end(self) -> int:
        """Number of tokens after the last step that was dealt ahead; `present` if there is none."""
        last = self.ahead.steps[-1] if self.ahead else None
        return self.length if last is None else last.past + last.new

    def enter_ahead(
        self, request: bytes, new: int, past: int, draw: Draw, place: Place
    ) -> Prepared:
        """Note that a step of these lengths is dealt now and may come later; all roles do so.

        It continues the last one that was dealt ahead, or the caches as they are: then those that
        were dealt before are thrown away. The dealer runs the step next. Raises BundleError if it
        continues something else, or if this program has no such steps.
        """
        here = Place.of(self._conversation)
        follows = past in (self.present, self.ahead_end) and not self._grown.obstacle(past, ())
        if not self.continues or place != here or not follows:
            raise BundleError(
                f"{new} tokens after {past} continue nothing; {self.ahead_end} would be next"
            )
        if past == self.present:
            self._throw_away()
        step = self.ahead.add(request, new, past, self.dealt(new, past, draw))
        if self.party == DEALER:
            self._prepared = step
        return step

    def take_ahead(self, request: bytes) -> bool:
        """Whether this step, which comes now, was dealt ahead; if not, what was is thrown away.

        Parties call this before each step, and then run it. The dealer has run it already if so.
        """
        step = self.ahead.take(request)
        if step is None:
            self._throw_away()
        elif self.party != DEALER:
            self._prepared = step
        return step is not None

    def _throw_away(self) -> None:
        """Throw away what was dealt ahead. Its masks are used for nothing else (`branch`)."""
        gone = self.ahead.clear()
        if not gone:
            return
        if self.party == DEALER:
            # Back to what the parties have: rows of steps that do not come, and their masks, go.
            self.length = gone[0].past
            self._roll_back(self.length)
        else:
            self._skip(sum(step.dealt[ROLES[self.party]] for step in gone))

    def dealt(self, new: int, past: int, draw: Draw | None = None) -> dict[str, int]:
        """Bytes that the dealer sends for a step of these lengths, by role; none at the dealer."""
        if self.rehearsal is None:
            return dict.fromkeys(ROLES, 0)
        return step_cost(self.rehearsal, new, past, draw).dealt

    @torch.inference_mode()
    def _execute(self, inputs: dict[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        step, self._prepared = self._prepared, None
        if step is None:
            return self._executor.step(inputs, outputs, self._rounds)
        context = self._executor.context
        before = context.offline_bytes
        with context.branch(step.number):
            result = self._executor.step(inputs, outputs, self._rounds)
        if self.party != DEALER and context.offline_bytes - before != step.dealt[ROLES[self.party]]:
            raise BundleError(
                f"a step of {step.new} tokens after {step.past} took other randomness than was "
                "dealt for it; do not use this bundle"
            )
        return result

    @torch.inference_mode()
    def _compute(
        self,
        phase: Phase,
        new: int,
        past: int,
        ids: Sequence[int] | None,
        parents: tuple[int, ...] = (),
    ) -> dict[str, Any]:
        split, self.split = self.split, 0
        if not split:
            return super()._compute(phase, new, past, ids, parents)
        name, tokens = phase.inputs[0].name, list(ids or ())
        first = {name: self._held(split, tokens[:split]), **self._padding(), **self._caches}
        later = ghost_inputs(phase, new - split, past + split)
        shapes = {spec.name: later[spec.name].opened for spec in self.cache_specs}
        known = self._executor.plan.lengths(shapes)
        second = {name: self._held(new - split, tokens[split:]), **self._padding(), **known}
        handed = {spec.name: spec.cache_output or "" for spec in self.cache_specs}
        return self._executor.pieces(first, second, handed, phase.outputs, self._rounds)

    def _cut(self, cache: Any, dim: int, length: int) -> Masked | Sent:
        opened, mask = (part.narrow(dim, 0, length) for part in (cache.opened, cache.mask))
        room = cache.room if dim == opened.dim() - 2 else None  # `Room` counts rows
        if room is not None:
            # What is dropped is continued by nobody, so later entries may be written over it.
            room.used = length
        return replace(cache, opened=opened, mask=mask, room=room)

    @torch.inference_mode()
    def _pick(self, cache: Any, dim: int, start: int, keep: Sequence[int]) -> Masked | Sent:
        if cache.room is None or dim != cache.opened.dim() - 2:
            raise BundleError("a cache of this program cannot drop tokens between others")
        for room in (cache.room.opened, cache.room.mask):
            pick_rows(room, start, keep)
        return self._cut(cache, dim, start + len(keep))

    def _line(self, phase: Phase, new: int, past: int) -> dict[str, Any]:
        given = {**ghost_inputs(phase, new, past), **self._sizes(new, past)}
        return self._executor.step(given, self._trees.names)

    def _join(self, values: Sequence[Any]) -> Any:
        return Shared(torch.cat([value.share for value in values], 1), values[0].frac)
