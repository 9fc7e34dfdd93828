"""Where a step's time goes on a GPU, by torch's profiler: a part of `gpu_check`.

Launches, copies and synchronization are calls of the driver on the CPU, of three roles in threads;
kernels and copies run on the device, which waits in between.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from gpu_rates import finish
from gpu_seen import Seen
from torch.profiler import ProfilerActivity, profile

LONGEST = 6
"""How many kernels are named."""


class Event(NamedTuple):
    """What the profiler saw. Times are in microseconds."""

    name: str
    on_device: bool
    start: float
    stop: float


_CALL = re.compile(r"cu(da)?[A-Z]")
"""How the names of calls of CUDA's runtime and of its driver begin."""


def kind(event: Event) -> str:
    """What an event is: kernel, copied, launch, copy, synchronization, another call, or nothing."""
    name = event.name
    if event.on_device:
        return "copied" if name.startswith(("Memcpy", "Memset")) else "kernel"
    if not _CALL.match(name):
        return ""
    if "Launch" in name:
        return "launch"
    if "Memcpy" in name or "Memset" in name:
        return "copy"
    return "synchronization" if "Synchronize" in name else "call"


def covered(events: Iterable[Event]) -> float:
    """Microseconds in which at least one of them runs."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda each: each.start):
        total += max(0.0, event.stop - max(until, event.start))
        until = max(until, event.stop)
    return total


def split(what: str, whole: float, events: Iterable[Event]) -> Iterator[Seen]:
    """What the events of a step of `whole` seconds tell."""
    groups: dict[str, list[Event]] = {}
    for event in events:
        groups.setdefault(kind(event), []).append(event)

    def of(name: str) -> tuple[int, float]:
        found = groups.get(name, [])
        return len(found), sum(each.stop - each.start for each in found) / 1e6

    kernels, copied = groups.get("kernel", []), groups.get("copied", [])
    busy = covered([*kernels, *copied]) / 1e6
    waited = max(0.0, whole - busy)
    yield Seen(f"{what}, under the profiler: {whole:.3f} s; the device waited {waited:.3f} s of it")
    device = "{} kernels in {:.3f} s, {} copies in {:.3f} s".format(*of("kernel"), *of("copied"))
    yield Seen(f"on the device: {device}")
    calls = {"launches": "launch", "copies": "copy", "synchronizations": "synchronization"}
    calls["other calls"] = "call"
    told = ", ".join(f"{of(k)[0]} {n} in {of(k)[1]:.3f} s" for n, k in calls.items())
    yield Seen(f"calls of CUDA on the CPU, by all three roles together: {told}")
    times: defaultdict[str, float] = defaultdict(float)
    for event in kernels:
        times[event.name] += event.stop - event.start
    longest = sorted(times.items(), key=lambda pair: -pair[1])[:LONGEST]
    names = ", ".join(f"{name[:40]} {us / 1e3:.1f} ms" for name, us in longest)
    if names:
        yield Seen(f"the longest kernels: {names}")


def profiled(what: str, work: Callable[[], Any]) -> Iterator[Seen]:
    """What the profiler sees of a call."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        began = time.perf_counter()
        work()
        finish()
        whole = time.perf_counter() - began
    events = [
        Event(e.name, str(e.device_type).endswith("CUDA"), e.time_range.start, e.time_range.end)
        for e in seen.events() or ()
    ]
    yield from split(what, whole, events)
