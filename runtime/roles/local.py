"""Runs all three roles on this machine: starts them, streams the answer, watches them."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import IO, Any

from mergec.runtime.core import errors
from mergec.runtime.core.device import check_device
from mergec.runtime.core.errors import MergecError, PartyError, PromptError
from mergec.runtime.core.spec import CLIENT, ROLES
from mergec.runtime.program.bundle import read_manifest, role_path
from mergec.runtime.roles.party import Options
from mergec.runtime.session.drafting.drafter import read
from mergec.runtime.session.drafting.speculation import NONE, check, check_extra, steady
from mergec.runtime.session.generation import check_prompt
from mergec.runtime.session.padding import check_padding, padded_length
from mergec.runtime.session.sampling import Sampling, draw_for
from mergec.runtime.session.steps import NO_TREES, StepReport
from mergec.runtime.transport.channel import REPLY_TIMEOUT
from mergec.runtime.transport.lines import Lines

JOIN_TIMEOUT = 600.0
"""Seconds. Long, as a large bundle loads slowly; a local role that fails is noticed at once."""

FIRST_PARTY_WARNING = (
    "WARNING: with insecure_first_party the client generates all randomness: it can read every "
    "weight and value. This offers no security at all; use it for debugging only."
)

_GRACE = 1.0
"""Seconds that the other roles have to notice and to report when one role has failed."""

_EXIT_TIMEOUT = 20.0
"""Seconds that a role has to exit after it has reported the end of the session."""


@dataclass
class LocalResult:
    """The result of a local run. tokens: those after the prompt, a stop token included.

    records: one report per step, counted at the client, plus the dealer's bytes that the server
    used. setup: the same for the work before the first step. peak_memory: largest resident set of
    each role, in bytes.
    """

    tokens: list[int] = field(default_factory=list)
    records: list[StepReport] = field(default_factory=list)
    setup: StepReport | None = None
    peak_memory: dict[str, int] = field(default_factory=dict)


def run_local(
    bundle_dir: str | Path,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int = 32,
    mode: str = "mergec",
    device: str = "cpu",
    ranks: int = 1,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    ignore_stop: bool = False,
    speculate: str = "",
    speculate_tokens: int | None = None,
    speculate_fixed: float | None = None,
    speculate_extra: int | None = None,
    speculate_tree: bool = False,
    insecure_first_party: bool = False,
    public: Sequence[int] = (),
    blocks: Sequence[Sequence[int]] = (),
    prompt_piece: int = 0,
    overlap: bool = True,
    pad_prompt: int = 0,
    on_token: Callable[[int], object] | None = None,
    on_event: Callable[[str, Mapping[str, Any]], object] | None = None,
    threads: int | None = None,
    join_timeout: float = JOIN_TIMEOUT,
    timeout: float = REPLY_TIMEOUT,
) -> LocalResult:
    """Run the three bundles below `bundle_dir` as processes on this machine; returns the answer.

    temperature to repetition_penalty: see `Sampling`; None leaves it to the checkpoint's settings.
    on_token: called with each token as it is generated. on_event: called with a role and an event
    of it. speculate, speculate_tokens, speculate_fixed, speculate_extra, speculate_tree: as in
    `Connection.generate`, by name; a tree needs mergec's own protocols. If a role fails, all are
    ended, and its error is raised here. insecure_first_party: in mode crypten, let the client
    generate all randomness, as CrypTen does by default; for debugging only. public: tokens that the
    prompt begins with and that both parties know; they take no steps. blocks: tokens of public
    blocks that follow these (`session.public_blocks`). prompt_piece: most tokens of the prompt that
    one step takes; 0 for any number. overlap, pad_prompt: see `Connection`. ranks: processes
    that share the weights and caches of each role (`runtime.ranks`).
    """
    sampling = Sampling(temperature, top_k, top_p, seed, min_p, repetition_penalty)
    for role in ROLES:
        manifest = read_manifest(role_path(bundle_dir, role), role)
        if role == ROLES[CLIENT]:
            check_prompt(prompt_ids, max_tokens, manifest)
            check_padding(pad_prompt, manifest)
            room = manifest.max_length and manifest.max_length - max_tokens
            pads = padded_length(len(prompt_ids), pad_prompt, room) - len(prompt_ids)
            if mode != "mergec" and manifest.pad_token >= 0:
                raise PromptError(
                    "CrypTen's stock protocols take no padding; compile without pad_prompt"
                )
            draw_for(sampling, manifest, mode)
            if speculate not in (NONE, ""):
                read(speculate)
                check(manifest)
                steady(manifest, speculate_tokens, speculate_fixed)
                check_extra(speculate_extra, speculate_fixed)
    if speculate_tree and mode != "mergec":
        raise PromptError(NO_TREES)
    begins = [*public, *chain(*blocks)]
    if begins and pad_prompt:
        raise PromptError(
            "padding would stand between the public text and the rest of the prompt, and move them "
            "apart; leave out either pad_prompt or the public text"
        )
    if begins and (mode != "mergec" or list(prompt_ids[: len(begins)]) != begins):
        raise PromptError("public text begins the prompt, and needs mergec's own protocols")
    if begins and len(prompt_ids) == len(begins):
        raise PromptError("all of the prompt is public text; add what to answer")
    if ranks > 1 and mode != "mergec":
        raise MergecError("CrypTen's stock protocols run on one rank; leave ranks out")
    if insecure_first_party:
        if mode != "crypten":
            raise MergecError("insecure_first_party is for mode crypten only")
        sys.stderr.write(FIRST_PARTY_WARNING + "\n")
    check_device(device)
    environment = _environment(threads)
    jobs = {}
    with ExitStack() as stack:
        parties = {}
        with Lines() as lines:
            for role in ROLES:
                descriptors = lines.of(role)
                job = Options(
                    role=role,
                    bundle=str(role_path(bundle_dir, role)),
                    lines=descriptors,
                    mode=mode,
                    device=device,
                    ranks=ranks,
                    join_timeout=join_timeout,
                    timeout=timeout,
                    insecure_first_party=insecure_first_party,
                    public=list(public),
                    blocks=[list(block) for block in blocks],
                )
                if role == ROLES[CLIENT]:
                    job = replace(
                        job,
                        prompt=list(prompt_ids),
                        max_tokens=max_tokens,
                        sampling=sampling,
                        ignore_stop=ignore_stop,
                        speculate=speculate,
                        speculate_tokens=speculate_tokens,
                        speculate_fixed=speculate_fixed,
                        speculate_extra=speculate_extra,
                        speculate_tree=speculate_tree,
                        prompt_piece=prompt_piece,
                        overlap=overlap,
                        pads=pads,
                    )
                jobs[role] = job.json()
                parties[role] = stack.enter_context(_started(role, descriptors, environment))
        return _Watch(parties, on_token, on_event).run(jobs)


@dataclass
class _Party:
    role: str
    process: subprocess.Popen[str]
    errors: IO[str]
    ended: bool = False
    failure: tuple[str, str] | None = None
    """Kind and message of the error that it reported."""

    def last_words(self) -> str:
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors.read().splitlines() if line.strip()]
        return lines[-1] if lines else ""


@contextmanager
def _started(role: str, lines: list[int], environment: dict[str, str]) -> Iterator[_Party]:
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "mergec.runtime.roles.party"],
            env=environment,
            pass_fds=lines,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
        try:
            yield _Party(role, process, said)
        finally:
            _end(process)
            if process.stdout is not None:
                process.stdout.close()


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(2.0)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


class _Watch:
    """Reads the events of the three roles until all have ended, or one has failed."""

    def __init__(
        self,
        parties: dict[str, _Party],
        on_token: Callable[[int], object] | None,
        on_event: Callable[[str, Mapping[str, Any]], object] | None,
    ) -> None:
        self._parties = parties
        self._on_token = on_token
        self._on_event = on_event
        self._events: queue.SimpleQueue[tuple[str, dict[str, Any] | None]] = queue.SimpleQueue()
        self._result = LocalResult()
        self._offline: list[int] = []

    def run(self, jobs: Mapping[str, str]) -> LocalResult:
        for role, party in self._parties.items():
            threading.Thread(target=self._read, args=(party,), daemon=True).start()
            # The job holds the prompt, so it is not an argument, which lists of processes show.
            with suppress(BrokenPipeError), party.process.stdin or nullcontext() as stdin:
                if stdin is not None:
                    stdin.write(jobs[role] + "\n")
        running = set(self._parties)
        while running:
            role, event = self._events.get()
            if event is not None:
                self._take(role, event)
                continue
            running.discard(role)
            if not self._ended_well(self._parties[role]):
                self._fail(running)
        self._result.records = [
            _with_offline(record, offline)
            for record, offline in zip(self._result.records, self._padded(), strict=True)
        ]
        return self._result

    def _padded(self) -> list[int]:
        missing = len(self._result.records) - len(self._offline)
        return (self._offline + [0] * missing)[: len(self._result.records)]

    def _read(self, party: _Party) -> None:
        for line in party.process.stdout or ():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                self._events.put((party.role, event))
        self._events.put((party.role, None))

    def _take(self, role: str, event: dict[str, Any]) -> None:
        kind, party = event["event"], self._parties[role]
        client = role == ROLES[CLIENT]
        if kind == "token" and client:
            self._result.tokens.append(event["token"])
            if self._on_token is not None:
                self._on_token(event["token"])
        elif kind == "step" and client:
            self._result.records.append(StepReport(**event["report"]))
        elif kind == "step" and role == "server":
            self._offline.append(event["report"]["offline_bytes"])
        elif kind == "ready" and client:
            self._result.setup = StepReport(**event["report"])
        elif kind == "end":
            party.ended = True
            self._result.peak_memory[role] = event["peak_bytes"]
        elif kind == "error":
            party.failure = (event["kind"], event["message"])
        if self._on_event is not None:
            self._on_event(role, event)

    def _ended_well(self, party: _Party) -> bool:
        try:
            return party.process.wait(_EXIT_TIMEOUT) == 0 and party.ended
        except subprocess.TimeoutExpired:
            return False

    def _fail(self, running: set[str]) -> None:
        """Raise the error that caused the others."""
        deadline = time.monotonic() + _GRACE
        while running and (left := deadline - time.monotonic()) > 0:
            try:
                role, event = self._events.get(timeout=left)
            except queue.Empty:
                break
            if event is None:
                running.discard(role)
            elif event["event"] == "error":
                self._take(role, event)
        failures = [party.failure for party in self._parties.values() if party.failure]
        silent = [
            party
            for party in self._parties.values()
            if party.failure is None and party.process.poll() not in (None, 0)
        ]
        # A role that was killed reports nothing, while those that lose it do.
        if silent:
            # From a terminal Ctrl-C reaches all processes, and a role may be gone before this one.
            if any(party.process.poll() == -signal.SIGINT for party in silent):
                raise KeyboardInterrupt
            raise PartyError(_epitaph(silent[0]))
        if not failures:
            raise PartyError("a party ended before the session was over; start again")
        known = [(getattr(errors, kind, MergecError), message) for kind, message in failures]
        kind, message = min(known, key=lambda failure: failure[0].distance)
        raise kind(message)


def _epitaph(party: _Party) -> str:
    code = party.process.poll() or 0
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        memory = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"the {party.role} was ended by {name}{memory}; the others were stopped"
    words = party.last_words()
    return f"the {party.role} ended with code {code}{f': {words}' if words else ''}"


def _with_offline(record: StepReport, offline: int) -> StepReport:
    return StepReport(**{**record.json(), "offline_bytes": record.offline_bytes + offline})


def _environment(threads: int | None) -> dict[str, str]:
    """The environment of the roles: the same code, and an equal share of the cores."""
    root = str(Path(__file__).absolute().parents[3])
    path = os.environ.get("PYTHONPATH")
    result = {
        **os.environ,
        "PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root,
    }
    # Client and server compute at the same time; the dealer keeps a step ahead of the server.
    share = str(threads or max(1, (os.cpu_count() or 2) // 2))
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        if threads is not None:
            result[name] = share
        else:
            result.setdefault(name, share)
    return result
