"""Runs a program in the clear, as the reference for the parties' answer.

It needs the server's program, which holds the weights. Nothing is rounded to fixed point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from mergec.runtime.core.errors import PromptError
from mergec.runtime.core.op import Op
from mergec.runtime.core.spec import Vis
from mergec.runtime.core.structural import decode_literal, function
from mergec.runtime.ops import load_all
from mergec.runtime.ops.reveal_token import RevealToken
from mergec.runtime.program.encoding import refs
from mergec.runtime.program.program import (
    DECODE,
    FINISH,
    PADS,
    PROMPT,
    Ref,
    RoleProgram,
    is_text,
    needed,
    phase_of,
)

Choose = Callable[[torch.Tensor], int]


class PlainExecutor:
    """Calls the reference of each instruction, in program order.

    Raises PromptError if the program lacks weights, as those of client and dealer do.
    """

    def __init__(self, program: RoleProgram, device: str = "cpu") -> None:
        missing = [c.name for c in program.constants if c.name not in program.tensors]
        if missing:
            raise PromptError(
                f"plaintext needs the weights, but the {program.role}'s bundle has none "
                f"({missing[0]} is missing); use the server's bundle"
            )
        registry = load_all()
        self.program = program
        self.device = torch.device(device)
        self._tensors = {name: t.to(self.device) for name, t in program.tensors.items()}
        self._calls: list[Callable[..., Any]] = [
            _meaning(registry[item.target[4:]])
            if item.target.startswith("mpc.")
            else function(item.target)
            for item in program.instructions
        ]
        self._defined = [
            (item.name, [ref.name for ref in refs((item.args, item.kwargs))])
            for item in program.instructions
        ]
        self._last_use = self._liveness()
        floating = [
            self._tensors[c.name].dtype
            for c in program.constants
            if c.vis is not Vis.PUBLIC and self._tensors[c.name].is_floating_point()
        ]
        self._unpadded = {PADS: self._ids([0])[0]} if program.pads else {}
        self._dtype = floating[0] if floating else torch.get_default_dtype()

    def start(self) -> dict[str, torch.Tensor]:
        """Empty caches, for the first step, in the model's own precision."""
        return {
            spec.name: torch.zeros(spec.shape_of(0, 0), dtype=self._dtype, device=self.device)
            for spec in self.program.inputs
            if spec.cache_output is not None
        }

    @torch.inference_mode()
    def step(
        self, inputs: dict[str, torch.Tensor], outputs: Sequence[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """Run the part from `inputs` to `outputs`, by default the program's; return these.

        Without the number of padded tokens, there are none.
        """
        wanted = self.program.outputs if outputs is None else outputs
        inputs = {**self._unpadded, **inputs}
        values: dict[str, Any] = {**self._tensors, **inputs}
        for position in needed(self._defined, inputs, wanted):
            item = self.program.instructions[position]
            args = [self._resolve(arg, values) for arg in item.args]
            kwargs = {key: self._resolve(arg, values) for key, arg in item.kwargs.items()}
            values[item.name] = self._calls[position](*args, **kwargs)
            for name in self._last_use.get(position, ()):
                if name not in wanted:
                    values.pop(name, None)
        return {name: values[name] for name in wanted}

    def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        choose: Choose | None = None,
        stop: Sequence[int] = (),
        begun: tuple[int, dict[str, torch.Tensor]] | None = None,
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Tokens after the prompt, each with its logits [V]; greedy without `choose`.

        begun: how many tokens of the prompt are in caches, and these.
        """
        *_, tokens = [spec.name for spec in self.program.inputs if is_text(spec)]
        inputs = self.program.phase(DECODE).inputs
        following = {spec.name: spec.cache_output for spec in inputs if spec.cache_output}
        (logits,) = [name for name in self.program.outputs if name not in following.values()]
        cached, caches = begun or (0, self.start())
        if self.program.resends:
            for row in self._resend(prompt, max_tokens):
                token = int(row.argmax()) if choose is None else choose(row)
                yield token, row
                if token in stop:
                    return
            return
        new = list(prompt)[cached:]
        source: dict[str, torch.Tensor] = {}
        if self.program.encodes:
            source = {self.program.inputs[0].name: self._ids(prompt)}
            new = [self.program.manifest.answer_start]
        for _ in range(max_tokens):
            outputs = self.step({**source, tokens: self._ids(new), **caches})
            source = {}
            caches = {name: outputs[output] for name, output in following.items()}
            row = outputs[logits].reshape(-1, outputs[logits].shape[-1])[-1]
            token = int(row.argmax()) if choose is None else choose(row)
            yield token, row
            if token in stop:
                return
            new = [token] if caches else [*new, token]

    def _ids(self, tokens: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(tokens)], dtype=torch.int64, device=self.device)

    def _resend(self, prompt: Sequence[int], max_tokens: int) -> torch.Tensor:
        """Logits [max_tokens, V] of a program that resends its hidden state."""
        texts = [prompt]
        if self.program.encodes:
            texts.append([self.program.manifest.answer_start])
        phase = self.program.phase(PROMPT)
        first = {s.name: self._ids(text) for s, text in zip(phase.inputs, texts, strict=False)}
        later, caches, hidden = self.program.phase(DECODE).inputs, self.start(), []
        for position in range(max_tokens):
            phase = self.program.phase(phase_of(1, position))
            outputs = self.step({**first, **caches}, phase.outputs)
            caches = {s.name: outputs[s.cache_output] for s in later if s.cache_output}
            hidden.append(outputs[phase.outputs[0]])
            first = {later[0].name: hidden[-1]}
        phase = self.program.phase(FINISH)
        logits = self.step({phase.inputs[0].name: torch.cat(hidden, 1)}, phase.outputs)
        return logits[phase.outputs[0]][0]

    def _resolve(self, arg: Any, values: dict[str, Any]) -> Any:
        if isinstance(arg, Ref):
            return values[arg.name]
        if isinstance(arg, (list, tuple)):
            return [self._resolve(item, values) for item in arg]
        return decode_literal(arg, self.device)

    def _liveness(self) -> dict[int, list[str]]:
        """For each instruction, by position, the values that are not needed after it."""
        last: dict[str, int] = {}
        for position, item in enumerate(self.program.instructions):
            for ref in refs((item.args, item.kwargs)):
                last[ref.name] = position
        gone: dict[int, list[str]] = {}
        for name, position in last.items():
            if name not in self.program.outputs:
                gone.setdefault(position, []).append(name)
        return gone


def _meaning(op: type[Op]) -> Callable[..., Any]:
    """An op in the clear; returns logits even if the client learns only the token."""
    return _logits if op is RevealToken else op.reference


def _logits(logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return logits.clone()
