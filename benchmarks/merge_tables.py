"""What generating a text takes, from measured steps, and the page that sets it beside MERGE's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from harness import Share

from mergec.compiler.report.tables import markdown

CATEGORIES = ("embedding", "linear", "softmax", "head", "rest")
"""Where instructions are booked: see `PAGE`."""

GIB = 2**30

Shares = Mapping[str, Share]
"""Seconds and bytes by category."""


class MissingError(Exception):
    """A figure that was not measured, and that nothing measured determines."""


@dataclass(frozen=True)
class Kind:
    """A model of the paper's tables, and the steps that a text of a length takes.

    source: whether the prompt is read by an encoder. prompt: its tokens. lengths: of texts.
    pasts: cached tokens before the decode steps that are measured; the first and the last of each
    of `lengths` lie between them. few: likewise, of CrypTen's, which take long.
    """

    title: str
    said: str
    source: bool
    prompt: int
    lengths: tuple[int, ...]
    pasts: tuple[int, ...]
    few: tuple[int, ...]

    def decoded(self, length: int) -> range:
        """Cached tokens before each decode step of a text.

        A decoder's text begins with the prompt; that of an encoder-decoder with its first token,
        which comes with the prompt, while the source's tokens are cached, too.
        """
        steps = length - 2 if self.source else length - self.prompt - 1
        return range(self.prompt, self.prompt + steps)


@dataclass(frozen=True)
class Point:
    """A step as it was measured: its lengths, rounds, and what is booked in each category.

    seconds: of the whole step. processor: those of all roles together, but CrypTen's third party.
    """

    new: int
    past: int
    seconds: float
    processor: float
    rounds: int
    shares: Shares

    def booked(self) -> Spent:
        """The step's seconds, split by the parties' work on each category."""
        work = sum(share.seconds for share in self.shares.values())
        return Spent(
            self.rounds,
            {
                name: Share(self.seconds * share.seconds / work, share.online, share.offline)
                for name, share in self.shares.items()
            },
        )


@dataclass(frozen=True)
class Spent:
    """Rounds of some steps, and their seconds and bytes by category."""

    rounds: float = 0
    shares: Shares = field(default_factory=dict)

    @property
    def total(self) -> Share:
        return sum(self.shares.values(), Share())

    def __add__(self, other: Spent) -> Spent:
        names = {**self.shares, **other.shares}
        return Spent(
            self.rounds + other.rounds,
            {n: self.shares.get(n, Share()) + other.shares.get(n, Share()) for n in names},
        )

    def times(self, factor: float) -> Spent:
        return Spent(
            self.rounds * factor,
            {
                name: Share(of.seconds * factor, of.online * factor, of.offline * factor)
                for name, of in self.shares.items()
            },
        )


@dataclass(frozen=True)
class Row:
    """A system on a model: its measured steps.

    counted: bytes and rounds by the cost model, of all decode steps of a text together, by number
    of new tokens and length as `key` joins them; empty where there is no cost model. They take the
    places of interpolated ones. load: processes that wanted a core when the row began, on average
    over a minute. failed: why there are no steps.
    """

    model: str
    system: str
    points: Sequence[Point] = ()
    counted: Mapping[str, Spent] = field(default_factory=dict)
    load: float = 0.0
    failed: str = ""

    def json(self) -> dict[str, Any]:
        """The row as stored."""
        return {
            "model": self.model,
            "system": self.system,
            "points": [{**vars(point), "shares": _stored(point.shares)} for point in self.points],
            "counted": {
                name: {"rounds": of.rounds, "shares": _stored(of.shares)}
                for name, of in self.counted.items()
            },
            "load": self.load,
            "failed": self.failed,
        }

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Row:
        """The row that `json` stored."""
        points = [Point(**{**p, "shares": _shares(p["shares"])}) for p in stored["points"]]
        counted = {
            name: Spent(of["rounds"], _shares(of["shares"]))
            for name, of in stored["counted"].items()
        }
        return cls(**{**stored, "points": points, "counted": counted})

    def prompt(self) -> Spent:
        """What the prompt's step takes."""
        return self._point(lambda point: point.past == 0 and point.new > 0, "the prompt").booked()

    def decode(self, kind: Kind, length: int, new: int = 1) -> Spent:
        """All decode steps of a text, each of `new` tokens: interpolated between measured pasts."""
        measured = {p.past: p.booked() for p in self.points if (p.new, p.past > 0) == (new, True)}
        steps = [between(measured, past) for past in kind.decoded(length)]
        total = sum(steps, Spent())
        counted = self.counted.get(key(new, length))
        if counted is None:
            return total
        return Spent(
            counted.rounds,
            {
                name: Share(
                    total.shares.get(name, Share()).seconds,
                    counted.shares.get(name, Share()).online,
                    counted.shares.get(name, Share()).offline,
                )
                for name in {**total.shares, **counted.shares}
            },
        )

    def finish(self, kind: Kind, length: int) -> Spent:
        """The last step, of a system that has one: a line through the measured ones.

        It is one product, whose rows are the text's hidden states.
        """
        ends = {p.past: p.booked() for p in self.points if p.new == 0}
        if not ends:
            return Spent()
        count = len(kind.decoded(length)) + 1
        if count in ends:
            return ends[count]
        if len(ends) < 2:
            raise MissingError(f"{self.system}: one last step does not tell what another takes")
        few, many = min(ends), max(ends)
        return ends[few] + _slope(ends, few, many).times(count - few)

    @property
    def by_processor(self) -> Row:
        """The row with processor seconds in the place of seconds."""
        return replace(self, points=[replace(p, seconds=p.processor) for p in self.points])

    def text(self, kind: Kind, length: int) -> Spent:
        """What generating a text of this length takes. Raises MissingError."""
        if self.failed:
            raise MissingError(self.failed)
        return self.prompt() + self.decode(kind, length) + self.finish(kind, length)

    def drafted(self, kind: Kind, length: int, drafts: Drafts, most: int) -> Spent:
        """The same where a step checks drafts, of which as many are right as `drafts` says.

        most: drafts of the larger steps that were measured; a step of fewer takes what lies
        between.
        """
        if self.failed:
            raise MissingError(self.failed)
        part = drafts.drafted / most
        if not 0 <= part <= 1:
            raise MissingError(f"{drafts.task}: {drafts.drafted:.2f} drafts a step, of {most}")
        plain, full = (self.decode(kind, length, new) for new in (1, 1 + most))
        steps = plain.times(1 - part) + full.times(part)
        return self.prompt() + steps.times(1 / drafts.a_step)

    def _point(self, wanted: Any, name: str) -> Point:
        found = [point for point in self.points if wanted(point)]
        if not found:
            raise MissingError(f"{self.system}: {name} was not measured")
        return found[0]


def key(new: int, length: int) -> str:
    """The name of the decode steps of a text, each of `new` tokens."""
    return f"{new} new, {length}"


def between(measured: Mapping[int, Spent], past: int) -> Spent:
    """What a step after `past` tokens takes, on the line between the nearest measured ones.

    Raises MissingError beyond the first and the last.
    """
    if past in measured:
        return measured[past]
    low = max((p for p in measured if p < past), default=None)
    high = min((p for p in measured if p > past), default=None)
    if low is None or high is None:
        raise MissingError(f"no step was measured on both sides of {past} cached tokens")
    return measured[low] + _slope(measured, low, high).times(past - low)


def _slope(measured: Mapping[int, Spent], low: int, high: int) -> Spent:
    return (measured[high] + measured[low].times(-1)).times(1 / (high - low))


def _stored(shares: Shares) -> dict[str, list[float]]:
    return {name: [of.seconds, of.online, of.offline] for name, of in shares.items()}


def _shares(stored: Mapping[str, Sequence[float]]) -> dict[str, Share]:
    return {name: Share(*of) for name, of in stored.items()}


@dataclass(frozen=True)
class Drafts:
    """What a drafter achieved on a task: tokens a step, and drafts a step."""

    task: str
    a_step: float
    drafted: float


_ACHIEVED = re.compile(
    r"^\| (?P<task>[^|]+) \| lookup, up to (?P<most>\d+) \| (?P<a_step>[\d.]+) "
    r"\| (?P<right>\d+) of (?P<drafted>\d+) \|",
    re.MULTILINE,
)


def achieved(page: str, most: int) -> list[Drafts]:
    """What `lookup` with up to `most` drafts achieved, by task, from docs/speculation.md.

    Raises MissingError if the page has no such row.
    """
    found = []
    for row in _ACHIEVED.finditer(page):
        a_step, right = float(row["a_step"]), int(row["right"])
        if int(row["most"]) == most and right:
            # Every step gives a token of its own, besides the right drafts.
            steps = right / (a_step - 1)
            found.append(Drafts(row["task"], a_step, int(row["drafted"]) / steps))
    if not found:
        raise MissingError(f"docs/speculation.md has no row of lookup with up to {most} drafts")
    return found


@dataclass(frozen=True)
class System:
    """A row of the tables: the paper's name, and how it runs here.

    paper: its row in the paper, if it has one. drafts: most drafts of a step.
    """

    name: str
    preset: str
    mode: str
    paper: str = ""
    drafts: int = 0

    @property
    def label(self) -> str:
        return f"{self.name}, by {'CrypTen' if self.mode == 'crypten' else 'mergec'}"


_PAPER_ROWS = {
    "CrypTen": "exact",
    "MPCFormer sm2relu": "mpcformer-2relu",
    "MPCFormer sm2quad": "mpcformer-2quad",
    "THE-X": "thex",
    "only ER": "merge-er",
    "only MM": "merge-mm",
    "MERGE": "merge",
}

BASELINE = System("CrypTen", "exact", "crypten", "CrypTen")
DRAFTING = System("exact, drafts", "exact", "mergec", drafts=3)
SYSTEMS = (
    BASELINE,
    *(System(n, p, "crypten", n) for n, p in _PAPER_ROWS.items() if p != "exact"),
    *(System(n, p, "mergec", n) for n, p in _PAPER_ROWS.items() if p != "exact"),
    System("exact", "exact", "mergec"),
    DRAFTING,
)


@dataclass(frozen=True)
class Figure:
    """A row of the paper's tables: seconds and GiB, and in the order of `LOGGED` those of parts."""

    seconds: float
    gib: float
    part_seconds: tuple[float, ...] = ()
    part_gib: tuple[float, ...] = ()


LOGGED = ("embedding", "linear", "softmax")

PUBLISHED: Mapping[str, Mapping[str, Figure]] = {
    "gpt2-124m": {
        "CrypTen": Figure(1328, 322.5, (321.4, 251.9, 454.6), (71.4, 159.4, 1.6)),
        "MPCFormer sm2relu": Figure(1001, 317.2, (316.8, 253.6, 181.1), (71.4, 159.4, 0.5)),
        "MPCFormer sm2quad": Figure(973, 316.7, (318.2, 253.3, 152.5), (71.4, 159.4, 0.1)),
        "THE-X": Figure(966, 319.1, (329.3, 258.0, 87.7), (71.4, 159.4, 0.6)),
        "only ER": Figure(834, 168.5, (5.4, 260.4, 477.8), (1.2, 160.6, 1.6)),
        "only MM": Figure(747, 281.9),
        "MERGE": Figure(171, 121.8, (5.2, 157.5, 0.0), (1.2, 119.9, 0.0)),
    },
    "t5-138m": {
        "CrypTen": Figure(1569, 380.5),
        "MPCFormer sm2relu": Figure(1208, 364.7),
        "MPCFormer sm2quad": Figure(1149, 362.3),
        "THE-X": Figure(1050, 369.7),
        "only ER": Figure(874, 132.4, (8.2, 211.6, 596.7), (1.7, 120.2, 7.6)),
        "only MM": Figure(693, 257.9),
        "MERGE": Figure(144, 98.0, (7.6, 131.3, 0.0), (1.7, 95.7, 0.0)),
    },
}
"""Seconds and GiB of a text of 128 tokens: Liang et al., AAAI 2024, tables 1 and 2. Parts are from
the logs in the paper's repository (benchmark/results.org), where these add up to the published
total; the logs of the other rows are of other runs."""


def page(
    kinds: Mapping[str, Kind],
    rows: Sequence[Row],
    drafts: Sequence[Drafts],
    machine: Mapping[str, Any],
    table: int,
) -> str:
    """The page. table: the length of the text of tables 1 and 2."""
    shared = max((row.load for row in rows if row.points), default=0.0) > QUIET
    rows = [row.by_processor for row in rows] if shared else rows
    found = {(row.model, row.system): row for row in rows}
    clock = _SHARED if shared else _ALONE
    parts = [PAGE.format(**machine, clock=clock, length=table)]
    for name, kind in kinds.items():
        texts = texts_of(name, kind, found, drafts, table)
        parts += [
            f"## {kind.title}\n\n{kind.said}",
            f"### Seconds\n\n{markdown(SECONDS.cells(name, texts))}",
            f"### Bytes\n\n{markdown(BYTES.cells(name, texts))}",
            *_unmeasured(texts),
        ]
        if len(kind.lengths) > 1:
            parts.append(f"### Longer texts\n\n{LONGER}\n\n{_longer(name, kind, found, drafts)}")
    return "\n\n".join(parts) + "\n"


Texts = Mapping[tuple[System, str], "Spent | str"]
"""By system and name of the row: what a text takes, or why that is not known."""


def texts_of(
    model: str,
    kind: Kind,
    found: Mapping[tuple[str, str], Row],
    drafts: Sequence[Drafts],
    length: int,
) -> dict[tuple[System, str], Spent | str]:
    """What a text of this length takes in each system."""
    texts: dict[tuple[System, str], Spent | str] = {}
    for system in SYSTEMS:
        row = found.get((model, system.label), Row(model, system.label, failed="not measured yet"))
        named = [(f"{system.name}: {of.task}", of) for of in drafts] if system.drafts else []
        for name, of in named or [(system.name, None)]:
            try:
                texts[system, name] = (
                    row.text(kind, length)
                    if of is None
                    else row.drafted(kind, length, of, system.drafts)
                )
            except MissingError as error:
                texts[system, name] = str(error)
    return texts


@dataclass(frozen=True)
class Measure:
    """What a table is about. name: of `Figure`'s fields. of: that of a share, in `unit`s."""

    name: str
    unit: float
    of: Callable[[Share], float]
    head: tuple[str, ...]
    told: str
    more: Callable[[Spent], list[str]] = lambda _: []

    def cells(self, model: str, texts: Texts) -> list[list[str]]:
        """A table: ours beside the paper's."""
        head = ["system", "protocols", *CATEGORIES, *self.head]
        head += [f"paper: {name}" for name in LOGGED] + [self.told, "paper: CrypTen ÷"]
        published = PUBLISHED[model]
        base, theirs = _base(texts), getattr(published[BASELINE.paper], self.name)
        cells = [head]
        for (system, name), text in texts.items():
            line = [name, _protocols(system)]
            if isinstance(text, str):
                line += [""] * len(CATEGORIES) + ["not run", *[""] * (len(self.head) - 1)]
            else:
                parts = [self.of(text.shares.get(c, Share())) for c in CATEGORIES]
                total = self.of(text.total)
                line += [_figure(part / self.unit) for part in (*parts, total)]
                line += [_ratio(base and self.of(base), total), *self.more(text)]
            line += _theirs(published.get(system.paper), self.name, theirs)
            cells.append(line)
        return cells


SECONDS = Measure(
    "seconds", 1.0, lambda share: share.seconds, ("total s", "CrypTen ÷"), "paper: total s"
)
"""Table 1."""

BYTES = Measure(
    "gib",
    GIB,
    lambda share: share.online,
    ("online GiB", "CrypTen ÷", "dealt GiB", "rounds"),
    "paper: GiB",
    lambda text: [_figure(text.total.offline / GIB), f"{text.rounds:,.0f}"],
)
"""Table 2."""


def _longer(
    model: str, kind: Kind, found: Mapping[tuple[str, str], Row], drafts: Sequence[Drafts]
) -> str:
    """Figure 4: seconds, and how many times fewer than CrypTen's, by length."""
    by_length = {n: texts_of(model, kind, found, drafts, n) for n in kind.lengths}
    cells = [["system", "protocols", *(f"{n} tokens, s" for n in by_length)]]
    cells[0] += [f"{n}: CrypTen ÷" for n in by_length]
    for system, name in by_length[kind.lengths[0]]:
        line, ratios = [name, _protocols(system)], []
        for texts in by_length.values():
            text, base = texts[system, name], _base(texts)
            if isinstance(text, str):
                line.append("not run")
                ratios.append("")
            else:
                line.append(_figure(text.total.seconds))
                ratios.append(_ratio(base and base.seconds, text.total.seconds))
        cells.append(line + ratios)
    return markdown(cells)


def _base(texts: Texts) -> Share | None:
    text = texts.get((BASELINE, BASELINE.name), "")
    return None if isinstance(text, str) else text.total


def _theirs(figure: Figure | None, what: str, base: float) -> list[str]:
    if figure is None:
        return [""] * (len(LOGGED) + 2)
    parts, total = getattr(figure, f"part_{what}"), getattr(figure, what)
    told = [f"{part:,.1f}" for part in parts] or [""] * len(LOGGED)
    return [*told, f"{total:,.{0 if what == 'seconds' else 1}f}", _ratio(base, total)]


def _protocols(system: System) -> str:
    return "CrypTen's" if system.mode == "crypten" else "mergec's"


def _unmeasured(texts: Texts) -> list[str]:
    """A list of the rows that are missing, and why; nothing if there are none."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for (system, name), text in texts.items():
        if isinstance(text, str):
            reasons.setdefault((_protocols(system), text), []).append(name)
    listed = [
        f"* Not run by {protocols} protocols ({why}): {'; '.join(names)}."
        for (protocols, why), names in reasons.items()
    ]
    return ["\n".join(listed)] if listed else []


def _figure(value: float) -> str:
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}" if value >= 0.005 else "0"


def _ratio(base: float | None, value: float) -> str:
    return "" if not base else _figure(base / value)


QUIET = 1.5
"""Processes that may want a core, on average over the minute before a row, on a quiet machine."""

_ALONE = """Seconds are those that steps took."""

_SHARED = """Other work ran on the machine, so a step's own seconds mean nothing. *Seconds* are \
processor seconds of client, server and dealer together, without CrypTen's third party, whose work \
cannot be told by step. They leave out waiting for messages, of which CrypTen's protocols send \
several times as many one after another. They include page faults, which vary with the load."""

PAGE = """# MERGE's tables, side by side

What generating a text of {length} tokens takes, by the systems of tables 1 and 2 of MERGE (Liang \
et al., "MERGE: Fast Private Text Generation", AAAI 2024) and by mergec's exact program. Rows *by \
CrypTen's protocols* repeat the paper's comparison: the same model with each system's \
replacements, all of it run by CrypTen's stock protocols, with secret-shared weights. Rows *by \
mergec's* are what `--preset` gives. The paper's figures are of two servers with a V100 each, ours \
of three processes on one machine with {cores} cores ({processor}) over loopback, so only ratios \
compare: how many times less than the CrypTen row of the same table. {clock} Made by \
`make merge-tables`.

**What a text is.** As in the paper's scripts, the prompt has 4 tokens, and every further token is \
a step of its own. A decoder's text includes the prompt: 1 prompt step and 123 decode steps. An \
encoder-decoder reads a source of 4 tokens; its answer begins with a fixed token, so 127 more are \
generated, by 1 prompt step and 126 decode steps. With ER (*only ER*, *MERGE*) one more step at \
the end turns all hidden states into logits; the paper's scripts run the head on the last one alone.

**What is counted.** Bytes between client and server, both directions together, in GiB, which the \
paper's tables call GB. CrypTen's counters, which the paper reads, count the same. The dealer's \
bytes come on top (*dealt*); the paper's runs have no dealer, as one party makes the randomness of \
both. Not counted, as in the paper: sharing the weights before the first step, for mergec's \
programs 8 bytes per parameter. Every row reveals logits to the client, which chooses the token. \
In the paper's rows without ER the parties choose it, by a softmax and a maximum over the \
vocabulary: 14.3 GiB of each text of GPT-2.

**How it is measured.** Prompt and decode steps after a few numbers of cached tokens run in three \
processes; caches of past tokens come from plaintext, and weights are random: neither changes what \
a step takes. Seconds of the other steps are interpolated linearly between these, and with ER a \
line through two last steps tells what a third takes. So are CrypTen's bytes and rounds. Those of \
mergec's protocols come from the cost model, for every step, and equal the transport's counters at \
all measured steps; a row where they do not is an error.

**Columns.** *linear*: products with weights, but those of *embedding* and *head*; with MM also \
those with the constant attention. *softmax*: attention's normalization and, as one op here, its \
two products, which the paper counts as linear. *rest*: norms, activations, and all else. A step's \
seconds are divided in proportion to both parties' processor time for each op. Openings count for \
what reads them, truncations for what they truncate. The paper's parts are from the logs in its \
repository, where those add up to the published total; its *linear* leaves the head out, too.

**Drafts.** `lookup` drafts up to 3 tokens. How many are right depends on the text, and random \
weights have none: tokens a step are those of SmolLM2 on three tasks, [measured](speculation.md) \
apart from this. Steps of 1 and of 4 tokens are measured here; one with fewer drafts is taken to \
lie between."""

LONGER = """Figure 4 of the paper, which tells of MERGE at 512 tokens that it is 26.5 times faster \
than CrypTen. Decode steps are measured up to the longest text's last one."""
