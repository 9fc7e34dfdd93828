"""Compiles kernels for a GPU that is not here, from what `cases --record` wrote.

Down to machine code, by the ptxas that Triton brings. Prints a line for each.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

TARGETS = {"90": GPUTarget("cuda", 90, 32), "80": GPUTarget("cuda", 80, 32)}
_MOST = {"BLOCK": 128, "KEYS": 2}
"""Programs of the interpreter are larger than those of a GPU."""
_BRANCHES = ("ADDED", "BITS", "BOTH", "CROSSED", "WIDE")
"""Constants that choose what a kernel computes."""


def compile_kernel(launched: dict[str, Any], target: GPUTarget) -> int:
    """Bytes of a kernel's machine code."""
    module = importlib.import_module(launched["module"])
    function = getattr(module, launched["name"])
    constants = {
        name: min(value, _MOST.get(name, value)) for name, value in launched["constants"].items()
    }
    types = {**launched["types"], **dict.fromkeys(constants, "constexpr")}
    source = triton.compiler.ASTSource(
        fn=function,
        signature={name: types[name] for name in function.arg_names},
        constexprs={(function.arg_names.index(name),): each for name, each in constants.items()},
    )
    return len(triton.compile(source, target=target).asm["cubin"])


def main(record: str, target: str) -> None:
    seen = set()
    for launched in json.loads(Path(record).read_text()):
        # One of each kernel, kind of words and branch; other constants only change sizes.
        branches = [launched["constants"].get(name) for name in _BRANCHES]
        key = launched["name"], *launched["types"].values(), *branches
        if key in seen:
            continue
        seen.add(key)
        began = time.perf_counter()
        size = compile_kernel(launched, TARGETS[target])
        print(f"{launched['name']}: {size} bytes, {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
