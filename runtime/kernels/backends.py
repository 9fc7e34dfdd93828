"""Which form of a hot loop runs: a kernel runs where its words are.

Every hot loop has up to three forms with the same parameters and, bit for bit, the same results:
one for words on the CPU (numba), one for words on CUDA (Triton, in `kernels.cuda`), and one by
torch alone, which is what the other two are tested against. Without Triton the last one also serves
CUDA. This is the only place that asks where words are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

KERNELS: dict[str, Kernel] = {}
"""All hot loops by name."""


class Kernel:
    """A hot loop. Its first argument, a tensor, decides where it runs."""

    def __init__(
        self,
        name: str,
        host: Callable[..., Any],
        reference: Callable[..., Any],
        *,
        triton: bool = True,
        together: tuple[int, int] | None = None,
    ) -> None:
        """name: "module.function" in `kernels.cuda`, imported when first needed.

        triton: False if there is no such function, because a few launches of torch are as good.
        together: see `pieces`.
        Raises ValueError if there is a kernel of this name.
        """
        if name in KERNELS:
            raise ValueError(f"there is a kernel {name} already")
        KERNELS[name] = self
        self.name, self.host, self.reference = name, host, reference
        self.has_triton, self.together = triton, together

    def __call__(self, words: torch.Tensor, *rest: Any) -> Any:
        if words.is_cpu:
            return self.host(words, *rest)
        return self.on_device(words, *rest)

    def pieces(self, words: torch.Tensor) -> Iterator[slice]:
        """The elements of words [n], as many at once as `together` says: on the CPU, on a device.

        Where their tables would fill the memory. On a device there are more, as each launch takes
        time. Raises ValueError if the kernel takes all at once.
        """
        if self.together is None:
            raise ValueError(f"{self.name} takes all elements at once")
        size = self.together[words.device.type != "cpu"]
        return (slice(first, first + size) for first in range(0, len(words), size))

    @cached_property
    def on_device(self) -> Callable[..., Any]:
        """The form for CUDA. Without Triton it is that by torch, which is slow where AES is."""
        if self.has_triton and find_spec("triton") is not None:
            return self.by_triton
        return self.reference

    @property
    def by_triton(self) -> Callable[..., Any]:
        """The form by Triton, also for words on the CPU if Triton's interpreter runs."""
        module, name = self.name.split(".")
        found: Callable[..., Any] = getattr(
            import_module(f"mergec.runtime.kernels.cuda.{module}"), name
        )
        return found
