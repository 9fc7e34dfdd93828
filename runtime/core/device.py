"""Which devices a party can compute on."""

from __future__ import annotations

import torch

from mergec.runtime.core.errors import MergecError


def check_device(name: str) -> None:
    """Raise MergecError unless this machine has the device: "cpu", "cuda", or "cuda:1"."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise MergecError(f"there is no device {name!r}; use 'cpu' or 'cuda'")
    if device.type == "cpu":
        return
    # Asks the driver without starting CUDA, which `is_available` may do: no fork could use it then.
    count = torch.cuda.device_count()
    if not count:
        raise MergecError("there is no CUDA device here; use the device cpu")
    if device.index is not None and device.index >= count:
        raise MergecError(f"there is no device {name!r} here, only the first {count} of its kind")
