"""One role of a measurement, as a process of its own; bench.py starts three of them.

Each step of the job reads its inputs from a file, so a step after 512 tokens does not require
running 512 tokens before it. All roles begin a step together; or the parties begin once all of the
dealer's randomness for it is available. Bytes and rounds are counted at the transport.

Usage: python benchmarks/role.py JOB.json ROLE DESCRIPTOR DESCRIPTOR
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mergec.runtime.core.context import Context
from mergec.runtime.core.memory import keep_freed_memory, peak_bytes
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.network import NETWORKS
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import CLIENT, DEALER, ROLES, SERVER, Vis
from mergec.runtime.core.values import Held, Masked, Sent, Shared
from mergec.runtime.crypten import compat as crypten
from mergec.runtime.engine.executor import Executor
from mergec.runtime.engine.plan import Planned
from mergec.runtime.engine.stock import StockExecutor
from mergec.runtime.ops.cache_append import make_room
from mergec.runtime.program.bundle import load_bundle, role_path
from mergec.runtime.program.program import FINISH, Phase, RoleProgram
from mergec.runtime.roles.party import compute, deal
from mergec.runtime.transport.channel import Channel
from mergec.runtime.transport.communicator import ChannelCommunicator
from mergec.runtime.transport.emulated import EmulatedBlocks, EmulatedLink
from mergec.runtime.transport.frames import Kind
from mergec.runtime.transport.lines import take
from mergec.runtime.transport.traffic import Exchange, Traffic

_POLL = 0.001


def _nothing(*_: Any) -> None:
    """Placeholder for actions that a role does not need."""


@dataclass(frozen=True)
class Running:
    """An executor, and actions after each step and at the end.

    dealt: waits until that many unread bytes of the dealer's stream are available. shares: returns
    what each instruction took since the last call, as `harness.Share` has it.
    """

    executor: Any
    finish: Callable[[], object] = _nothing
    leave: Callable[[], object] = _nothing
    dealt: Callable[[int], object] = _nothing
    shares: Callable[[], Mapping[str, Sequence[float]]] = dict


class TimedOp:
    """A dialect op in a party's plan, whose protocol notes its processor time at this party."""

    def __init__(self, op: type[Op], note: Callable[[float], object]) -> None:
        self._op, self._note = op, note

    def __getattr__(self, name: str) -> Any:
        return getattr(self._op, name)

    def protocol(self, *arguments: Any) -> Protocol:
        running, reply = self._op.protocol(*arguments), None
        while True:
            began = time.thread_time()
            try:
                messages = running.send(reply)
            except StopIteration as stop:
                return stop.value
            finally:
                self._note(time.thread_time() - began)
            reply = yield messages


class Watch:
    """What each instruction of an executor takes, from its record and a clock around protocols."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._seconds: defaultdict[str, float] = defaultdict(float)
        for planned in executor.plan.steps:
            if planned.op is not None:
                op: Any = TimedOp(planned.op, partial(self._add, planned.name))
                planned.op = op

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] += seconds

    def shares(self) -> dict[str, Sequence[float]]:
        """Seconds, online bytes, and bytes from the dealer, by instruction, since the last call."""
        counted = self._executor.record.by_instruction
        found = {
            name: (seconds, counted[name].online, counted[name].offline)
            if name in counted
            else (seconds, 0, 0)
            for name, seconds in self._seconds.items()
        }
        self._seconds.clear()
        return found


class TimedStock(StockExecutor):
    """Runs instructions one after another; notes the processor time and bytes of each."""

    def __init__(self, program: RoleProgram, counted: Callable[[], Traffic]) -> None:
        super().__init__(program)
        self._counted = counted
        self._shares: dict[str, Sequence[float]] = {}

    def _run(self, planned: Planned, values: dict[str, Any]) -> Any:
        before, began = self._counted().snapshot(), time.thread_time()
        result = super()._run(planned, values)
        taken = time.thread_time() - began
        spent = self._counted() - before
        self._shares[planned.name] = (taken, spent.online, spent.offline)
        return result

    def shares(self) -> dict[str, Sequence[float]]:
        """Seconds, online bytes, and bytes from the dealer, by instruction, since the last call."""
        found, self._shares = self._shares, {}
        return found


def executor_of(
    program: RoleProgram,
    channels: Mapping[int, Channel],
    network: str = "",
    seeds: tuple[bytes, ...] = (),
) -> Running:
    """The executor of mergec's protocols.

    network: profile to emulate on all links, if any. seeds: see `deal`.
    """
    if program.role == ROLES[DEALER]:
        executor, streams = deal(program, channels, seeds=seeds)
        return Running(
            executor,
            streams[CLIENT].flush,  # the server's keeps pace with it
            lambda: [stream.close() for stream in streams],
        )
    link: Exchange = channels[peer_of(program.role)]
    slowed: dict[str, Any] = {}
    if network:
        profile = NETWORKS[network]
        link = EmulatedLink(link, profile.parties)
        from_dealer = profile.to_client if program.role == ROLES[CLIENT] else profile.to_server
        slowed["slowed"] = lambda blocks: EmulatedBlocks(blocks, from_dealer)
    executor, source = compute(program, channels, link, **slowed)

    def dealt(nbytes: int) -> None:
        while source.received - source.consumed < nbytes:
            time.sleep(_POLL)

    return Running(executor, leave=source.finish, dealt=dealt)


def peer_of(role: str) -> int:
    """The computing party whose rounds a role waits for."""
    return SERVER if role == ROLES[CLIENT] else CLIENT


def inputs_of(phase: Phase, role: str, path: Path, context: Context | None) -> dict[str, Any]:
    """The phase's inputs as this role knows them. context: None for CrypTen's protocols."""
    tensors = load_file(path)
    inputs: dict[str, Any] = {}
    for spec in phase.inputs:
        opened, mask = tensors[f"{spec.name}.opened"], tensors[f"{spec.name}.mask"]
        if role == ROLES[DEALER]:
            opened = opened.to("meta")
        if spec.vis is Vis.CLIENT:
            known = role == ROLES[CLIENT]
            inputs[spec.name] = Held(Vis.CLIENT, opened if known else opened.to("meta"))
        elif context is None:
            share = opened - mask if role == ROLES[CLIENT] else -mask
            inputs[spec.name] = crypten.MPCTensor.from_shares(share)
        elif spec.form == "share":
            inputs[spec.name] = Shared(opened, spec.frac)
        elif spec.form == "sent":
            server = role == ROLES[SERVER]
            inputs[spec.name] = Sent(
                opened if server else opened.to("meta"),
                mask.to("meta") if server else mask,
                spec.frac,
            )
        else:
            inputs[spec.name] = Masked(opened, mask, spec.frac)
        if isinstance(inputs[spec.name], (Masked, Sent)):
            inputs[spec.name] = in_room(context, inputs[spec.name])
    return inputs


def in_room(context: Context, cache: Masked | Sent) -> Masked | Sent:
    """A cache as most steps of a session find it: with room for the next entry."""
    room = make_room(context, cache, 1)
    opened, mask = (part[..., : room.used, :] for part in (room.opened, room.mask))
    return type(cache)(opened, mask, cache.frac, room)


def one_step(
    executor: Any, phase: Phase, inputs: dict[str, Any], whole: bool = True
) -> dict[str, Any]:
    """A step up to the logits; if `whole`, a program that resends also runs its last phase."""
    outputs: dict[str, Any] = executor.step(inputs, phase.outputs)
    if whole and executor.program.resends and phase.name != FINISH:
        last = executor.program.phase(FINISH)
        hidden = outputs[phase.outputs[0]]
        outputs = executor.step({last.inputs[0].name: hidden}, last.outputs)
    return outputs


def main(job: dict[str, Any], role: str, descriptors: Sequence[int]) -> None:
    program = load_bundle(role_path(Path(job["bundle"]), role), role)
    channels = take(role, descriptors)
    if job["mode"] != "mergec":
        (stock if job["mode"] == "crypten" else stock_over_gloo)(job, program, channels)
        return
    running = executor_of(program, channels, job["network"])
    if job["split"] and role != ROLES[DEALER]:
        running = replace(running, shares=Watch(running.executor).shares)
    running.executor.setup()
    running.finish()
    counted = channels[peer_of(role)]
    play(job, program, channels, running, lambda: counted.traffic)
    running.leave()


def stock(job: dict[str, Any], program: RoleProgram, channels: Mapping[int, Channel]) -> None:
    """Run the job with CrypTen's stock protocols, with the dealer as its third party."""
    communicator = ChannelCommunicator(program.role, channels)
    communicator.install()
    crypten.use_provider("dealer")
    if program.role == ROLES[DEALER]:
        crypten.serve_third_party()
        return
    crypten.start_party()
    executor = TimedStock(program, lambda: communicator.traffic)
    executor.setup()
    running = Running(executor, shares=executor.shares)
    play(job, program, channels, running, lambda: communicator.traffic)
    if program.role == ROLES[CLIENT]:
        crypten.end_third_party()


def stock_over_gloo(
    job: dict[str, Any], program: RoleProgram, channels: Mapping[int, Channel]
) -> None:
    """Run the job with CrypTen as installed: over torch.distributed, without a third party.

    Each party generates randomness as if it were trusted. Bytes and rounds are not counted.
    """
    if program.role == ROLES[DEALER]:
        return
    os.environ |= {
        "DISTRIBUTED_BACKEND": "gloo",
        "RENDEZVOUS": (Path(job["folder"]) / "meeting").as_uri(),
        "WORLD_SIZE": str(len((CLIENT, SERVER))),
        "RANK": str(ROLES.index(program.role)),
    }
    crypten.use_provider("insecure-first-party")
    with crypten.quiet():
        crypten.communicator._init(use_threads=False)
    crypten.start_party()
    executor = StockExecutor(program)
    executor.setup()
    play(job, program, channels, Running(executor), Traffic)


def together(role: str, channels: Mapping[int, Channel], dealt: bool) -> None:
    """Wait until both parties are ready to begin a step; if `dealt`, until the dealer is, too."""
    if role == ROLES[DEALER]:
        channels[CLIENT].receive(Kind.MARK, limit=0)
        return
    channels[peer_of(role)].send(Kind.MARK)
    channels[peer_of(role)].receive(Kind.MARK, limit=0)
    if dealt and role == ROLES[CLIENT]:
        channels[DEALER].send(Kind.MARK)


def play(
    job: dict[str, Any],
    program: RoleProgram,
    channels: Mapping[int, Channel],
    running: Running,
    counted: Callable[[], Traffic],
) -> None:
    """Run the steps of the job, and report each step's measurements."""
    role, by_crypten = program.role, job["mode"] != "mergec"
    context = None if by_crypten else running.executor.context
    for index, step in enumerate(job["steps"]):
        phase = program.phase(step["phase"])
        live: list[float] = []
        online: list[float] = []
        processor: list[float] = []
        shares: list[Mapping[str, Sequence[float]]] = []
        offline = 0
        for repeat in range(step["repeats"] + step["ahead"]):
            ahead = repeat >= step["repeats"]
            path = Path(job["folder"]) / f"{index}-{repeat}-{role}.safetensors"
            inputs = inputs_of(phase, role, path, context)
            together(role, channels, not by_crypten)
            if ahead and role != ROLES[DEALER]:
                running.dealt(offline)
                together(role, channels, dealt=False)
            before, dealt = counted().snapshot(), context.offline_bytes if context else 0
            began, busy = time.perf_counter(), time.process_time()
            with torch.inference_mode():
                outputs = one_step(running.executor, phase, inputs, step["whole"])
            running.finish()
            (online if ahead else live).append(time.perf_counter() - began)
            processor.append(time.process_time() - busy)
            noted = running.shares()
            if not ahead:
                shares.append(noted)
            spent = counted() - before
            offline = context.offline_bytes - dealt if context else spent.offline
        known = next((v for v in outputs.values() if isinstance(v, Held)), None)
        if role == ROLES[CLIENT] and known is not None:
            save_file({"value": known.value.contiguous()}, Path(job["folder"]) / f"{index}.out")
        say({
            "event": "step",
            "seconds": statistics.median(live),
            "online_seconds": statistics.median(online) if online else None,
            "processor_seconds": statistics.median(processor),
            "rounds": spent.rounds,
            "online": spent.online,
            "offline": offline,
            "peak": peak_bytes(),
            "shares": shares[live.index(statistics.median_low(live))] if job["split"] else {},
        })  # fmt: skip


def say(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    keep_freed_memory()
    torch.set_num_threads(1)
    main(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2], list(map(int, sys.argv[3:])))
