"""A session in the clear: the client's loop on a program whose weights are at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mergec.runtime.core.spec import CLIENT
from mergec.runtime.core.values import Held
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.engine.rehearsal import ghost_inputs
from mergec.runtime.program.program import Phase
from mergec.runtime.session.steps import Session
from mergec.runtime.transport.traffic import Traffic


class PlainSession(Session):
    """Runs steps by the reference of each op, with the caches of a session; nothing is secret.

    It says what an answer would be, and in how many steps. Raises PromptError if the program lacks
    weights, as those of client and dealer do.
    """

    def __init__(self, executor: PlainExecutor) -> None:
        super().__init__(executor.program)
        self.party = CLIENT
        self._executor = executor

    def setup(self) -> None:
        """Nothing is needed: the executor holds the weights."""

    def traffic(self) -> Traffic:
        return Traffic()

    @property
    def _device(self) -> torch.device:
        return self._executor.device

    def _start(self) -> dict[str, Any]:
        return dict(self._executor.start())

    def _execute(self, inputs: dict[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        clear = {k: v.value if isinstance(v, Held) else v for k, v in inputs.items()}
        found = dict(self._executor.step(clear, outputs))
        if not self.program.manifest.reveals_logits:
            found[outputs[0]] = found[outputs[0]].argmax(-1)
        return found

    def _cut(self, cache: Any, dim: int, length: int) -> Any:
        return cache.narrow(dim, 0, length)

    def _pick(self, cache: Any, dim: int, start: int, keep: Sequence[int]) -> Any:
        places = torch.tensor([*range(start), *(start + place for place in keep)])
        return cache.index_select(dim, places.to(cache.device))

    def _line(self, phase: Phase, new: int, past: int) -> dict[str, Any]:
        ghosts = ghost_inputs(phase, new, past)
        shapes = {k: v.value if isinstance(v, Held) else v.opened for k, v in ghosts.items()}
        given = {**shapes, **self._sizes(new, past)}
        return dict(self._executor.step(given, self._trees.names))

    def _join(self, values: Sequence[Any]) -> Any:
        return torch.cat(list(values), 1)
