"""Steps of a small decoder, all roles on a device that does not exist, against the CPU's words."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from tests.kernels import pretend

# isort: split
import torch

from mergec.runtime.core.errors import PeerEndedError
from mergec.runtime.core.spec import CLIENT, ROLES
from mergec.runtime.kernels.transfers import GUARD
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.roles.inprocess import InProcessSession
from tests import decoder

SEEDS = bytes(range(32)), bytes(range(32, 64))


class OnDevice(InProcessSession):
    """Each role's thread works on the device, or those of a server and a dealer alone."""

    def __init__(self, programs: Mapping[str, RoleProgram], client: bool) -> None:
        here = pretend.DEVICE
        super().__init__(programs, (here if client else "cpu", here, here), SEEDS)
        self._client = client

    def _all(self, work: Callable[[int], Any]) -> list[Any]:
        def inside(party: int) -> Any:
            there = pretend.Device() if self._client or party != CLIENT else nullcontext()
            with torch.no_grad(), there:
                try:
                    return work(party)
                except PeerEndedError:
                    raise
                except BaseException:
                    # The role that fails is not always the one whose error is raised.
                    traceback.print_exc()
                    raise

        return super()._all(inside)


def main() -> int:
    """With keys for both parties, with tables that only the server is sent, and with logarithms of
    long numbers; and of a client that is on the CPU."""
    os.environ[GUARD] = "1"
    runs = (("pairs", True), ("slots-6", True), ("log-6", True), ("slots-6", False))
    return max(_compared(*given) for given in runs)


def _compared(shift: str, client: bool) -> int:
    programs = {role: decoder.program(role, shift=shift) for role in ROLES}
    with InProcessSession(programs, seeds=SEEDS) as session:
        expected = [session.step([5], 0), session.step([2], 1)]
    with torch.no_grad(), pretend.Device():
        session = OnDevice(programs, client)
    began = time.perf_counter()
    with session:
        found = [session.step([5], 0), session.step([2], 1)]
    print(f"{time.perf_counter() - began:.0f} s")
    print(dict(pretend.LAUNCHES))
    for one, other in zip(expected, found, strict=True):
        other = other.inner if client else other
        if not torch.equal(one, other):
            print(f"the logits differ:\n{one}\n{other}")
            return 1
    print(f"{shift}{'' if client else ', the client on the CPU'}: the logits are equal")
    return 0


if __name__ == "__main__":
    sys.exit(main())
