"""A session's constants: encoded as fixed-point integers, and put under their static masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.memory import release_freed_memory
from mergec.runtime.core.messages import Protocol
from mergec.runtime.core.spec import SERVER, Vis
from mergec.runtime.core.values import OWNER, Held, encode, scale_rows
from mergec.runtime.engine.plan import Plan
from mergec.runtime.kernels.transfers import to_device
from mergec.runtime.program.program import RoleProgram, TensorSpec
from mergec.runtime.program.tensor_file import Content
from mergec.runtime.protocols.shared_weights import (
    open_constant,
    share_constant,
    tell_constant_seed,
)
from mergec.runtime.protocols.weights import Constant, reuse_weight, share_weight

_INT32_LIMIT = 2**31 - 1

_PIECE = 1 << 20
"""Elements of a weight that are encoded at once."""


@dataclass
class Constants:
    """held: each constant as the instructions read it. weights: those under a static mask."""

    held: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Constant] = field(default_factory=dict)


def take_weights(program: RoleProgram) -> dict[str, torch.Tensor]:
    """The server's weights as fixed-point integers, by name; empty for the other roles.

    The tensors are int32 where all words fit, else int64, with the program's fractional bits and
    those that the op adds. Those that the bundle holds are mapped from its file; others are encoded
    here. Weights that share memory stay one tensor. Each real-valued tensor that nothing else needs
    is removed from `program` as soon as it is encoded, so that the weights are never in memory
    twice.
    """
    plan, tensors, words = Plan(program), program.tensors, program.words
    result: dict[str, torch.Tensor] = {}
    for names, frac, parts in _weights(plan):
        source, stored = words.get(names[0], (None, None))
        # A program in memory may have been given other weights since.
        known = stored is not None and source is tensors[names[0]]
        encoded = stored if known else encode_weight(tensors[names[0]], frac, parts)
        result |= dict.fromkeys(names, encoded)
        for name in set(names) - plan.in_the_clear:
            del tensors[name]
    words.clear()
    return result


def words_to_store(program: RoleProgram) -> tuple[dict[str, Content], dict[str, str]]:
    """What `take_weights` returns, for a file, encoded piece by piece as it is written.

    The second result names, for each weight that shares memory with another one, that other.
    """
    contents: dict[str, Content] = {}
    aliases: dict[str, str] = {}
    for names, frac, parts in _weights(Plan(program)):
        first, *others = names
        contents[first] = _content(program.tensors[first], frac, parts)
        aliases |= dict.fromkeys(others, first)
    return contents, aliases


def _weights(plan: Plan) -> Iterator[tuple[list[str], int, Sequence[int]]]:
    """The weights under static masks that a program holds: the names of one tensor with the same
    fractional bits, these bits, and those of its parts."""
    program, tensors = plan.program, plan.program.tensors
    tied: dict[tuple[int, torch.Size, int], list[str]] = {}
    for name, bits in sorted(plan.weight_bits.items()):
        if name in tensors:
            key = (tensors[name].data_ptr(), tensors[name].shape, bits)
            tied.setdefault(key, []).append(name)
    for (_, _, bits), names in tied.items():
        yield names, program.manifest.fractional_bits + bits, plan.weight_parts.get(names[0], ())


def encode_weight(data: torch.Tensor, frac: int, parts: Sequence[int] = ()) -> torch.Tensor:
    """Fixed-point words with `frac` fractional bits: int32 if all fit, else int64.

    parts: further fractional bits of the rows, see `mpc.linear`.
    """
    content = _content(data, frac, parts)
    words = torch.empty(data.numel(), dtype=content.dtype)
    for piece, source in zip(words.split(_PIECE), content.pieces(), strict=True):
        piece.copy_(source)
    return words.reshape(data.shape)


def _content(data: torch.Tensor, frac: int, parts: Sequence[int]) -> Content:
    """Words of a weight in pieces, because a whole weight in float64 would take twice to four times
    its own memory."""
    ends = torch.aminmax(scale_rows(data, parts)) if data.numel() else ()
    narrow = round(max(map(abs, map(float, ends)), default=0.0) * 2.0**frac) <= _INT32_LIMIT

    def pieces() -> Iterator[torch.Tensor]:
        for source in scale_rows(data, parts).reshape(-1).split(_PIECE):
            yield encode(source, frac)

    return Content(torch.int32 if narrow else torch.int64, tuple(data.shape), pieces)


def load_constants(
    plan: Plan,
    context: Context,
    drive: Callable[[Protocol], Any],
    encoded: dict[str, torch.Tensor],
    kept: Mapping[str, torch.Tensor] | None = None,
) -> Constants:
    """Load the constants of a program, and put the server's weights under their static masks.

    drive: runs a protocol with the other roles and returns its result.
    encoded: what `take_weights` returned at the server; each entry is removed as it is used.
    kept: see `Executor`.

    Raises KeyError if the program lacks a public tensor.
    """
    program, device, loaded = plan.program, context.device, Constants()
    placed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    if any(spec.vis is Vis.SHARED for spec in program.constants):
        drive(tell_constant_seed(context))
    for spec in program.constants:
        data = program.tensors.get(spec.name)
        if spec.vis is Vis.PUBLIC:
            if data is None:
                raise KeyError(f"the bundle lacks the public tensor {spec.name}")
            # What is public is computed on the CPU; a protocol moves what it takes of it.
            loaded.held[spec.name] = data
            continue
        if context.party != OWNER.get(spec.vis, SERVER) or data is None:
            data = without_data(spec)
        masked = spec.name in plan.weight_bits
        frac = context.fixed + plan.weight_bits.get(spec.name, 0)
        if spec.vis is not Vis.SHARED:
            # What is used only under a static mask is there as integers already.
            read = not masked or spec.name in plan.in_the_clear
            seen = to_device(data, device, "input") if read else without_data(spec)
            loaded.held[spec.name] = Held(spec.vis, seen)
            if not masked:
                continue
        if spec.name in encoded:
            words = encoded.pop(spec.name)
        elif data.is_meta:
            words = torch.empty(data.shape, dtype=torch.int64, device="meta")
        else:
            words = encode_weight(data, frac, plan.weight_parts.get(spec.name, ()))
        if spec.vis is not Vis.SHARED:
            _, place = placed.get(id(words)) or (words, context.keep_weight(words))
            if any(other is words for other in encoded.values()):
                placed[id(words)] = words, place  # weights that share memory are placed once
            loaded.weights[spec.name] = (
                drive(share_weight(context, spec.name, words, frac, place))
                if kept is None
                else reuse_weight(context, words, kept.get(spec.name, words), frac, place)
            )
            if data.numel() >= _PIECE // 4:
                # What is small and stays is put where buffers were freed, and the next buffers of
                # that size do not fit there: in the end the server would hold 4 bytes a weight.
                release_freed_memory()
        elif masked:
            words = to_device(words, device, "input")
            opened = drive(open_constant(context, spec.name, words, frac))
            loaded.weights[spec.name] = loaded.held[spec.name] = opened
        else:
            words = to_device(words, device, "input")
            loaded.held[spec.name] = share_constant(context, spec.name, words, frac)
    return loaded


def without_data(spec: TensorSpec) -> torch.Tensor:
    """A meta tensor in place of a constant that this role does not know."""
    dtype = getattr(torch, spec.dtype.removeprefix("torch."))
    return torch.empty(spec.shape, dtype=dtype, device="meta")
