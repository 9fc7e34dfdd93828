"""What each role sees when a program runs, found by running its protocols on shapes.

Nothing here lists ops or protocols: a context watches which masks are drawn, which are spent, and
what is sent. So whatever an op opens shows up, and a message without a mask shows up as one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from inspect import signature
from typing import Any

import torch

from mergec.runtime.core.context import ShapeContext
from mergec.runtime.core.messages import Message, Swap, ToClient, ToServer
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import Vis
from mergec.runtime.engine.plan import Plan
from mergec.runtime.engine.rehearsal import Rehearsal, drive
from mergec.runtime.program.program import DECODE, FINISH, PROMPT, RoleProgram
from mergec.runtime.protocols.public_text import enter

SCHEMA = 1
"""Raised when a key of the JSON goes or changes its meaning."""

FRESH, HIGH, OWN, SERVERS = "fresh", "high", "client", "server"
STATIC, NONE = "static", "none"
"""Masks: drawn for one value, of which each party has a share; the same, of which only the high
bits are shown; known to the client; known to the server; drawn once for a constant and known to the
server; and no mask.
"""

_MASKS = {
    FRESH: "a fresh mask r that neither party knows",
    HIGH: "a fresh mask r that neither party knows; the server keeps the low bits",
    OWN: "a fresh mask a that only the client knows",
    SERVERS: "a fresh mask b that only the server knows",
    STATIC: "the static mask B that only the server knows",
    NONE: "NO MASK",
}

PROMPT_LENGTHS, PAST_LENGTHS = (2, 3, 4, 5, 9, 16, 32), (2, 3, 4, 5, 9, 64, 128)
"""Lengths at which a prompt, and a decode step, are counted. A formula must hold at all."""
EVEN_LENGTHS = (2, 4, 6, 8, 12, 64, 128)
"""The same for decode steps of encoder-decoders, whose source has half of these tokens."""


@dataclass(frozen=True)
class Growth:
    """A count of a step as a function of a length.

    formula: a polynomial of the length that gives every number of `at`; None if there is none of
    degree 2. at: the count at each length that was tried.
    """

    formula: str | None
    at: dict[int, int]

    def __str__(self) -> str:
        if self.formula is not None:
            return self.formula
        length, count = list(self.at.items())[-1]
        return f"{count:,} at {length}"


@dataclass(frozen=True)
class Seen:
    """One kind of message: who sees it, of which op, in which form and ring, under which mask.

    role: "client", "server" or "both". ring: bits of a word. bits: whether a word holds eight
    separate bits, masked by XOR. revealed: whether the op is one that tells the client on purpose.
    words: number of words by the kind of step: in a prompt by its tokens, in a decode step by the
    tokens before it, in the last step of a program that resends its hidden state by the tokens of
    the answer, in a public text by its tokens, and once at the setup.
    """

    role: str
    op: str
    ring: int
    bits: bool
    mask: str
    revealed: bool
    words: dict[str, Growth]

    @property
    def form(self) -> str:
        """What is seen, as a formula."""
        ring = "bit by bit" if self.bits else f"mod 2^{self.ring}"
        plus = "xor" if self.bits else "+"
        masked = {
            FRESH: f"x {plus} r",
            HIGH: "high bits of x + r",
            OWN: "x - a",
            SERVERS: "x + b",
            STATIC: "W - B",
            NONE: "x",
        }
        return f"{masked[self.mask]} {ring}"

    @property
    def hidden(self) -> str:
        """By which mask, in words."""
        return "revealed on purpose" if self.revealed else _MASKS[self.mask]


@dataclass(frozen=True)
class Extraction:
    """What the answers to some queries can at most determine of the weights.

    A query is one step: it returns one row of logits, or one token, and as many more of the model's
    heads. A step that checks drafts is one query for each of its tokens.
    weights: all of the server's numbers. vocabulary, width: rows and columns of the matrix that the
    logits come from, those of all heads together; 0 if there is none. honest: numbers that a client
    determines by following the protocol: with r = min(queries, width) independent rows it knows the
    space that the matrix's columns span, r (vocabulary - r) numbers, and nothing inside of it
    (Carlini et al., ICML 2024; Finlayson et al., COLM 2024); None if it sees tokens alone.
    deviating: numbers that a client determines if it adds errors to shares, at most one for each
    logit; None likewise.
    bits: what the answers hold, by counting them. everything: the fewest queries that could
    determine all weights, by the same counts; no attack is claimed to reach it.
    """

    queries: int
    weights: int
    vocabulary: int
    width: int
    honest: int | None
    deviating: int | None
    bits: int
    everything: int


@dataclass(frozen=True)
class Audit:
    """What the roles of a program see. `audit` makes one.

    seen: every kind of message between client and server. rounds, sent: rounds and bytes of a step,
    in both directions. dealt: bytes that the dealer sends in a step, by role. calibrated: the
    numbers from calibration that calls hold, by op and argument. facts: options and limits.
    """

    model: str
    program_hash: str
    seen: list[Seen]
    rounds: dict[str, Growth]
    sent: dict[str, Growth]
    dealt: dict[str, dict[str, Growth]]
    calibrated: dict[str, list[float]]
    extraction: Extraction
    facts: dict[str, Any]

    @property
    def unmasked(self) -> list[Seen]:
        """Messages that no mask hides and that no op reveals on purpose. There should be none."""
        return [seen for seen in self.seen if seen.mask == NONE and not seen.revealed]

    def to_json(self) -> str:
        """All fields, with `schema`, the version of the keys."""
        found = asdict(self)
        for row, seen in zip(found["seen"], self.seen, strict=True):
            row["form"] = seen.form
        return json.dumps({"schema": SCHEMA, **found}, indent=1)

    def to_text(self) -> str:
        """For people: a page of text with no line longer than it has to be."""
        return "\n".join([*_text(self)]) + "\n"


class Watch(ShapeContext):
    """Notes which masks are drawn and spent, and what is sent."""

    def __init__(self, **arithmetic: Any) -> None:
        super().__init__(**arithmetic)
        self.static = 0
        """Words of static masks that were drawn."""
        self.messages: list[tuple[Message, str]] = []
        """The messages since the last `take`, each with the kind of its mask."""
        self._kinds: dict[int, tuple[str, torch.Tensor]] = {}
        self._now: list[torch.Tensor] = []
        self._covered: dict[int, torch.Tensor] = {}

    def take(self) -> list[tuple[Message, str]]:
        """The messages since the last call, and forget them."""
        found, self.messages = self.messages, []
        self._kinds.clear()
        self._covered.clear()
        return found

    def mask(self, shape: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return self._drawn(FRESH, super().mask(shape, dtype))

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
            revealed = mask == NONE and isinstance(message, ToClient) and _reveals(op)
            kind = (
                _READERS[type(message)], part.planned.instruction.target, 8 * words.itemsize,
                words.dtype is torch.uint8, mask, revealed,
            )  # fmt: skip
            step.words[kind] = step.words.get(kind, 0) + words.numel()
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


def _text(found: Audit) -> Iterator[str]:
    facts = found.facts
    yield f"{found.model}: program {found.program_hash}"
    yield f"reveal: {facts['reveal']}; weights: {facts['weights']}; one semi-honest party corrupted"
    half = ", of which the source has half" if facts["encodes"] else ""
    # No encoder-decoder begins with public text.
    third = "" if facts["encodes"] else "; m: tokens of public text, if any"
    third = "; k: tokens of an answer" if facts["resends"] else third
    yield f"n: tokens of a prompt; p: tokens before a decode step{half}{third}"
    titles = {
        "server": "The server sees, of the client's shares and tokens",
        "both": "Client and server both see",
        "client": "The client sees",
    }
    for role, title in titles.items():
        rows = [seen for seen in found.seen if seen.role == role]
        yield from ("", f"{title}:")
        steps = list(dict.fromkeys(name for seen in rows for name in seen.words))
        head = ["op", "what", "mask", *(f"words, {name}" for name in steps)]
        yield from _columns([head, *(_row(seen, steps) for seen in rows)])
    yield from (
        "",
        "A mask is told by its ring and size, and hides one value. So each masked word is",
    )
    yield "uniform whatever x is, if the op's protocol adds the mask that it spends."
    if found.unmasked:
        listed = ", ".join(sorted({seen.op for seen in found.unmasked}))
        yield f"WARNING: sent without a mask, and not meant for the client: {listed}"
    else:
        yield "Nothing is sent without a mask but what is revealed to the client."
    yield from ("", "The dealer sees lengths, and knows every mask but no masked word. It sends:")
    dealt = [[role, *map(str, steps.values())] for role, steps in found.dealt.items()]
    names = list(found.rounds)
    yield from _columns([["to", *(f"bytes, {name}" for name in names)], *dealt])
    yield from ("", "Lengths, sizes and times:")
    yield "  everybody sees when a step begins, and its new and past tokens; the network sees the"
    yield "  sizes. All of these are functions of the lengths alone:"
    yield from _columns(
        [
            ["", *names],
            ["rounds", *map(str, found.rounds.values())],
            ["bytes", *map(str, found.sent.values())],
        ]
    )
    yield from _notes(found)


def _notes(found: Audit) -> Iterator[str]:
    facts, bounds = found.facts, found.extraction
    if facts["reveal"] == "token":
        yield "  and of temperature and top-k, which all roles know"
    if drafts := facts["speculate_up_to"]:
        yield f"  with drafts (at most {drafts:,} a step, made by the client): the new tokens of a"
        yield "  step tell server and dealer how many it checks, and the past of the next one how"
        yield "  many were right, or with speculate_fixed where too few were; of each draft the"
        yield "  client learns what it learns of a step"
        yield "  with a tree of drafts: also which draft each one follows, and which path was right"
    if facts.get("pads"):
        yield "  with padding (pad_prompt, chosen by the client): n and p count it, so of a prompt"
        yield "  they tell server and dealer the padded length; how much of it is padding only the"
        yield "  client knows. The number of tokens of the answer is told as without"
    if facts["tokenizer_in_hash"]:
        yield "  how text becomes tokens, and so these lengths, is covered by the program's hash"
    yield from ("", "From calibration, in all three bundles:")
    for name, values in found.calibrated.items():
        low, high = f"{min(values):.6g}", f"{max(values):.6g}"
        yield f"  {name}: {len(values)} numbers, {low} to {high}"
    yield "  fractional bits of values and weights, and where values are truncated: powers of two"
    if facts["lossy"]:
        yield "  how far the program is from its model (deviation in the manifest)"
    yield from ("", "Roundings:")
    if facts["rounding"] == "public":
        yield "  public: both parties know the coins that intermediate values are rounded by, so"
        yield "  the last bits of what is revealed depend on intermediate values, too"
    else:
        yield "  exact: the bits that decide how values are rounded stay with the server"
    yield from ("", f"The weights, {bounds.weights:,} numbers, after {bounds.queries:,} queries:")
    if heads := facts["medusa"]:
        said = "the token" if facts["reveal"] == "token" else "the logits"
        yield f"  each of {heads} heads reveals {said} of its guess wherever the model's own head"
        yield "  does; they are counted below"
    if bounds.honest is not None and bounds.deviating is not None:
        yield f"  logits: a matrix of {bounds.vocabulary:,} x {bounds.width:,} times a vector"
        yield f"  honest client: {bounds.honest:,} numbers, which determine the matrix's span"
        yield "    (Carlini et al., ICML 2024; Finlayson et al., COLM 2024)"
        yield f"  deviating client: at most {bounds.deviating:,} numbers, one for each logit;"
        yield f"    errors in the vector show the matrix itself in {bounds.width + 1:,} queries"
    else:
        yield "  honest or deviating client: no number, but the choices that they lead to"
    yield f"  by counting, the answers hold at most {bounds.bits:,} bits"
    yield f"  fewer than {bounds.everything:,} queries cannot determine all weights"


def _row(seen: Seen, steps: Sequence[str]) -> list[str]:
    return [seen.op, seen.form, seen.hidden, *(str(seen.words.get(name, "")) for name in steps)]


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows of cells as aligned lines."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield f"  {'  '.join(cells)}".rstrip()
