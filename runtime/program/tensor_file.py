"""Writes safetensors files piece by piece, so that no more than a piece is in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Types of tensors in the order in which a file holds them: wide ones first, so that all are
aligned. It is that of safetensors."""

_METADATA = "__metadata__"
"""Key of a file's header beside the names of tensors."""

_ORDER = {dtype: place for place, dtype in enumerate(_NAMES)}
_ALIGNMENT = 8


@dataclass(frozen=True)
class Content:
    """A tensor that is yet to be written. pieces: makes its elements, in row-major order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[torch.Tensor]]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Content:
        """A tensor that is there already; made contiguous only while it is written."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: [tensor])

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file. start: its first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


def places(file: Path) -> dict[str, Place]:
    """Where the tensors of a safetensors file lie, by name.

    The file has to be valid, as `safetensors.safe_open` checks. Raises OSError if it cannot be
    read, KeyError for a dtype that no bundle holds.
    """
    dtypes = {name: dtype for dtype, name in _NAMES.items()}
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(_ALIGNMENT), "little")
        header = json.loads(stream.read(length))
    return {
        name: Place(
            dtypes[told["dtype"]],
            tuple(told["shape"]),
            _ALIGNMENT + length + told["data_offsets"][0],
        )
        for name, told in header.items()
        if name != _METADATA
    }


def write_tensors(
    file: Path, tensors: Mapping[str, Content], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file: the same bytes as `safetensors.torch.save_file`.

    Raises OSError if it cannot be written, KeyError for a dtype that no bundle holds, and
    ValueError if the pieces of a tensor have another size than it.
    """
    ordered = sorted(tensors.items(), key=lambda item: (_ORDER[item[1].dtype], item[0]))
    header: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name, content in ordered:
        start, end = end, end + content.size
        header[name] = {
            "dtype": _NAMES[content.dtype],
            "shape": list(content.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(_ALIGNMENT, "little"))
        stream.write(text)
        for name, content in ordered:
            begun = stream.tell()
            for piece in content.pieces():
                flat = piece.detach().to("cpu", content.dtype).contiguous().reshape(-1)
                stream.write(flat.view(torch.uint8).numpy().data)
            if stream.tell() - begun != content.size:
                raise ValueError(f"the pieces of {name} have {stream.tell() - begun} bytes")
