"""Whether the device that a role is told to compute on is there."""

from __future__ import annotations

import os

import torch

from mergec.runtime.core.errors import MergecError


def check_device(device: str) -> None:
    """Raise MergecError if there is no such device. Processes that are forked later can use it.

    CUDA does not survive a fork, and torch refuses it to the forks of a process that has only asked
    CUDA for devices. So torch is told to ask the driver's management library.
    """
    if torch.device(device).type != "cuda":
        return
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if not torch.cuda.is_available():
        raise MergecError("there is no CUDA device here; use --device cpu")
