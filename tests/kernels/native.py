"""Compiles kernels for a GPU that is not here, from what `cases --record` wrote.

Down to machine code, by the ptxas that Triton brings, with the types, alignments and options that
calls have. Prints a line for each. With `count` instead of a target it only prints how many kernels
Triton would compile for these calls.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

TARGETS = {"90": GPUTarget("cuda", 90, 32), "80": GPUTarget("cuda", 80, 32)}

_BRANCHES = ("ADDED", "BITS", "BOTH", "CROSSED", "DOWN", "EVEN", "WIDE")
"""Constants that choose what a kernel computes."""


def _argument(kind: Any) -> Any:
    """Words of this type that begin so, or a number."""
    if isinstance(kind, int):
        return kind
    dtype, place = kind
    return torch.empty(64, dtype=torch.uint8)[place:].view(getattr(torch, dtype))


class Special:
    """A kernel as Triton specializes it for a call. key: equal for calls that share it."""

    def __init__(self, launched: dict[str, Any], target: GPUTarget) -> None:
        self._function = getattr(importlib.import_module(launched["module"]), launched["name"])
        self._target, self._backend = target, make_backend(target)
        bind = create_function_from_signature(
            self._function.signature, self._function.params, self._backend
        )
        words = {name: _argument(kind) for name, kind in launched["arguments"].items()}
        self._named = {**launched["constants"], **launched["options"]}
        self._bound, self._special, self._options = bind(**words, **self._named)
        name = ".".join([launched["module"].rpartition(".")[2], launched["name"]])
        self.key = name, str(self._special), str(sorted(self._options.items()))
        # Of kernels that differ in sizes alone one is compiled.
        branches = [launched["constants"].get(name) for name in _BRANCHES]
        types = [special for special in self._special if special[0] != "constexpr"]
        self.kind = name, str(types), str(branches), self.key[2]

    def compile(self) -> int:
        """Bytes of machine code."""
        options, signature, constants, attributes = self._function._pack_args(
            self._backend, self._named, self._bound, self._special, self._options
        )
        source = triton.compiler.ASTSource(self._function, signature, constants, attributes)
        made = triton.compile(source, target=self._target, options=options.__dict__)
        return len(made.asm["cubin"])


def specials(record: str, target: GPUTarget) -> Iterator[Special]:
    """What is compiled for recorded calls, each once."""
    seen = set()
    for launched in json.loads(Path(record).read_text()):
        special = Special(launched, target)
        if special.key not in seen:
            seen.add(special.key)
            yield special


def main(record: str, task: str) -> None:
    if task == "count":
        found = Counter(special.key[0] for special in specials(record, TARGETS["90"]))
        print("\n".join(f"{name}: {number}" for name, number in found.items()))
        return
    seen = set()
    for special in specials(record, TARGETS[task]):
        if special.kind in seen:
            continue
        seen.add(special.kind)
        began = time.perf_counter()
        size = special.compile()
        print(f"{special.kind[0]}: {size} bytes, {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
