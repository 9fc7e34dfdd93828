"""`protocol_calls` on a device that does not exist."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.kernels import pretend

# isort: split
import torch

from tests.kernels.protocol_calls import CASES, compared


@contextmanager
def inside() -> Iterator[None]:
    with torch.no_grad(), pretend.Device():
        yield


def main() -> int:
    failed = 0
    for name in CASES:
        outcome, right = compared(name, pretend.DEVICE, inside)
        failed += not right
        print(f"{name}: {outcome}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
