"""Client, server and dealer of a compiled program in threads of one process."""

from __future__ import annotations

import functools
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from mergec.compiler.config import CompileConfig
from mergec.compiler.driver import compile_decoder
from mergec.compiler.program import Program
from mergec.runtime.core.context import ClientContext, DealerContext, ServerContext
from mergec.runtime.core.spec import CLIENT, DEALER, ROLES, SERVER, Cost, Vis
from mergec.runtime.core.values import Held, Masked
from mergec.runtime.correlations.prg import new_seed
from mergec.runtime.engine.executor import Executor, StepRecord
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.transport.loopback import dealer_pair, link_pair
from tests.families import float_decoder

TIMEOUT = 600.0


@dataclass
class Step:
    """The client's result of one step, and its cost at each role."""

    logits: torch.Tensor
    records: list[StepRecord]

    @property
    def by_instruction(self) -> dict[str, Cost]:
        """Online cost as counted by the server, and offline bytes as counted by both parties."""
        client, server = (self.records[party].by_instruction for party in (CLIENT, SERVER))
        return {
            name: replace(cost, offline=cost.offline + client.get(name, Cost()).offline)
            for name, cost in server.items()
        }


@functools.cache
def compiled(family: str, **options: Any) -> tuple[Any, Program]:
    """A tiny float32 decoder and its program, compiled with these options; must not be modified.

    By default without noise in the logits, so that they can be compared with the model's.
    """
    model, captured = float_decoder(family)
    config = CompileConfig(**{"max_length": 64, "logit_noise": 0.0, **options})
    return model, compile_decoder(model, config=config, captured=captured)


def play(roles: dict[str, RoleProgram], steps: Sequence[Sequence[int]]) -> list[Step]:
    """Run the steps, each with its new tokens, over one cache; fails if a role fails."""
    client_link, server_link = link_pair(TIMEOUT)
    streams = dealer_pair(timeout=TIMEOUT), dealer_pair(timeout=TIMEOUT)
    senders = [sender for sender, _ in streams]
    client, server = new_seed(), new_seed()
    contexts = [
        ClientContext(client, streams[CLIENT][1]),
        ServerContext(server, streams[SERVER][1]),
        DealerContext(client, server, *senders),
    ]
    links = [client_link, server_link, None]
    results: list[list[tuple[Any, StepRecord]]] = [[], [], []]
    failures: list[str] = []

    def run(party: int) -> None:
        try:
            executor = Executor(roles[ROLES[party]], contexts[party], links[party])
            executor.setup()
            caches: dict[str, Any] = {}
            for ids in steps:
                inputs = caches or empty_caches(executor.program, party)
                tokens = torch.tensor([list(ids)], device="cpu" if party == CLIENT else "meta")
                outputs = executor.step({"input_ids": Held(Vis.CLIENT, tokens), **inputs})
                specs = executor.program.inputs[1:]
                names = executor.program.outputs
                caches = {
                    spec.name: outputs[name] for spec, name in zip(specs, names[1:], strict=True)
                }
                results[party].append((outputs[names[0]], executor.record))
            if party == DEALER:
                for sender in senders:
                    sender.close()
        except Exception:  # noqa: BLE001 - shown by the main thread
            failures.append(f"{ROLES[party]}:\n{traceback.format_exc()}")
            for link in (client_link, server_link):
                link.close()
            for sender in senders:
                sender.abandon()

    threads = [threading.Thread(target=run, args=(party,), daemon=True) for party in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * TIMEOUT)
    assert not failures, "\n".join(failures)
    return [
        Step(rows[CLIENT][0].value, [record for _, record in rows])
        for rows in zip(*results, strict=True)
    ]


def drawn_masks(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The words of all masks of 64 bits that the dealer draws from now on."""
    drawn: list[torch.Tensor] = []
    for name in ("mask", "client_mask"):
        real = getattr(DealerContext, name)

        def noted(self: Any, shape: Any, *kind: Any, real: Any = real) -> torch.Tensor:
            words = real(self, shape, *kind)
            if words.dtype is torch.int64:
                drawn.append(words.clone().reshape(-1))
            return words

        monkeypatch.setattr(DealerContext, name, noted)
    return drawn


def empty_caches(program: RoleProgram, party: int) -> dict[str, Masked]:
    caches = {}
    for spec in program.inputs[1:]:
        zeros = torch.zeros([0 if isinstance(s, str) else s for s in spec.shape], dtype=torch.int64)
        mask = zeros.to("meta") if party == DEALER else zeros
        caches[spec.name] = Masked(mask, zeros, spec.frac)
    return caches
