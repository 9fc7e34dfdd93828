"""One role of a measurement, as a process of its own; bench.py starts three of them.

Each step of the job gets its inputs from a file, so that a step after 512 tokens needs no 512
tokens before it. All roles begin a step together; bytes and rounds are counted at the transport.

Usage: python benchmarks/role.py JOB.json ROLE
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from runtime import crypten_compat as crypten
from runtime.bundle import load_bundle, role_path
from runtime.context import ClientContext, Context, DealerContext, ServerContext
from runtime.correlations.prg import SEED_BYTES, new_seed
from runtime.executor import Executor
from runtime.memory import keep_freed_memory, peak_bytes
from runtime.network import NETWORKS
from runtime.program import FINISH, Phase, RoleProgram
from runtime.spec import CLIENT, DEALER, ROLES, SERVER, Vis
from runtime.stock import StockExecutor
from runtime.transport.communicator import CountingCommunicator
from runtime.transport.emulated import EmulatedLink
from runtime.transport.gloo_stream import dealer_receiver, dealer_sender
from runtime.transport.link import Exchange, Link
from runtime.values import Held, Masked, Sent, Shared


def executor_of(
    program: RoleProgram,
    communicator: CountingCommunicator,
    stock: bool,
    network: str,
    stack: ExitStack,
    seeds: tuple[bytes, ...] = (),
) -> tuple[Any, Any]:
    """The executor, and what is to be done after each step.

    seeds: the client's and the server's, to repeat a session word by word; else fresh ones.
    """
    if stock:
        crypten.start_party()
        return StockExecutor(program), lambda: None
    if communicator.rank == DEALER:
        client_seed, server_seed = seeds or (new_seed(), new_seed())
        streams = {party: dealer_sender(communicator, party) for party in (CLIENT, SERVER)}
        for party, seed in ((CLIENT, client_seed), (SERVER, server_seed)):
            streams[party].write(torch.frombuffer(bytearray(seed), dtype=torch.uint8))
            streams[party].flush()
        context = DealerContext(client_seed, server_seed, streams[CLIENT], streams[SERVER])
        for stream in streams.values():
            stack.callback(stream.close)
        return Executor(program, context, None), lambda: [s.flush() for s in streams.values()]
    source = dealer_receiver(communicator)
    seed = source.read(SEED_BYTES).numpy().tobytes()
    link: Exchange = Link(communicator)
    if network:
        link = EmulatedLink(link, NETWORKS[network])
    context: Context
    if communicator.rank == CLIENT:
        context = ClientContext(seed, source)
    else:
        context = ServerContext(seed, source)
    return Executor(program, context, link, Executor.take_weights(program)), lambda: None


def inputs_of(phase: Phase, role: str, path: Path, stock: bool) -> dict[str, Any]:
    """The phase's inputs as this role knows them."""
    tensors = load_file(path)
    inputs: dict[str, Any] = {}
    for spec in phase.inputs:
        opened, mask = tensors[f"{spec.name}.opened"], tensors[f"{spec.name}.mask"]
        if role == ROLES[DEALER]:
            opened = opened.to("meta")
        if spec.vis is Vis.CLIENT:
            known = role == ROLES[CLIENT]
            inputs[spec.name] = Held(Vis.CLIENT, opened if known else opened.to("meta"))
        elif stock:
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
    return inputs


def one_step(executor: Any, phase: Phase, inputs: dict[str, Any]) -> dict[str, Any]:
    """A step up to the logits: a program that resends its hidden state finishes at once."""
    outputs: dict[str, Any] = executor.step(inputs, phase.outputs)
    if executor.program.resends:
        last = executor.program.phase(FINISH)
        hidden = outputs[phase.outputs[0]]
        outputs = executor.step({last.inputs[0].name: hidden}, last.outputs)
    return outputs


def main(job: dict[str, Any], role: str) -> None:
    stock = job["mode"] == "crypten"
    program = load_bundle(role_path(Path(job["bundle"]), role), role)
    if stock:
        crypten.use_provider("dealer")
    communicator = CountingCommunicator.join(role, job["rendezvous"], third_party=stock)
    if stock and role == ROLES[DEALER]:
        crypten.serve_third_party()
        say({"event": "end"})
        communicator.leave()
        return
    with ExitStack() as stack:
        executor, finish = executor_of(program, communicator, stock, job["network"], stack)
        executor.setup()
        finish()
        play(job, program, communicator, executor, finish)
    if stock and role == ROLES[CLIENT]:
        crypten.end_third_party()
    communicator.leave()


def play(
    job: dict[str, Any],
    program: RoleProgram,
    communicator: CountingCommunicator,
    executor: Any,
    finish: Callable[[], object],
) -> None:
    """Run the steps of the job, and say what each took."""
    role, stock = program.role, job["mode"] == "crypten"
    for index, step in enumerate(job["steps"]):
        phase, seconds = program.phase(step["phase"]), []
        for repeat in range(step["repeats"]):
            path = Path(job["folder"]) / f"{index}-{repeat}-{role}.safetensors"
            inputs = inputs_of(phase, role, path, stock)
            group = communicator.main_group if stock else communicator.control_group
            other = SERVER if role == ROLES[CLIENT] else CLIENT
            communicator.wait(other, dist.barrier(group, async_op=True))
            before, began = communicator.traffic.snapshot(), time.perf_counter()
            dealt = 0 if stock else executor.context.offline_bytes
            with torch.inference_mode():
                outputs = one_step(executor, phase, inputs)
            finish()
            seconds.append(time.perf_counter() - began)
            spent = communicator.traffic - before
        if role == ROLES[CLIENT]:
            (known,) = [v for v in outputs.values() if isinstance(v, Held)]
            save_file({"value": known.value.contiguous()}, Path(job["folder"]) / f"{index}.out")
        say({
            "event": "step",
            "seconds": statistics.median(seconds),
            "rounds": spent.rounds,
            "online": spent.online,
            "offline": spent.offline if stock else executor.context.offline_bytes - dealt,
            "peak": peak_bytes(),
        })  # fmt: skip


def say(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    keep_freed_memory()
    torch.set_num_threads(1)
    main(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
