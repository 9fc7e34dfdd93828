"""Several clients at once against one server and one dealer; docs/load.md.

Server and dealer run as they are deployed, over TLS, and each client is a process of its own. First
1, 2, 4 and 8 clients ask answer after answer for the same time. Then more clients come than the
server has places for: those that it refuses come back when it said that they should.

The model is a decoder with one layer. `--bundles` names the bundles of another one, which takes its
turn afterwards.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from mergec.runtime.core.errors import BusyError
from mergec.runtime.program.bundle import read_manifest, role_path
from mergec.runtime.roles.client import Connection
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.authority import make_certificates
from mergec.runtime.transport.connect import Security
from tests import decoder
from tests.services import Deployment, deployment

PROMPT = 4
"""Tokens of a prompt."""

PLACES, QUEUE, CROWD = 2, 2, 8
"""Sessions and waiting clients that the server allows, and clients that come at once."""

ANSWERS = 2
"""Answers that each client of the crowd asks for before it leaves."""

PATIENCE = 600.0
"""Seconds after which something hangs."""


@dataclass(frozen=True)
class Job:
    """What a client does."""

    number: int
    bundle: Path
    server: Address
    dealer: Address
    certificates: Path
    tokens: int
    seconds: float

    def connection(self) -> Connection:
        return Connection(
            self.bundle,
            server=self.server,
            dealer=self.dealer,
            security=Security("client", self.certificates),
        )

    def prompt(self, count: int, vocabulary: int) -> list[int]:
        return [(7 * self.number + 3 * count + n) % vocabulary for n in range(PROMPT)]


@dataclass
class Served:
    """What a client got. first: seconds to the first token of each answer."""

    tokens: int = 0
    answers: int = 0
    first: list[float] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    """Seconds that it was told to wait, each time that it was refused."""
    came: float = 0.0
    """Seconds from when it first came to when it had a session."""


def ask(job: Job, connection: Connection, served: Served, until: float = float("inf")) -> None:
    """One answer; tokens after `until` do not count."""
    vocabulary = connection.program.manifest.vocab_size
    prompt = job.prompt(served.answers, vocabulary)
    began = time.monotonic()
    stop: Sequence[int] = ()
    for number, _ in enumerate(connection.generate(prompt, max_tokens=job.tokens, stop=stop)):
        now = time.monotonic()
        if now > until:
            return
        if number == 0:
            served.first.append(now - began)
        served.tokens += 1
    served.answers += 1


def ask_for_a_while(job: Job, start: Any, done: Any, out: Any) -> None:
    """A client's process: answers until the time is over. The session stays open until `done`."""
    served = Served()
    with job.connection() as connection:
        ask(job, connection, Served())  # whatever takes longer the first time
        start.wait(PATIENCE)
        until = time.monotonic() + job.seconds
        while time.monotonic() < until:
            ask(job, connection, served, until)
        out.send((served, memory(psutil.Process())))
        done.wait(PATIENCE)


def ask_in_a_crowd(job: Job, start: Any, _done: Any, out: Any) -> None:
    """A client's process: comes, and comes back when it was told to, until it has been served."""
    served, connection = Served(), job.connection()
    start.wait(PATIENCE)
    began = time.monotonic()
    while not connection.is_open:
        try:
            connection.open()
        except BusyError as error:
            served.refused.append(error.wait)
            time.sleep(error.wait)
    served.came = time.monotonic() - began
    with connection:
        for _ in range(ANSWERS):
            ask(job, connection, served)
    out.send((served, memory(psutil.Process())))


def memory(process: psutil.Process) -> tuple[int, int]:
    """Bytes that are resident for a process, and those of them that it shares with no other."""
    found = process.memory_full_info()
    return found.rss, found.uss


def workers(made: Deployment, name: str) -> list[tuple[int, int]]:
    """The memory of a role's sessions' processes."""
    found = []
    for worker in made.roles[name].workers:
        with suppress(psutil.Error):
            found.append(memory(worker))
    return found


@dataclass
class Run:
    """Clients that ran side by side. sessions: memory of each process, by whose it is."""

    served: list[Served]
    sessions: dict[str, list[tuple[int, int]]]


class Load:
    """One server, one dealer, and clients."""

    def __init__(self, made: Deployment, folder: Path, tokens: int, seconds: float) -> None:
        self._made, self._folder = made, folder
        self._tokens, self._seconds = tokens, seconds
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.preloaded"])

    def run(self, work: Any, count: int) -> Run:
        """`count` clients do `work`, and begin together."""
        start, done = self._context.Barrier(count + 1), self._context.Event()
        ends, clients = [], []
        for number in range(count):
            ours, theirs = self._context.Pipe(duplex=False)
            client = self._context.Process(
                target=work, args=(self._job(number), start, done, theirs)
            )
            client.start()
            theirs.close()
            ends.append(ours)
            clients.append(client)
        start.wait(PATIENCE)
        told = [self._told(end) for end in ends]
        sessions = {name: workers(self._made, name) for name in ("server", "dealer")}
        sessions["client"] = [kept for _, kept in told]
        done.set()
        for client in clients:
            client.join(PATIENCE)
            if client.exitcode != 0:
                raise SystemExit(f"a client ended with {client.exitcode}")
        self._wait()
        return Run([served for served, _ in told], sessions)

    def _told(self, end: Any) -> Any:
        if not end.poll(PATIENCE):
            raise SystemExit("a client hangs")
        return end.recv()

    def _wait(self) -> None:
        """Until all sessions have ended."""
        deadline = time.monotonic() + PATIENCE
        while any(role.workers for role in self._made.roles.values()):
            if time.monotonic() > deadline:
                raise SystemExit("sessions are left")
            threading.Event().wait(0.05)

    def _job(self, number: int) -> Job:
        return Job(
            number,
            role_path(self._made.bundles, "client"),
            self._made.server.address,
            self._made.dealer.address,
            self._folder / "certs" / f"client-{number}",
            self._tokens,
            self._seconds,
        )


PAGE = """# Load

`make load`: several clients at once against one server and one dealer, over TLS, all on one machine
of {cores} cores, which does other work too. Each client is a process of its own and asks for one
answer after the other, with a prompt of {prompt} tokens and {tokens} more. Figures of answers and
times are ratios to one client in the same run: with more processes than cores, clients share the
machine.

Answers count by their tokens, so that those under way at the end count in part. Fairness is the
most tokens of a client, divided by the fewest: 1 is fair, and a client that starves would make it
infinite. Memory is resident bytes of a session's processes with the most clients, on average: all,
and those that a process shares with no other. The rest is code and weights, which all processes of
a role share. A session has one process at the server, two at the dealer, and the client's own.

Then {crowd} clients come at once to a server with `--sessions {places} --queue {queue}`. Each wants
{answers} answers and leaves. A client that is refused comes back after the time that it was told.

{sections}
"""

SECTION = """## {model}

Clients ask for {seconds:g} s.

| clients | answers a minute | per client | median time to first token | longest | fairness |
| ---: | ---: | ---: | ---: | ---: | ---: |
{rows}

| process, with {most} clients | resident | of its own |
| --- | ---: | ---: |
{memory}

| more clients than places | |
| --- | ---: |
| clients | {crowd} |
| clients served with all their answers | {done} |
| refusals | {refused} |
| most refusals of one client | {worst} |
| shortest and longest time that a refused client was told to wait | {waits} |
| longest time until a client had a session / mean of all | {late} |"""


def section(runs: dict[int, Run], crowd: Run, **more: Any) -> str:
    """What docs/load.md says of one model."""
    one = runs[min(runs)]
    rows = []

    def answers(run: Run) -> float:
        return sum(served.tokens for served in run.served)

    def median(run: Run) -> float:
        return statistics.median(first for served in run.served for first in served.first)

    for count, run in runs.items():
        tokens = [served.tokens for served in run.served]
        longest = max(first for served in run.served for first in served.first)
        ratio = answers(run) / answers(one)
        spread = f"{max(tokens) / min(tokens):.2f}" if min(tokens) else "infinite"
        rows.append(
            f"| {count} | {ratio:.2f} | {ratio / count:.2f} | {median(run) / median(one):.2f} "
            f"| {longest / median(one):.2f} | {spread} |"
        )
    largest = runs[max(runs)]
    memory = [
        f"| {name} | {statistics.mean(kept[0] for kept in found) / 1e6:.0f} MB "
        f"| {statistics.mean(kept[1] for kept in found) / 1e6:.0f} MB |"
        for name, found in largest.sessions.items()
    ]
    refused = [served.refused for served in crowd.served]
    waits = [wait for found in refused for wait in found]
    came = [served.came for served in crowd.served]
    return SECTION.format(
        rows="\n".join(rows),
        memory="\n".join(memory),
        most=max(runs),
        crowd=CROWD,
        done=sum(served.answers == ANSWERS for served in crowd.served),
        refused=len(waits),
        worst=max(map(len, refused)),
        waits=f"{min(waits)} s, {max(waits)} s" if waits else "none",
        late=f"{max(came) / statistics.mean(came):.1f}",
        **more,
    )


def measure(
    bundles: Path, folder: Path, clients: Sequence[int], tokens: int, seconds: float
) -> tuple[str, list[str]]:
    """The section of a model, and what went wrong."""
    most = max(*clients, CROWD)
    security = ("--certs", str(folder / "certs"))
    room = partial(deployment, bundles, deal=(*security, "--sessions", str(most)))
    runs = {}
    with room(serve=(*security, "--sessions", str(most))) as made:
        load = Load(made, folder, tokens, seconds)
        for count in sorted(clients):
            runs[count] = load.run(ask_for_a_while, count)
    with room(serve=(*security, "--sessions", str(PLACES), "--queue", str(QUEUE))) as made:
        crowd = Load(made, folder, tokens, seconds).run(ask_in_a_crowd, CROWD)
    model = read_manifest(role_path(bundles, "server"), "server").model
    wrong = [
        f"{model}: of {count} clients one got no token"
        for count, run in runs.items()
        if any(not served.tokens for served in run.served)
    ]
    if any(served.answers != ANSWERS for served in crowd.served):
        wrong.append(f"{model}: of the crowd one did not get its answers")
    return section(runs, crowd, model=model, seconds=seconds), wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each number of clients")
    parser.add_argument("--tokens", type=int, default=12, help="of an answer")
    parser.add_argument("--bundles", type=Path, help="compiled bundles of a second model")
    parser.add_argument("--most", type=int, default=4, help="most clients of the second model")
    parser.add_argument("--longer", type=float, default=4.0, help="how many times as long they ask")
    parser.add_argument("--output", type=Path, help="write docs/load.md here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        small = decoder.save(folder / "bundles", model="A decoder with one layer", max_length=64)
        names = tuple(f"client-{n}" for n in range(max(*options.clients, CROWD)))
        make_certificates(folder / "certs", names)
        jobs = [(small, options.clients, options.seconds)]
        if options.bundles:
            fewer = [count for count in options.clients if count <= options.most]
            jobs.append((options.bundles, fewer, options.longer * options.seconds))
        found = [
            measure(bundles, folder, clients, options.tokens, seconds)
            for bundles, clients, seconds in jobs
        ]
    text = PAGE.format(
        sections="\n\n".join(text for text, _ in found),
        cores=psutil.cpu_count(),
        prompt=PROMPT,
        tokens=options.tokens,
        crowd=CROWD,
        places=PLACES,
        queue=QUEUE,
        answers=ANSWERS,
    )
    if options.output:
        options.output.write_text(text)
    else:
        print(text)
    wrong = [line for _, lines in found for line in lines]
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
