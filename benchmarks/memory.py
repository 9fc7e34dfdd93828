"""What compiling and each role hold in memory, for Llama shapes of three sizes; docs/memory.md.

Each shape gets random weights, is compiled by `mergec compile`, and answers through a server and a
dealer as they are deployed, with a client in a process of its own: once with a dealer that keeps
its static masks and once with one that expands them. What a process holds is read several times a
second: its own pages, and those of files, which the kernel can drop and read again. Pages that
processes share count once. The growth between two sizes is compared with the formulas, and these
tell what larger models need. Long answers of two small shapes tell what a cached number takes.
With `--ranks` a server of each of these numbers of ranks answers instead, and what each of its
processes holds is printed.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from mergec.runtime.program.bundle import WORDS, role_path
from mergec.runtime.roles.client import Connection
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.connect import Security
from tests.roles import ROOT, environment
from tests.services import Deployment, deployment

LIMIT = 3.5e9
"""Bytes that no role may exceed at the largest size."""

PROMPT = [5, 17, 33, 2]
PATIENCE = 3000.0
"""Seconds after which something hangs."""

_PERIOD = 0.2

LONG = 400
"""Tokens of the answer that tells what a cached number takes."""

_WATCHED = 32
"""Tokens at either end of it whose peaks are compared; the first ones are not counted."""

SLACK = 1.5
"""How much more than by formula a cached number may take: room for more rows, a quarter of a cache,
and what a step computes of scores."""


@dataclass(frozen=True)
class Shape:
    """A Llama. tied: whether head and embedding share one table."""

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    cached_heads: int
    vocabulary: int
    tied: bool

    @property
    def parameters(self) -> int:
        own = self.width * self.width * (2 + 2 * self.cached_heads / self.heads)
        layer = int(own) + 3 * self.width * self.inner + 2 * self.width
        tables = (1 if self.tied else 2) * self.vocabulary * self.width
        return self.layers * layer + tables + self.width

    @property
    def cached(self) -> int:
        """Numbers that are cached of a token."""
        return 2 * self.layers * self.cached_heads * self.width // self.heads


SHAPES = {
    "2M": Shape("2M", 2, 256, 512, 4, 2, 4096, True),
    "27M": Shape("27M", 8, 448, 1216, 7, 7, 16384, True),
    "61M": Shape("61M", 12, 576, 1536, 9, 3, 32768, True),
    "360M": Shape("360M", 32, 960, 2560, 15, 5, 49152, True),
}
WIDE = Shape("6M", 4, 512, 512, 2, 2, 2048, True)
"""Heads of 256 numbers: its caches are larger than what a step computes of its few scores."""

LARGER = (
    Shape("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 128256, True),
    Shape("Llama-2-7B", 32, 4096, 11008, 32, 32, 32000, False),
    Shape("Llama-2-70B", 80, 8192, 28672, 64, 8, 32000, False),
)
CONTEXT = 4096
"""Tokens whose caches the table of larger models counts."""


@dataclass(frozen=True)
class Held:
    """Bytes that processes hold: pages of their own, and of files that they map."""

    own: int = 0
    mapped: int = 0

    @property
    def total(self) -> int:
        return self.own + self.mapped


def held(processes: Iterable[int]) -> Held:
    """What these processes hold together. Pages that several processes share are split."""
    found = dict.fromkeys(("Pss", "Pss_Anon"), 0)
    for process in processes:
        with suppress(OSError):
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                name, _, rest = line.partition(":")
                if name in found:
                    found[name] += int(rest.split()[0]) * 1024
    return Held(found["Pss_Anon"], found["Pss"] - found["Pss_Anon"])


@dataclass
class Peaks:
    """The most that each group of processes held, by the name of the group."""

    groups: Mapping[str, Callable[[], Iterable[int]]]
    total: dict[str, Held] = field(default_factory=dict)
    own: dict[str, int] = field(default_factory=dict)

    def look(self) -> None:
        for name, members in self.groups.items():
            now = held(members())
            self.total[name] = max(self.total.get(name, Held()), now, key=lambda h: h.total)
            self.own[name] = max(self.own.get(name, 0), now.own)

    @contextmanager
    def watched(self) -> Iterator[None]:
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(_PERIOD):
                self.look()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@dataclass(frozen=True)
class Report:
    """What a group of processes took. total: at the moment of the most. own: the most pages that
    cannot be dropped."""

    total: Held
    own: int


_MAKE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
layers, width, inner, heads, cached, vocabulary = map(int, sys.argv[2:])
torch.manual_seed(0)
config = LlamaConfig(
    num_hidden_layers=layers, hidden_size=width, intermediate_size=inner,
    num_attention_heads=heads, num_key_value_heads=cached, vocab_size=vocabulary,
    max_position_embeddings=2048, tie_word_embeddings=True,
)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
"""


def make(shape: Shape, folder: Path) -> Path:
    """A model of this shape with random weights, in Hugging Face format."""
    sizes = (shape.layers, shape.width, shape.inner, shape.heads, shape.cached_heads)
    arguments = [str(folder), *map(str, (*sizes, shape.vocabulary))]
    given = {**os.environ, **environment()}
    subprocess.run([sys.executable, "-c", _MAKE, *arguments], env=given, check=True)
    return folder


def compiled(model: Path, bundles: Path, length: int = 64) -> Report:
    """Compile it in a process of its own, for texts of so many tokens."""
    command = [sys.executable, "-m", "mergec", "compile", str(model), "-o", str(bundles)]
    command += ["--max-length", str(length), "--logit-noise", "0"]
    given = {**os.environ, **environment(), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=given, cwd=ROOT, stdout=subprocess.DEVNULL)
    peaks = Peaks({"compile": lambda: [process.pid]})
    try:
        with peaks.watched():
            code = process.wait(PATIENCE)
    finally:
        process.kill()
    if code:
        raise SystemExit(f"compiling {model} ended with {code}")
    return Report(peaks.total["compile"], peaks.own["compile"])


def ask(
    bundle: Path, server: Address, dealer: Address, tokens: int, start: Any, done: Any, out: Any
) -> None:
    """A client's process: one answer, told token by token. The session stays open until `done`."""
    connection = Connection(
        bundle,
        server=server,
        dealer=dealer,
        security=Security("client", None, plaintext=True),
        timeout=PATIENCE,
        join_timeout=PATIENCE,
    )
    start.wait(PATIENCE)
    with connection:
        found = []
        for token in connection.generate(PROMPT, max_tokens=tokens, stop=()):
            found.append(token.token)
            out.send(found)
        done.wait(PATIENCE)


@dataclass(frozen=True)
class Answer:
    """An answer, and what each role took for it. seconds: of work at the dealer for a token.

    words: bytes of the bundle's weights that each of the server's ranks has in pages at the end.
    """

    tokens: list[int]
    roles: dict[str, Report]
    seconds: float
    words: dict[str, int]


Groups = dict[str, Callable[[], list[int]]]
"""The processes of each role, and those of the server's ranks."""


@contextmanager
def asked(bundles: Path, tokens: int, *deal: str, ranks: int = 1) -> Iterator[tuple[Groups, Any]]:
    """A client that asks for one answer, and the end at which its tokens are told.

    deal: options of the dealer. ranks: of the server. The session ends with the context.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    patience = ("--timeout", str(PATIENCE))
    serve = ("--ranks", str(ranks), *patience)
    with deployment(bundles, serve=serve, deal=(*deal, *patience)) as made:
        start, done, (ours, theirs) = context.Event(), context.Event(), context.Pipe(duplex=False)
        bundle = role_path(bundles, "client")
        places = (made.server.address, made.dealer.address)
        client = context.Process(target=ask, args=(bundle, *places, tokens, start, done, theirs))
        client.start()
        theirs.close()
        groups: Groups = {name: _family(made, name) for name in ("server", "dealer")}
        groups |= {f"rank {rank}": _rank(groups["server"], rank) for rank in range(ranks)}
        groups["client"] = lambda: [int(client.pid or 0)]
        start.set()
        yield groups, ours
        done.set()
        client.join(PATIENCE)


def answered(bundles: Path, tokens: int, *deal: str, ranks: int = 1) -> Answer:
    """Answer once, with a dealer that has these options, and a server of so many ranks."""
    with asked(bundles, tokens, *deal, ranks=ranks) as (groups, ours):
        peaks = Peaks(groups)
        with peaks.watched():
            found = _told(ours)
            before = _work(groups["dealer"]())
            while len(found) < tokens:
                found = _told(ours)
            after = _work(groups["dealer"]())
            each = {name: members for name, members in groups.items() if name.startswith("rank")}
            words = {name: sum(map(mapped_words, members())) for name, members in each.items()}
    roles = {name: Report(peaks.total[name], peaks.own[name]) for name in peaks.total}
    return Answer(found, roles, (after - before) / (tokens - 1), words)


@dataclass(frozen=True)
class Caches:
    """What a long answer took. tokens: between both times. grown: own bytes of each role that came
    to it meanwhile; a dealer's are the same whether it keeps its masks.
    """

    shape: Shape
    tokens: int
    grown: dict[str, int]

    def bytes_each(self, role: str) -> float:
        """Bytes for each number that was cached meanwhile."""
        return self.grown[role] / (self.tokens * self.shape.cached)


def caches(shape: Shape, folder: Path) -> Caches:
    """The growth of each role's peak from the first tokens of a long answer to the last ones."""
    bundles = folder / "bundles"
    compiled(make(shape, folder / "model"), bundles, LONG + 2 * len(PROMPT))
    with asked(bundles, LONG) as (groups, ours):
        marks = _WATCHED, 2 * _WATCHED, LONG - _WATCHED, LONG
        peaks, found = [Peaks(groups) for _ in marks], 0
        for mark, peak in zip(marks, peaks, strict=True):
            with peak.watched():
                while found < mark:
                    found = len(_told(ours))
                peak.look()
    early, late = peaks[1], peaks[3]
    grown = {role: late.own[role] - early.own[role] for role in ("server", "client", "dealer")}
    return Caches(shape, LONG - 2 * _WATCHED, grown)


def _told(end: Any) -> list[int]:
    if not end.poll(PATIENCE):
        raise SystemExit("a client hangs")
    said: list[int] = end.recv()
    return said


def _family(made: Deployment, name: str) -> Callable[[], list[int]]:
    """A role's process, those of its sessions, and those of their ranks."""
    first = psutil.Process(made.roles[name].process.pid)
    return lambda: [first.pid, *(below.pid for below in first.children(recursive=True))]


def _rank(family: Callable[[], list[int]], rank: int) -> Callable[[], list[int]]:
    """The process of a rank of a role's only session."""
    return lambda: family()[1 + rank : 2 + rank]


def mapped_words(process: int) -> int:
    """Bytes of a bundle's weights that a process has in pages."""
    with suppress(psutil.Error):
        maps = psutil.Process(process).memory_maps()
        return sum(found.rss for found in maps if found.path.endswith(WORDS))
    return 0


def _work(processes: Iterable[int]) -> float:
    """Seconds for which these processes computed so far."""
    times = [psutil.Process(process).cpu_times() for process in processes]
    return sum(time.user + time.system for time in times)


@dataclass(frozen=True)
class Size:
    """All that was measured of one shape."""

    shape: Shape
    reports: dict[str, Report]
    seconds: dict[str, float]


def measure(shape: Shape, folder: Path, tokens: int) -> Size:
    model, bundles = make(shape, folder / "model"), folder / "bundles"
    reports = {"compile": compiled(model, bundles)}
    kept, expanded = answered(bundles, tokens), answered(bundles, tokens, "--expand-masks")
    if kept.tokens != expanded.tokens:
        raise SystemExit(f"{shape.name}: masks that are expanded change the answer")
    reports |= {"server": kept.roles["server"], "client": kept.roles["client"]}
    reports |= {"dealer": kept.roles["dealer"], EXPANDED: expanded.roles["dealer"]}
    return Size(shape, reports, {"dealer": kept.seconds, EXPANDED: expanded.seconds})


EXPANDED = "dealer with `--expand-masks`"


@dataclass(frozen=True)
class Formula:
    """Bytes per parameter: of a process's own pages, and of files that it maps.

    own, mapped: each at most. cached: own bytes for each number that is cached of a token.
    """

    own: int
    mapped: int
    cached: int


FORMULAS = {
    "compile": Formula(4, 4, 0),
    "server": Formula(0, 4, 16),
    "client": Formula(0, 8, 16),
    "dealer": Formula(8, 0, 8),
    EXPANDED: Formula(0, 0, 8),
}

PAGE = """# Memory

`make memory`: what compiling and each role hold in memory, for Llama shapes of {count} sizes with
random weights. Server and dealer run as they are deployed, and the client is a process of its own;
what a role's processes share counts once. The prompt has {prompt} tokens, the answer {tokens}.

Pages of files are in memory while they are used, and the kernel drops them when memory is short: a
role needs what is *its own*, and reads the rest from the disk again if it must. The server maps its
weights from its bundle, as 32-bit integers wherever they fit. The client puts W − B into a file
without a name, in the folder that `TMPDIR` names; if that lies in memory, as `/tmp` does on some
systems, or has no room, W − B is in memory too.

## Measured

The most that was held at any time, in MB: in all, and own.

| model | parameters | {heads} |
| --- | ---: | {lines} |
{rows}

No role held more than {worst} GB at {largest} ({limit} GB allowed).

## Bytes per parameter

Growth from one size to the next, divided by that of the parameters, and the formula. What does not
follow it is code, the messages and dealt words of a step, and buffers: weights are sent in pieces
of 32 MB, of which client and server hold a few at a time. Larger layers fill larger buffers, until
each piece has that size.

| | {steps} | own | of files |
| --- | {dashes} | ---: | ---: |
{growth}

Compiling holds the model, mapped from its files, and at most as much again: the matrices that
passes compute from others. A dealer's own bytes are for each session.

{caches}

## What expanding masks costs

Seconds for which the dealer's processes computed, for each token after the first.

| model | masks kept | expanded |
| --- | ---: | ---: |
{seconds}

An expanded mask takes AES-256 in counter mode over 8 bytes for each parameter, for each step.

## Larger models

By formula, with caches of {context:,} tokens, in GB: own, and of files. A server's own bytes are
for each session. On the disk, a server's bundle takes 8 bytes per parameter, and so does a client's
session. With [`--ranks N`](guides/ranks.md) each rank of a party holds about 1/N of it.

| model | parameters | {heads} |
| --- | ---: | {lines} |
{larger}
"""


CACHES = """## Bytes per cached number

{begin}

Growth of the most that each role held of its own, from the first tokens of an answer of {long} to
the last ones, {tokens} tokens later, for each number that was cached meanwhile. A cache has room
for more rows, up to a quarter of what it has. The messages and dealt words of a step grow too, with
the number of scores: they are as large as the caches where heads are few numbers wide, as those of
the first model are. The second one's have {width} numbers, and may take {slack} times what the
formula says.

| | {names} | formula |
| --- | {lines} | ---: |
{rows}

{end}"""

BEGIN, END = "<!-- caches: begin -->", "<!-- caches: end -->"


def caches_section(found: Sequence[Caches]) -> str:
    """The page's section of caches. found: the last one is compared with the formulas."""
    rows = []
    for role in found[-1].grown:
        cells = [f"{each.bytes_each(role):.1f}" for each in found]
        rows.append(f"| {role} | {' | '.join(cells)} | {FORMULAS[role].cached} |")
    return CACHES.format(
        begin=BEGIN,
        end=END,
        long=LONG,
        tokens=found[-1].tokens,
        width=found[-1].shape.width // found[-1].shape.heads,
        slack=SLACK,
        names=" | ".join(each.shape.name for each in found),
        lines=" | ".join(["---:"] * len(found)),
        rows="\n".join(rows),
    )


def with_caches(text: str, section: str) -> str:
    """A page with this section in place of what it has between the marks."""
    inner = section[section.index(BEGIN) :]
    return text[: text.index(BEGIN)] + inner + text[text.index(END) + len(END) :]


def failures(sizes: Sequence[Size], found: Caches) -> list[str]:
    """What is larger than by the formulas, each in a line. found: of heads of many numbers."""
    wrong = []
    for small, large in itertools.pairwise(sizes):
        growth = _growth(small, large, lambda size: size.reports["compile"].own)
        if growth > FORMULAS["compile"].own:
            wrong.append(
                f"compiling took {growth:.2f} bytes of its own for each parameter from "
                f"{small.shape.name} to {large.shape.name}, more than {FORMULAS['compile'].own}"
            )
    for role in found.grown:
        each, most = found.bytes_each(role), SLACK * FORMULAS[role].cached
        if each > most:
            wrong.append(
                f"the {role} took {each:.1f} bytes for each cached number, more than {most:.0f}"
            )
    if sizes and _worst(sizes[-1]) > LIMIT:
        wrong.append(f"a role held {_worst(sizes[-1]) / 1e9:.2f} GB, more than {LIMIT / 1e9}")
    return wrong


def page(sizes: Sequence[Size], found: Sequence[Caches], tokens: int) -> str:
    """The text of docs/memory.md."""
    names = [*FORMULAS]
    rows, seconds, growth = [], [], []
    for size in sizes:
        reports = [size.reports[name] for name in names]
        cells = [f"{r.total.total / 1e6:,.0f}, {r.own / 1e6:,.0f}" for r in reports]
        rows.append(f"| {size.shape.name} | {_million(size.shape)} | {' | '.join(cells)} |")
        both = [f"{size.seconds[name]:.2f}" for name in ("dealer", EXPANDED)]
        seconds.append(f"| {size.shape.name} | {' | '.join(both)} |")
    for name in names:
        formula = FORMULAS[name]
        cells = [
            f"{_growth(a, b, lambda s: s.reports[name].total.total):.2f}, "  # noqa: B023
            f"{_growth(a, b, lambda s: s.reports[name].own):.2f}"  # noqa: B023
            for a, b in itertools.pairwise(sizes)
        ]
        growth.append(f"| {name} | {' | '.join(cells)} | {formula.own} | {formula.mapped} |")
    larger = []
    for shape in LARGER:
        cells = []
        for formula in FORMULAS.values():
            own = formula.own * shape.parameters + formula.cached * shape.cached * CONTEXT
            cells.append(f"{own / 1e9:.1f}, {formula.mapped * shape.parameters / 1e9:.1f}")
        larger.append(f"| {shape.name} | {_million(shape)} | {' | '.join(cells)} |")
    return PAGE.format(
        count=len(sizes),
        prompt=len(PROMPT),
        tokens=tokens,
        heads=" | ".join(names),
        lines=" | ".join(["---:"] * len(names)),
        rows="\n".join(rows),
        worst=f"{_worst(sizes[-1]) / 1e9:.2f}",
        largest=sizes[-1].shape.name,
        limit=LIMIT / 1e9,
        steps=" | ".join(
            f"{a.shape.name} to {b.shape.name}: in all, own" for a, b in itertools.pairwise(sizes)
        ),
        dashes=" | ".join(["---:"] * (len(sizes) - 1)),
        growth="\n".join(growth),
        caches=caches_section(found),
        seconds="\n".join(seconds),
        context=CONTEXT,
        larger="\n".join(larger),
    )


def _million(shape: Shape) -> str:
    return f"{shape.parameters / 1e6:,.0f} M"


def _growth(small: Size, large: Size, of: Callable[[Size], float]) -> float:
    return (of(large) - of(small)) / (large.shape.parameters - small.shape.parameters)


def _worst(size: Size) -> int:
    roles = (report for name, report in size.reports.items() if name != "compile")
    return max((report.total.total for report in roles), default=0)


def by_ranks(shape: Shape, folder: Path, tokens: int, counts: Sequence[int]) -> str:
    """A table of what the processes of a server of so many ranks hold, in MB."""
    bundles = folder / "bundles"
    compiled(make(shape, folder / "model"), bundles)
    stored = (role_path(bundles, "server") / WORDS).stat().st_size
    rows = [
        f"{shape.name}: {stored / 1e6:,.0f} MB of weights in the bundle",
        "",
        "| ranks | server: in all, own | rank | own | of the weights |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    answers = {count: answered(bundles, tokens, ranks=count) for count in counts}
    if len({tuple(answer.tokens) for answer in answers.values()}) > 1:
        raise SystemExit(f"{shape.name}: the number of ranks changes the answer")
    for count, answer in answers.items():
        whole = answer.roles["server"]
        left = f"| {count} | {whole.total.total / 1e6:,.0f}, {whole.own / 1e6:,.0f} "
        for rank, (name, words) in enumerate(answer.words.items()):
            own = answer.roles[name].own
            rows.append(f"{left}| {rank} | {own / 1e6:,.0f} | {words / 1e6:,.0f} |")
            left = "| | "
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES][1:])
    parser.add_argument("--tokens", type=int, default=3, help="of an answer, 2 or more")
    parser.add_argument("--output", type=Path, help="write docs/memory.md here")
    parser.add_argument("--ranks", nargs="+", type=int, help="of a server, to print what they hold")
    parser.add_argument("--caches", action="store_true", help="measure and write caches alone")
    options = parser.parse_args()
    if options.ranks:
        for name in options.shapes:
            with tempfile.TemporaryDirectory() as place:
                print(by_ranks(SHAPES[name], Path(place), options.tokens, options.ranks))
        return
    found = []
    for shape in (SHAPES["2M"], WIDE):
        with tempfile.TemporaryDirectory() as place:
            found.append(caches(shape, Path(place)))
        print(found[-1], file=sys.stderr, flush=True)
    sizes: list[Size] = []
    for name in () if options.caches else options.shapes:
        with tempfile.TemporaryDirectory() as place:
            sizes.append(measure(SHAPES[name], Path(place), options.tokens))
        print(name, sizes[-1].reports, sizes[-1].seconds, file=sys.stderr, flush=True)
    if options.caches:
        text = caches_section(found)
        text = with_caches(options.output.read_text(), text) if options.output else text
    else:
        text = page(sizes, found, options.tokens)
    if options.output:
        options.output.write_text(text)
    else:
        print(text)
    wrong = failures(sizes, found[-1])
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
