"""What each role sees when a program runs, found by running its protocols on shapes.

Nothing here lists ops or protocols: a context watches which masks are drawn, which are spent, and
what is sent. So whatever an op opens shows up, and a message without a mask shows up as one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from inspect import signature
from typing import Any

import torch

from mergec.runtime.core.context import ShapeContext
from mergec.runtime.core.messages import Message, Swap, ToClient, ToServer
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import Vis
from mergec.runtime.engine.audit_report import (
    FRESH,
    HIGH,
    NONE,
    OWN,
    SERVERS,
    STATIC,
    Audit,
    Extraction,
    Growth,
    Seen,
)
from mergec.runtime.engine.plan import Plan
from mergec.runtime.engine.rehearsal import Rehearsal, drive
from mergec.runtime.program.program import DECODE, FINISH, PROMPT, RoleProgram
from mergec.runtime.protocols.public_text import enter

PROMPT_LENGTHS, PAST_LENGTHS = (2, 3, 4, 5, 9, 16, 32), (2, 3, 4, 5, 9, 64, 128)
"""Lengths at which a prompt, and a decode step, are counted. A formula must hold at all."""
EVEN_LENGTHS = (2, 4, 6, 8, 12, 64, 128)
"""The same for decode steps of encoder-decoders, whose source has half of these tokens."""


class Watch(ShapeContext):
    """Notes which masks are drawn and spent, and what is sent."""

    def __init__(self, **arithmetic: Any) -> None:
        super().__init__(**arithmetic)
        self.static = 0
        """Words of static masks that were drawn."""
        self.messages: list[tuple[Message, str]] = []
        """The messages since the last `take`, each with the kind of its mask."""
        self._kinds: dict[int, tuple[str, torch.Tensor]] = {}
        self.halves: dict[int, int] = {}
        """Of the messages that were taken last, by their ids, those whose words have more than one
        number of the payload's type: how many."""
        self._now: list[torch.Tensor] = []
        self._covered: dict[int, torch.Tensor] = {}
        self._long: dict[int, int] = {}

    def take(self) -> list[tuple[Message, str]]:
        """The messages since the last call, and forget them."""
        found, self.messages = self.messages, []
        self.halves, self._long = self._long, {}
        self._kinds.clear()
        self._covered.clear()
        return found

    def mask(self, shape: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return self._drawn(FRESH, super().mask(shape, dtype))

    def long_mask(self, count: int, halves: int) -> torch.Tensor:
        words = self.mask((count, halves), torch.int32)
        self._long[id(words)] = halves
        return words

    def client_mask(self, shape: Sequence[int]) -> torch.Tensor:
        return self._drawn(OWN, torch.empty(tuple(shape), dtype=torch.int64, device="meta"))

    def server_mask(self, shape: Sequence[int]) -> torch.Tensor:
        return self._drawn(SERVERS, super().server_mask(shape))

    def weight_masks(self, name: str, shapes: Iterable[Sequence[int]]) -> Iterator[torch.Tensor]:
        for shape in shapes:
            self.static += math.prod(shape)
            yield torch.empty(tuple(shape), dtype=torch.int64, device="meta")

    def spend(self, mask: torch.Tensor) -> None:
        super().spend(mask)
        self._now.append(mask)

    def cover(self, parts: Iterable[torch.Tensor]) -> None:
        self._covered |= {id(part): part for part in parts}

    def sent(self, messages: Sequence[Message]) -> None:
        """Find the mask of each message among those that were spent for this round."""
        spent, self._now = self._now, []
        for message in messages:
            if id(message.payload) in self._covered:
                self.messages.append((message, HIGH))
                continue
            fits = [mask for mask in spent if _fits(mask, message)]
            kind = NONE
            if fits:
                spent = [mask for mask in spent if mask is not fits[0]]
                kind = self._kinds.get(id(fits[0]), (NONE, fits[0]))[0]
                if id(fits[0]) in self._long:
                    self._long[id(message)] = self._long[id(fits[0])]
            self.messages.append((message, kind))

    def _drawn(self, kind: str, words: torch.Tensor) -> torch.Tensor:
        # The tensor is kept, because another one could get its address.
        self._kinds[id(words)] = kind, words
        return words


def _fits(mask: torch.Tensor, message: Message) -> bool:
    payload = message.payload
    return mask.dtype == payload.dtype and mask.numel() == payload.numel()


Kind = tuple[str, str, int, bool, str, bool]
"""The fields of `Seen` that tell kinds apart: role, op, ring, bits, mask, revealed."""

SETUP, PUBLIC = "setup", "public text"
CONSTANTS, ROWS = "the weights", "keys and values of public text"

_LETTERS = {PROMPT: "n", DECODE: "p", FINISH: "k", PUBLIC: "m"}
"""What the length of a step is called in a formula."""


@dataclass
class _Step:
    """A step as it was played: words by kind, rounds, bytes online, and bytes dealt by role."""

    words: dict[Kind, int]
    rounds: int
    online: int
    dealt: dict[str, int]


def audit(program: RoleProgram, queries: int = 1000) -> Audit:
    """Audit a program; that of any role will do, as it needs no weights.

    queries: steps that a client is assumed to ask for. Raises BundleError if an instruction cannot
    run on shapes alone.
    """
    manifest = program.manifest
    watch = Watch(**manifest.arithmetic)
    rehearsal = Rehearsal(program, watch)
    seen = [*_setup(rehearsal, watch), *_public(program, watch)]
    limit = manifest.max_length or max(PROMPT_LENGTHS + PAST_LENGTHS) + 1
    pasts = EVEN_LENGTHS if program.encodes else PAST_LENGTHS
    steps = {
        PROMPT: {n: (n, 0) for n in PROMPT_LENGTHS if n <= limit},
        DECODE: {p: (1, p) for p in pasts if p < limit},
        FINISH: {k: (0, k) for k in PROMPT_LENGTHS if k <= limit and program.resends},
    }
    # Without caches, a step after the prompt is a longer prompt.
    caches = any(spec.cache_output for spec in program.inputs)
    played = {
        name: {length: _play(rehearsal, watch, *step) for length, step in lengths.items()}
        for name, lengths in steps.items()
        if lengths and (caches or name == PROMPT)
    }

    def growth(name: str, count: Callable[[_Step], int]) -> Growth:
        return _growth(_LETTERS[name], {at: count(step) for at, step in played[name].items()})

    def by_kind(kind: Kind) -> Callable[[_Step], int]:
        return lambda step: step.words.get(kind, 0)

    def dealt_to(role: str) -> Callable[[_Step], int]:
        return lambda step: step.dealt[role]

    kinds = {kind for steps in played.values() for step in steps.values() for kind in step.words}
    seen += [
        Seen(*kind, {name: growth(name, by_kind(kind)) for name in played})
        for kind in sorted(kinds)
    ]
    return Audit(
        manifest.model or "program",
        manifest.program_hash,
        seen,
        {name: growth(name, lambda step: step.rounds) for name in played},
        {name: growth(name, lambda step: step.online) for name in played},
        {
            role: {name: growth(name, dealt_to(role)) for name in played}
            for role in ("client", "server")
        },
        _calibrated(rehearsal.plan),
        _extraction(program, rehearsal.plan, queries),
        _facts(program, rehearsal.plan),
    )


def _setup(rehearsal: Rehearsal, watch: Watch) -> list[Seen]:
    """What is sent before the first step: constants under their static masks, and a seed."""
    rounds = rehearsal.setup
    watch.take()
    counts: dict[tuple[str, torch.dtype], int] = {}
    for message in (message for messages in rounds for message in messages):
        key = _READERS[type(message)], message.payload.dtype
        counts[key] = counts.get(key, 0) + message.payload.numel()
    found = []
    for (role, dtype), words in sorted(counts.items(), key=str):
        # The client's seed of shared constants need not be secret from anybody.
        seed = role == "server" and dtype is torch.uint8
        masked = role == "client" and words == watch.static
        found.append(
            Seen(
                role, "the seed of shared weights" if seed else CONSTANTS, 8 * dtype.itemsize,
                dtype is torch.uint8, STATIC if masked else NONE, seed,
                {SETUP: Growth(f"{words:,}", {0: words})},
            )
        )  # fmt: skip
    return found


def _public(program: RoleProgram, watch: Watch) -> list[Seen]:
    """What a session sends for a public text, if it has one."""
    specs = [spec for spec in program.inputs if spec.cache_output is not None]
    counts: dict[tuple[str, str], dict[int, int]] = {}
    for length in PROMPT_LENGTHS if specs and not program.phases else ():
        for spec in specs:
            shape = [length if isinstance(size, str) else size for size in spec.shape]
            words = torch.empty(shape, dtype=torch.int64, device="meta")
            drive(watch, enter(watch, words, spec.frac, spec.form))
        for message, mask in watch.take():
            at = counts.setdefault((_READERS[type(message)], mask), {})
            at[length] = at.get(length, 0) + message.payload.numel()
    letter = _LETTERS[PUBLIC]
    return [
        Seen(role, ROWS, 64, False, mask, False, {PUBLIC: _growth(letter, at)})
        for (role, mask), at in counts.items()
    ]


_READERS: dict[type[Message], str] = {Swap: "both", ToServer: "server", ToClient: "client"}


def _play(rehearsal: Rehearsal, watch: Watch, new: int, past: int) -> _Step:
    step = _Step({}, 0, 0, {})
    watch.dealt = dict.fromkeys(watch.dealt, 0)
    source = None if past == 0 else max(1, past // 2)
    for part in rehearsal.parts(new, past, source=source):
        op = part.planned.op
        step.rounds = max(step.rounds, part.start + len(part.rounds))
        for message, mask in watch.take():
            words = message.payload
            halves = watch.halves.get(id(message), 1)
            revealed = mask == NONE and isinstance(message, ToClient) and _reveals(op)
            kind = (
                _READERS[type(message)], part.planned.instruction.target,
                8 * words.itemsize * halves, words.dtype is torch.uint8, mask, revealed,
            )  # fmt: skip
            step.words[kind] = step.words.get(kind, 0) + words.numel() // halves
            step.online += words.nbytes * (2 if isinstance(message, Swap) else 1)
    step.dealt = dict(watch.dealt)
    return step


def _reveals(op: type[Op] | None) -> bool:
    return op is not None and op.result == "revealed"


def _growth(letter: str, at: dict[int, int]) -> Growth:
    """The counts, and the polynomial of degree 2 through the first three if it fits all others."""
    points = list(at.items())
    if len(set(at.values())) == 1:
        return Growth(f"{points[0][1]:,}", at)
    if len(points) < 4:
        return Growth(None, at)
    (x0, y0), (x1, y1), (x2, y2) = points[:3]
    first, second = Fraction(y1 - y0, x1 - x0), Fraction(y2 - y1, x2 - x1)
    square = (second - first) / (x2 - x0)
    linear = first - square * (x0 + x1)
    constant = y0 - linear * x0 - square * x0 * x0
    if any(constant + linear * x + square * x * x != y for x, y in points):
        return Growth(None, at)
    terms = [(square, f" {letter}^2"), (linear, f" {letter}"), (constant, "")]
    said = [f"{'-' if by < 0 else '+'} {_term(abs(by), power)}" for by, power in terms if by]
    return Growth(" ".join(said).removeprefix("+ "), at)


def _term(factor: Fraction, power: str) -> str:
    """A term of a polynomial: `12,345 n`, `n^2/2`."""
    number = f"{factor.numerator:,}" if factor.numerator != 1 or not power else ""
    below = f"/{factor.denominator}" if factor.denominator != 1 else ""
    return f"{number}{power}".strip() + below


def _calibrated(plan: Plan) -> dict[str, list[float]]:
    """Numbers that the compiler set in calls of ops that take some from calibration."""
    found: dict[str, list[float]] = {}
    for planned in plan.steps:
        op = planned.op
        if op is None or op.calibrate.__func__ is Op.calibrate.__func__:  # type: ignore[attr-defined]
            continue
        for name, parameter in signature(op.reference).parameters.items():
            default, value = parameter.default, planned.argument(name)
            numbers = isinstance(default, (int, float)) and isinstance(value, (int, float))
            if numbers and not isinstance(value, bool) and value != default:
                found.setdefault(f"{planned.instruction.target} {name}", []).append(value)
            elif default == () and value:
                found.setdefault(f"{planned.instruction.target} {name}", []).extend(value)
    return found


def _extraction(program: RoleProgram, plan: Plan, queries: int) -> Extraction:
    weights = sum(
        math.prod(spec.shape) for spec in program.constants if spec.vis in (Vis.SERVER, Vis.SHARED)
    )
    vocabulary, width = _last_matrix(program, plan)
    if program.manifest.reveals_logits:
        row = vocabulary or program.manifest.vocab_size or 1
        rank = min(queries, width, vocabulary)
        return Extraction(
            queries, weights, vocabulary, width, rank * (vocabulary - rank),
            min(queries * row, weights), queries * row * _REVEALED_BITS, -(-weights // row),
        )  # fmt: skip
    choices = 1 + program.manifest.medusa
    each = choices * math.log2(max(2, vocabulary // choices or program.manifest.vocab_size))
    fewest = math.ceil(weights * program.manifest.fractional_bits / each)
    return Extraction(
        queries, weights, vocabulary, width, None, None, math.ceil(queries * each), fewest
    )


_REVEALED_BITS = 32
"""Bits of a revealed word."""


def _last_matrix(program: RoleProgram, plan: Plan) -> tuple[int, int]:
    """Rows and columns of the matrix that the revealed values come from; zeros if there is none.

    Where several values are revealed, it is the matrix of all of them: their rows, and the columns
    of each row of activations that some of them come from.
    """
    steps = {planned.name: planned for planned in plan.steps}
    shapes = {spec.name: spec.shape for spec in program.constants}
    rows: dict[str, int] = {}
    columns: dict[tuple[str, ...], int] = {}
    for revealed in (planned for planned in plan.steps if _reveals(planned.op)):
        asked = [revealed]
        while asked:
            planned = asked.pop()
            found = [name for _, name in planned.constants if len(shapes.get(name, ())) == 2]
            before = [name for name in planned.refs if name in steps]
            if found:
                rows[found[0]], width = shapes[found[0]]
                columns[tuple(before)] = width
                break
            asked += [steps[name] for name in before]
    manifest = program.manifest
    # A head's matrix may be one with matrices of other layers that read the same activations.
    most = (1 + manifest.medusa) * manifest.vocab_size or sum(rows.values())
    return min(most, sum(rows.values())), sum(columns.values())


def _facts(program: RoleProgram, plan: Plan) -> dict[str, Any]:
    """Options of the program that decide who learns what."""
    manifest = program.manifest
    return {
        "reveal": manifest.reveal,
        "weights": manifest.weights,
        "rounding": manifest.rounding,
        "fractional_bits": manifest.fractional_bits,
        "max_length": manifest.max_length,
        "vocab_size": manifest.vocab_size,
        "tokenizer_in_hash": bool(manifest.tokenizer),
        "cached": any(spec.cache_output for spec in program.inputs),
        "resends": program.resends,
        "encodes": program.encodes,
        "speculate_up_to": manifest.speculate_up_to,
        "medusa": manifest.medusa,
        "lossy": manifest.lossy,
        "instructions": len(plan.steps),
        **({"pads": True} if program.pads else {}),
    }
