"""Which devices a party can compute on."""

from __future__ import annotations

import os

import torch

from mergec.runtime.core.errors import MergecError


def check_device(name: str) -> None:
    """Raise MergecError unless this machine has the device: "cpu", "cuda", or "cuda:1".

    Processes that are forked later can use it. CUDA does not survive a fork, and torch refuses it
    to the forks of a process that has only asked CUDA for devices. So torch is told to ask the
    driver's management library.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise MergecError(f"there is no device {name!r}; use 'cpu' or 'cuda'")
    if device.type == "cpu":
        return
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    count = torch.cuda.device_count()
    if not count:
        raise MergecError("there is no CUDA device here; use the device cpu")
    if device.index is not None and device.index >= count:
        raise MergecError(f"there is no device {name!r} here, only the first {count} of its kind")
