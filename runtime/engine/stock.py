"""Runs a program with CrypTen's stock protocols, as a baseline for comparison.

The weights are secret-shared at the start of the session, the client shares one-hot rows of its
tokens, and every op on shares is CrypTen's own. A party computes alone what it can, as in
`runtime.engine.executor`. Instructions run one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mergec.runtime.core.spec import ROLES, SERVER, Vis
from mergec.runtime.core.values import OWNER, Held, visibility
from mergec.runtime.crypten import compat as crypten
from mergec.runtime.engine.functions import apply_locally
from mergec.runtime.engine.plan import Plan, Planned
from mergec.runtime.program.program import Ref, RoleProgram


class StockExecutor:
    """The client's or the server's side of a session; the dealer is CrypTen's third party."""

    def __init__(self, program: RoleProgram, device: str = "cpu") -> None:
        self.program = program
        self.device = torch.device(device)
        self.party = ROLES.index(program.role)
        crypten.cfg.encoder.precision_bits = program.manifest.fractional_bits
        self._held: dict[str, Any] = {}
        self._shared: dict[str, Any] = {}
        self._plan = Plan(program, self.device)
        self._last_use: dict[str, int] = {}
        for i, planned in enumerate(self._plan.steps):
            self._last_use.update(dict.fromkeys(planned.refs, i))

    def setup(self) -> None:
        """Load the constants, and secret-share those of the server."""
        for spec in self.program.constants:
            data = self.program.tensors.get(spec.name)
            if spec.vis is Vis.PUBLIC:
                if data is None:
                    raise KeyError(f"the bundle lacks the public tensor {spec.name}")
                self._held[spec.name] = data.to(self.device)
                continue
            owner = spec.vis if spec.vis in OWNER else Vis.SERVER
            if self.party != OWNER[owner] or data is None:
                dtype = getattr(torch, spec.dtype.removeprefix("torch."))
                data = torch.empty(spec.shape, dtype=dtype, device="meta")
            value = Held(owner, data)
            self._held[spec.name] = self._share(value) if spec.vis is Vis.SHARED else value
        for name in self._weight_names():
            self._shared[name] = self._share(self._held[name])

    def start(self) -> dict[str, Any]:
        """Empty caches, for the first step."""
        return {
            spec.name: crypten.MPCTensor.from_shares(
                torch.zeros(spec.shape_of(0, 0), dtype=torch.int64, device=self.device)
            )
            for spec in self.program.inputs
            if spec.cache_output is not None
        }

    def step(self, inputs: dict[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Run the part from `inputs` to `outputs`, by default the program's; return these."""
        wanted = self.program.outputs if outputs is None else outputs
        values: dict[str, Any] = dict(inputs)
        with crypten.quiet(), crypten.no_grad():
            for i in self._plan.active(inputs, wanted):
                planned = self._plan.steps[i]
                values[planned.name] = self._run(planned, values)
                for name in planned.refs:
                    if self._last_use[name] == i and name not in wanted:
                        values.pop(name, None)
        return {name: values[name] for name in wanted}

    def _run(self, planned: Planned, values: dict[str, Any]) -> Any:
        op = planned.op
        operands = [values[n] if n in values else self._held[n] for n in planned.refs]
        if op is None:
            return self._move(planned, operands)
        known = op.known_to(*(_visibility(value) for value in operands if _is_tensor(value)))
        if known is not None:
            return apply_locally(known, planned.call, operands)
        bound = dict(zip(planned.parameters, planned.arguments(operands), strict=True))
        for parameter, value in bound.items():
            if isinstance(value, Held) and op.operands.get(parameter) != "held":
                argument = planned.argument(parameter)
                name = argument.name if isinstance(argument, Ref) else ""
                bound[parameter] = (
                    self._shared[name] if name in self._shared else self._share(value)
                )
            elif isinstance(value, torch.Tensor) and value.is_floating_point():
                bound[parameter] = value.to(torch.float32)
        return op.stock(**bound)

    def _move(self, planned: Planned, operands: Sequence[Any]) -> Any:
        """Run a structural or public function; on secrets, run it on each party's shares."""
        flat = [v for value in operands for v in (value if isinstance(value, list) else [value])]
        if not any(map(crypten.is_secret, flat)):
            held = [value for value in flat if isinstance(value, Held)]
            return apply_locally(held[0].vis if held else Vis.PUBLIC, planned.call, operands)

        def strip(value: Any) -> Any:
            if isinstance(value, list):
                # A value that is joined with a secret is shared; a list of public indices is not.
                joined = any(map(crypten.is_secret, value))
                known = (Held, torch.Tensor) if joined else ()
                return [strip(self._share(v) if isinstance(v, known) else v) for v in value]
            return value.share.data if crypten.is_secret(value) else value

        return _wrap(planned.apply([strip(v) for v in planned.arguments(operands)]))

    def _share(self, value: Held | torch.Tensor) -> Any:
        """Secret-share a value that one party holds; the client shares a public value."""
        if isinstance(value, torch.Tensor):
            return crypten.cryptensor(value.to(torch.float32), src=0)
        data = value.value
        if data.is_meta:
            data = torch.zeros(data.shape)
        return crypten.cryptensor(data.to(self.device, torch.float32), src=OWNER[value.vis])

    def _weight_names(self) -> list[str]:
        """Names of server-held constants that an op on shares reads."""
        held = {spec.name for spec in self.program.constants if OWNER.get(spec.vis) == SERVER}
        names: dict[str, None] = {}
        for planned in self._plan.steps:
            if planned.op is not None and planned.instruction.vis is Vis.SHARED:
                names |= dict.fromkeys(name for name in planned.refs if name in held)
        return list(names)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, Held)) or crypten.is_secret(value)


def _visibility(value: Any) -> Vis:
    return Vis.SHARED if crypten.is_secret(value) else visibility(value)


def _wrap(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return crypten.MPCTensor.from_shares(result)
    if isinstance(result, Sequence):
        return [_wrap(item) for item in result]
    return result
