"""The same GPT-2 decode step in mergec and in SPU, in alternation: times as ratios, and bytes.

Both run the same random weights, the same token and the same caches of 128 tokens, with each party
as a process of its own on loopback. A pair is one run of mergec and one of each of SPU's protocols,
one after the other, so that what else the machine does is the same for both as far as it can be.
SPU counts its own bytes and sends. A protocol that fails, or takes too long, is a row that says so.

SPU lives in an environment of its own (`make bench-peers` makes it). Writes docs/peers.md, a short
table between the marks in README.md, and peers.json to benchmarks/results.

Usage: python benchmarks/peers.py [--pairs N] [--peers semi2k aby3] [--layers N] [--limit SECONDS]
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import RESULTS, ROOT, Loader, errors_of, gpt2, machine, shortened, small_gpt2, steps_of
from harness import RunError, run
from report import replace_between
from torch import nn

from mergec import CompileConfig, compile_decoder
from mergec.compiler.backend.cost import dealt_bytes
from mergec.compiler.report.tables import markdown

SPU = "0.9.5"
PYTHON = ROOT / ".venv-spu" / "bin" / "python"
INSTALL = f"make .venv-spu/installed   # SPU {SPU}, which needs Python 3.11"
PARTY = Path(__file__).with_name("peer_spu.py")
MODELS: dict[str, Loader] = {"gpt2-base": gpt2, "gpt2-small": small_gpt2}
PAST = 128
OURS = "mergec"
REPEATS = 3
"""Runs of a step that count; the median of them does."""

_POLL = 0.1


@dataclass(frozen=True)
class Peer:
    """A protocol of SPU, and how it is used.

    weights: `private` to the server throughout, `shared` once in a session, or `cached`, which is
    shared and marked as a cached variable. trust: what the setting rests on. dealt: what is known
    of correlated randomness. once: whether a step takes so long that one run of it has to do.
    """

    name: str
    protocol: str
    parties: int
    weights: str
    trust: str
    dealt: str
    once: bool = False


_FIRST = "two parties; insecure as run: the server can derive the client's masks"
_UNKNOWN = "not counted"
_NO_DEALER = "none: no dealer"

PEERS = (
    Peer("semi2k", "SEMI2K", 2, "private", _FIRST, _UNKNOWN),
    Peer("semi2k, cached", "SEMI2K", 2, "cached", _FIRST, _UNKNOWN),
    Peer("aby3", "ABY3", 3, "shared", "three parties, no two of which collude", _NO_DEALER),
    Peer("cheetah", "CHEETAH", 2, "private", "two parties and nobody else", _NO_DEALER, True),
)
"""All of them are semi-honest."""

OUR_TRUST = "two parties, and a dealer that colludes with neither"


@dataclass(frozen=True)
class Measured:
    """A decode step in one run.

    seconds: the median of its runs. prepared: the same with the dealer's randomness at hand.
    online, dealt: bytes, in all. sends: messages of the party that sends most; of mergec, rounds.
    """

    seconds: float
    online: int
    sends: int
    error: float
    prepared: float | None = None
    dealt: int | None = None


@dataclass
class Column:
    """The runs of one system, pair by pair, or why they ended."""

    name: str
    runs: list[Measured] = field(default_factory=list)
    failed: str = ""


@dataclass(frozen=True)
class Sent:
    """What a party of SPU sent during one execution, by its link's own count."""

    bytes: int
    actions: int


class PeerError(Exception):
    """A run of a peer that failed, and why."""


_DETAILS = re.compile(r"Link details: total send bytes (\d+), .*send actions (\d+)")


def link_details(log: str) -> list[Sent]:
    """The statistics that a party logged, one entry for each execution."""
    return [Sent(*map(int, found)) for found in _DETAILS.findall(log)]


def last_words(log: str) -> str:
    """Why a process failed: SPU's own message if there is one, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for line, after in pairwise(lines):
        if line.endswith("what:"):
            return re.sub(r"^\[[^]]*\] ", "", after)[:200]
    plain = [line for line in lines if not line.startswith("[")]
    return (plain or lines or ["it said nothing"])[-1][:200]


def ratios(theirs: Sequence[Measured], ours: Sequence[Measured], prepared: bool) -> list[float]:
    """How many times longer than mergec each of a peer's runs took, pair by pair."""
    found = []
    for their, our in zip(theirs, ours, strict=False):
        seconds = our.prepared if prepared else our.seconds
        if seconds is None:
            raise ValueError("mergec did not run with its randomness at hand")
        found.append(their.seconds / seconds)
    return found


def spread(values: Sequence[float]) -> str:
    """The median, and the range if there are several values."""
    middle = f"{statistics.median(values):,.1f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):,.1f}–{max(values):,.1f})"


HEAD = (
    "system", "time × mergec", "time × mergec, prepared", "online MB", "online × mergec",
    "dealt MB", "all bytes × mergec", "sends", "worst error", "trust",
)  # fmt: skip


def cells(column: Column, ours: Column) -> list[str]:
    """The row of a system in `HEAD`'s columns."""
    peer = next((peer for peer in PEERS if peer.name == column.name), None)
    trust = peer.trust if peer else OUR_TRUST
    name = f"SPU {column.name}" if peer else column.name
    if not column.runs:
        return [name, f"failed: {column.failed}", *[""] * (len(HEAD) - 3), trust]
    last, our = column.runs[-1], ours.runs[-1]
    times = [ratios(column.runs, ours.runs, prepared) for prepared in (False, True)]
    dealt = peer.dealt if peer else f"{(last.dealt or 0) / 1e6:,.1f}"
    known = "≥ " if dealt == _UNKNOWN else ""
    ended = f"; then failed: {column.failed}" if column.failed else ""
    return [
        name,
        (spread(times[0]) if peer else "1") + ended,
        spread(times[1]) if peer else "1",
        f"{last.online / 1e6:,.1f}",
        f"{last.online / our.online:,.1f}",
        dealt,
        known + f"{(last.online + (last.dealt or 0)) / (our.online + (our.dealt or 0)):,.1f}",
        f"{last.sends:,}" if peer else f"{last.sends:,} rounds",
        f"{max(run.error for run in column.runs):.4f}",
        trust,
    ]


def table(columns: Sequence[Column]) -> str:
    """A row for each system; the first is mergec."""
    return markdown([list(HEAD), *(cells(column, columns[0]) for column in columns)])


def short(columns: Sequence[Column]) -> str:
    """The table for README.md."""
    kept = [HEAD.index(name) for name in HEAD if name not in ("worst error", HEAD[2], HEAD[4])]
    rows = [list(HEAD), *(cells(column, columns[0]) for column in columns)]
    return markdown([[row[i] for i in kept] for row in rows])


PAGE = """# mergec and SPU, side by side

A decode step of {model}{layers} after {past} tokens on loopback, with the same random weights,
token and caches in all rows. A pair is one run of mergec and one of each protocol of
[SPU](https://github.com/secretflow/spu) {spu}, one after the other; pairs: {pairs}. Times
are ratios to mergec's time in the same pair, as median and range. Written on {date} by

    {command}

on {cores} cores with {memory_gb} GB of memory that all parties share, with Python {python} and
torch {torch}. The load average was {load:.1f} when the run began. On a machine that does other
work, a message waits until its receiver is scheduled, which slows down whoever sends many of them:
the ratios of an idle machine are others.

{table}

* *time × mergec*: while mergec's dealer works on the same cores. *prepared*: the dealer's
  randomness is at hand. A step's seconds are the median of several runs: SPU's of {repeats}
  (cheetah's of one) after one that does not count.
* *online MB*: what all parties send each other in a step, for SPU by its own link statistics.
  Revealing the logits to the client is part of mergec's step and not of SPU's.
* *dealt MB*: what mergec's dealer sends to both parties. *all bytes*: online and dealt together.
* *sends*: messages of the party that sends most; for mergec rounds, in each of which a party sends
  one message at most.
* *worst error*: largest difference from the logits of plaintext PyTorch. mergec's contains the
  noise that its server adds to logits on purpose, of standard deviation {noise:.4f}
  ([why](rounding.md)).

## How SPU runs

The step is one jax function (`benchmarks/peer_spu.py`): one-hot token, all layers, logits of the
last position. SPU compiles and runs it with its default options over 64-bit words. The token is
the client's private input, the weights are the server's, the caches are secret-shared. Each party
is a process, connected by SPU's own links.

* **semi2k** opens the masked weights anew in each step, even where they are one party's private
  input.
* **semi2k, cached**: the server shares its weights once, and they are marked with SPU's
  `experimental.make_cached_var`. The first step, which does not count, opens them.
* **aby3**: the server shares its weights once. As a private input they would be shared again in
  each step.
* **cheetah**: homomorphic encryption and oblivious transfer. The first step, which does not count,
  begins the oblivious transfers.

## What each row trusts

All rows are semi-honest: parties follow the protocol. Beyond that they are not equally secure.

* **mergec** needs a dealer that colludes with neither party. Its bytes are counted, under *dealt*.
* **semi2k** needs correlated randomness, too. Here it comes from SPU's default,
  `TrustedFirstParty` (in SPU's code `BeaverTfpUnsafe`): every party tells the first one, here the
  server, the seed of its masks. So the server can unmask the client's values. It stands in for a
  dealer, costs no bytes, and protects nothing from the first party. A deployment would use
  `TrustedThirdParty`, a dealer like mergec's. Its server is not in SPU's Python package, and SPU's
  statistics do not say what it would send, so the total of these two rows is not known: it is at
  least what is online.
* **aby3** needs a third party that computes as the others do, and an honest majority: any two of
  the three together see everything.
* **cheetah** needs nobody else. It is the strongest of these settings.

{seconds}
"""


def page(columns: Sequence[Column], facts: dict[str, Any]) -> str:
    """The whole page. facts: what `PAGE` names beside the tables."""
    listed = [["system", *(f"pair {i + 1}" for i in range(len(columns[0].runs)))]]
    for column in columns:
        found = [f"{one.seconds:.2f}" for one in column.runs]
        listed.append([column.name, *found, *[""] * (len(listed[0]) - 1 - len(found))])
    prepared = [f"{one.prepared:.2f}" for one in columns[0].runs]
    listed.insert(2, [f"{OURS}, prepared", *prepared])
    seconds = "## Seconds of this run\n\n" + markdown(listed)
    return PAGE.format(table=table(columns), seconds=seconds, past=PAST, spu=SPU, **facts)


def installed(python: Path) -> None:
    """Exit, saying what to do, unless SPU is there in the version that this program knows."""
    try:
        found = subprocess.run(
            [python, "-c", "import jax, spu; print(spu.__version__)"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit(f"SPU is not installed at {python}; run: {INSTALL}") from None
    if found != SPU:
        raise SystemExit(f"{python} has SPU {found}, not {SPU}; remove it and run: {INSTALL}")


class Inputs:
    """The step's weights, token and caches as SPU's processes read them."""

    def __init__(self, model: nn.Module, tokens: Sequence[int], folder: Path) -> None:
        self.folder, self._token = folder, tokens[PAST]
        self._config: Any = model.config
        state = model.base_model.state_dict()
        named = {_name(key): value.numpy() for key, value in state.items() if not _is_mask(key)}
        np.savez(folder / "weights.npz", **named)
        with torch.inference_mode():
            found: Any = model(input_ids=torch.tensor([list(tokens[:PAST])]), use_cache=True)
        caches = {}
        for index, layer in enumerate(found.past_key_values.layers):
            caches |= {
                f"{index}/key": layer.keys[0].numpy(),
                f"{index}/value": layer.values[0].numpy(),
            }
        np.savez(folder / "caches.npz", **caches)

    def job(self, peer: Peer, repeats: int, limit: float) -> Path:
        """Write what a peer's processes are told; returns its file, in a folder of its own."""
        folder = self.folder / re.sub(r"\W+", "-", peer.name)
        folder.mkdir(exist_ok=True)
        options = {
            "protocol": peer.protocol,
            "weights": peer.weights,
            "repeats": repeats,
            "addresses": [f"127.0.0.1:{port}" for port in free_ports(peer.parties)],
            "limit": int(limit),
            "token": self._token,
            "heads": self._config.n_head,
            "eps": self._config.layer_norm_epsilon,
            "weights_file": "../weights.npz",
            "caches_file": "../caches.npz",
        }
        path = folder / "job.json"
        path.write_text(json.dumps(options))
        return path


def _name(key: str) -> str:
    """`h.3.attn.c_attn.weight` is `3/attn.c_attn.weight`, and `wte.weight` is `wte`."""
    if key.startswith("h."):
        return "/".join(key.split(".", 2)[1:])
    return key.removesuffix(".weight") if key.startswith("w") else key


def _is_mask(key: str) -> bool:
    """Whether a buffer is a causal mask, which old models store."""
    return key.endswith((".attn.bias", ".attn.masked_bias"))


def free_ports(count: int) -> list[int]:
    """Ports on which nobody listens now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def run_peer(
    python: Path, peer: Peer, inputs: Inputs, repeats: int, limit: float
) -> tuple[Measured, np.ndarray]:
    """Run a peer's parties; returns measurements (with no error yet) and the logits.

    Raises PeerError if a process fails, or if they are not done after `limit` seconds.
    """
    repeats = 1 if peer.once else repeats
    job = inputs.job(peer, repeats, limit)
    deadline = time.monotonic() + limit

    def all_done(*whats: str) -> None:
        processes = {what: _start(python, job, what) for what in whats}
        try:
            _wait(processes, job.parent, deadline, limit)
        finally:
            for process in processes.values():
                process.kill()
                process.wait()

    all_done("prepare")
    ranks = [str(rank) for rank in range(peer.parties)]
    all_done(*ranks)
    all_done("collect")
    said = [json.loads((job.parent / f"seconds-{rank}.json").read_text()) for rank in ranks]
    logs = [(job.parent / f"{rank}.log").read_text(errors="replace") for rank in ranks]
    sent = [link_details(log)[-1] for log in logs]
    seconds = [max(party["seconds"][i] for party in said) for i in range(repeats)]
    logits: np.ndarray = np.load(job.parent / "logits.npy")
    measured = Measured(
        statistics.median(seconds), sum(s.bytes for s in sent), max(s.actions for s in sent), 0.0
    )
    return measured, logits


def _start(python: Path, job: Path, what: str) -> subprocess.Popen[bytes]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    with (job.parent / f"{what}.log").open("wb") as log:
        return subprocess.Popen(
            [python, PARTY, job, what], env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def _wait(
    processes: dict[str, subprocess.Popen[bytes]], folder: Path, deadline: float, limit: float
) -> None:
    while any(process.poll() is None for process in processes.values()):
        if any(process.returncode for process in processes.values()):
            break
        if time.monotonic() > deadline:
            raise PeerError(f"not done after {limit:g} s")
        time.sleep(_POLL)
    for what, process in processes.items():
        if process.returncode:
            log = (folder / f"{what}.log").read_text(errors="replace")
            raise PeerError(f"{what} ended with {code(process.returncode)}: {last_words(log)}")


def code(returned: int) -> str:
    """A process's exit code, or the signal that ended it."""
    return f"code {returned}" if returned > 0 else signal.Signals(-returned).name


def write(columns: Sequence[Column], facts: dict[str, Any], folder: Path | None) -> None:
    """Write what is measured so far: to a folder, or to the repository's own places."""
    results = folder or RESULTS
    results.mkdir(parents=True, exist_ok=True)
    stored = {"facts": facts, "columns": [asdict(column) for column in columns]}
    (results / "peers.json").write_text(json.dumps(stored, indent=1) + "\n")
    (folder or ROOT / "docs").joinpath("peers.md").write_text(page(columns, facts))
    if folder is None:
        replace_between(ROOT / "README.md", "peers", short(columns))


def stored(results: Path) -> tuple[list[Column], dict[str, Any]]:
    """What `write` stored."""
    found = json.loads((results / "peers.json").read_text())
    columns = [
        Column(one["name"], [Measured(**run) for run in one["runs"]], one["failed"])
        for one in found["columns"]
    ]
    return columns, found["facts"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3)
    names = [peer.name.replace(", ", "-") for peer in PEERS]
    parser.add_argument("--peers", nargs="+", choices=names, default=names)
    parser.add_argument("--model", choices=MODELS, default="gpt2-base")
    parser.add_argument("--layers", type=int, help="first layers of the model only")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="runs of a step that count")
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds of one peer's run")
    parser.add_argument("--spu", type=Path, default=PYTHON, help="Python that has SPU")
    parser.add_argument("--output", type=Path, help="folder to write to instead of docs and README")
    parser.add_argument(
        "--render", action="store_true", help="write the pages of the last run again"
    )
    options = parser.parse_args(arguments)
    if options.render:
        write(*stored(options.output or RESULTS), options.output)
        return
    installed(options.spu)
    load = os.getloadavg()[0]
    peers = [peer for peer, name in zip(PEERS, names, strict=True) if name in options.peers]
    columns = [Column(OURS), *(Column(peer.name) for peer in peers)]

    model, tokens = MODELS[options.model]()
    if options.layers is not None:
        model = shortened(model, options.layers)
    program = compile_decoder(model, config=CompileConfig())
    shape = (1, PAST)
    # The first run of a process is slow, and the median of so many does not see it.
    steps = steps_of(program, tokens, [shape], 2 * options.repeats + 1, options.repeats)
    dealt = sum(dealt_bytes(program.any_role, *shape).values())
    with torch.inference_mode():
        exact = model(input_ids=torch.tensor([list(tokens[: PAST + 1])])).logits[0, -1].double()
    facts = machine() | {
        "model": options.model,
        "layers": "" if options.layers is None else f", first {options.layers} layers,",
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "load": load,
        "repeats": options.repeats,
        "noise": program.manifest.logit_noise,
    }

    with tempfile.TemporaryDirectory(prefix="mergec-peers-") as place:
        inputs = Inputs(model, tokens, Path(place))
        for pair in range(options.pairs):
            try:
                (taken,) = run(program.roles, steps, OURS)
            except RunError as error:
                raise SystemExit(f"mergec's run failed: {error}") from None
            (worst,) = errors_of(model, tokens, [shape], [taken])
            one = Measured(
                taken.seconds, taken.online, taken.rounds, worst, taken.online_seconds, dealt
            )
            columns[0].runs.append(one)
            print(f"pair {pair + 1}, {OURS}: {one}", flush=True)
            for peer, column in zip(peers, columns[1:], strict=True):
                if column.failed:
                    continue
                try:
                    one, logits = run_peer(
                        options.spu, peer, inputs, options.repeats, options.limit
                    )
                except PeerError as error:
                    column.failed = str(error)
                    print(f"pair {pair + 1}, {peer.name}: failed: {error}", flush=True)
                    continue
                worst = float((torch.from_numpy(logits).double() - exact).abs().max())
                column.runs.append(replace(one, error=worst))
                print(f"pair {pair + 1}, {peer.name}: {column.runs[-1]}", flush=True)
            # Pair by pair: what is there holds if the run is interrupted.
            extra = "" if options.repeats == REPEATS else f" --repeats {options.repeats}"
            facts["pairs"] = pair + 1
            facts["command"] = f'make bench-peers PEER_ARGS="--pairs {pair + 1}{extra}"'
            write(columns, facts, options.output)


if __name__ == "__main__":
    main()
