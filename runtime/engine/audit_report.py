"""What an audit of a program finds: as data, as JSON, and as a page of text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

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
