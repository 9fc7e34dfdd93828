"""AES by the circuits of `bitsliced`, two blocks in each thread, and streams of AES-256."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from mergec.runtime.kernels import bitsliced
from mergec.runtime.kernels.cuda.launch import kernel, launch, threads


def _circuit(function: Callable[..., Any]) -> Any:
    """A circuit as a part of kernels. Triton's interpreter runs it on the arrays that it holds.

    Operator by operator it would take two hundred times as long.
    """
    if not triton.knobs.runtime.interpret:
        return triton.jit(function)

    def run(*planes: Any) -> Any:
        like = planes[0]
        found = function(*(plane.handle.data for plane in planes))
        found = found if isinstance(found, tuple) else (found,)
        made = tuple(tl.tensor(TensorHandle(x, like.handle.dtype), like.type) for x in found)
        return made if len(made) > 1 else made[0]

    return run


transpose = _circuit(bitsliced.transpose)
substitute = _circuit(bitsliced.substitute)
shift_row = _circuit(bitsliced.shift_row)
mix_columns = _circuit(bitsliced.mix_columns)


@triton.jit
def add_key(  # type: ignore[no-untyped-def]
    q0, q1, q2, q3, q4, q5, q6, q7, left, right, turn, number, BOTH: tl.constexpr
):
    """Add a round key: that of cipher `left`, and that of `right` in planes' bits set in `turn`."""
    one = left + 8 * number
    k0 = tl.load(one).to(tl.uint32, bitcast=True)
    k1 = tl.load(one + 1).to(tl.uint32, bitcast=True)
    k2 = tl.load(one + 2).to(tl.uint32, bitcast=True)
    k3 = tl.load(one + 3).to(tl.uint32, bitcast=True)
    k4 = tl.load(one + 4).to(tl.uint32, bitcast=True)
    k5 = tl.load(one + 5).to(tl.uint32, bitcast=True)
    k6 = tl.load(one + 6).to(tl.uint32, bitcast=True)
    k7 = tl.load(one + 7).to(tl.uint32, bitcast=True)
    q0, q1, q2, q3 = q0 ^ k0, q1 ^ k1, q2 ^ k2, q3 ^ k3
    q4, q5, q6, q7 = q4 ^ k4, q5 ^ k5, q6 ^ k6, q7 ^ k7
    if BOTH:
        other = right + 8 * number
        q0 = q0 ^ (turn & (k0 ^ tl.load(other).to(tl.uint32, bitcast=True)))
        q1 = q1 ^ (turn & (k1 ^ tl.load(other + 1).to(tl.uint32, bitcast=True)))
        q2 = q2 ^ (turn & (k2 ^ tl.load(other + 2).to(tl.uint32, bitcast=True)))
        q3 = q3 ^ (turn & (k3 ^ tl.load(other + 3).to(tl.uint32, bitcast=True)))
        q4 = q4 ^ (turn & (k4 ^ tl.load(other + 4).to(tl.uint32, bitcast=True)))
        q5 = q5 ^ (turn & (k5 ^ tl.load(other + 5).to(tl.uint32, bitcast=True)))
        q6 = q6 ^ (turn & (k6 ^ tl.load(other + 6).to(tl.uint32, bitcast=True)))
        q7 = q7 ^ (turn & (k7 ^ tl.load(other + 7).to(tl.uint32, bitcast=True)))
    return q0, q1, q2, q3, q4, q5, q6, q7


@triton.jit
def encrypt(  # type: ignore[no-untyped-def]
    a0, a1, a2, a3, b0, b1, b2, b3, left, right, turn, ROUNDS: tl.constexpr, BOTH: tl.constexpr
):
    """AES of two blocks, each of four uint32 words, under planes of round keys (`expand_key`).

    left: pointer to int32 planes. With BOTH: a second cipher `right`, for the blocks whose bits are
    set in `turn`: 0x55555555 stands for block a, 0xAAAAAAAA for b.
    """
    q0, q1, q2, q3, q4, q5, q6, q7 = transpose(a0, b0, a1, b1, a2, b2, a3, b3)
    q0, q1, q2, q3, q4, q5, q6, q7 = add_key(
        q0, q1, q2, q3, q4, q5, q6, q7, left, right, turn, 0, BOTH
    )
    for number in range(1, ROUNDS):
        q0, q1, q2, q3, q4, q5, q6, q7 = substitute(q0, q1, q2, q3, q4, q5, q6, q7)
        q0, q1, q2, q3 = shift_row(q0), shift_row(q1), shift_row(q2), shift_row(q3)
        q4, q5, q6, q7 = shift_row(q4), shift_row(q5), shift_row(q6), shift_row(q7)
        q0, q1, q2, q3, q4, q5, q6, q7 = mix_columns(q0, q1, q2, q3, q4, q5, q6, q7)
        q0, q1, q2, q3, q4, q5, q6, q7 = add_key(
            q0, q1, q2, q3, q4, q5, q6, q7, left, right, turn, number, BOTH
        )
    q0, q1, q2, q3, q4, q5, q6, q7 = substitute(q0, q1, q2, q3, q4, q5, q6, q7)
    q0, q1, q2, q3 = shift_row(q0), shift_row(q1), shift_row(q2), shift_row(q3)
    q4, q5, q6, q7 = shift_row(q4), shift_row(q5), shift_row(q6), shift_row(q7)
    q0, q1, q2, q3, q4, q5, q6, q7 = add_key(
        q0, q1, q2, q3, q4, q5, q6, q7, left, right, turn, ROUNDS, BOTH
    )
    a0, b0, a1, b1, a2, b2, a3, b3 = transpose(q0, q1, q2, q3, q4, q5, q6, q7)
    return a0, a1, a2, a3, b0, b1, b2, b3


@triton.jit
def swap_bytes(word):  # type: ignore[no-untyped-def]
    """A 32-bit word with its bytes in the other order."""
    word = ((word & 0x00FF00FF) << 8) | ((word >> 8) & 0x00FF00FF)
    return (word << 16) | (word >> 16)


@kernel
def _stream(keys, out, start: tl.int64, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    # Two blocks for each thread: counters that are even, and one more.
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counter = start + 2 * pair
    low = counter.to(tl.uint32)
    high = swap_bytes((counter >> 32).to(tl.uint32))
    zero = low ^ low
    a0, a1, a2, a3, b0, b1, b2, b3 = encrypt(
        zero, zero, high, swap_bytes(low), zero, zero, high, swap_bytes(low | 1),
        keys, keys, zero, 14, False,
    )  # fmt: skip
    inside = pair < count
    place = out + 8 * pair
    tl.store(place, a0.to(tl.int32, bitcast=True), mask=inside)
    tl.store(place + 1, a1.to(tl.int32, bitcast=True), mask=inside)
    tl.store(place + 2, a2.to(tl.int32, bitcast=True), mask=inside)
    tl.store(place + 3, a3.to(tl.int32, bitcast=True), mask=inside)
    tl.store(place + 4, b0.to(tl.int32, bitcast=True), mask=inside)
    tl.store(place + 5, b1.to(tl.int32, bitcast=True), mask=inside)
    tl.store(place + 6, b2.to(tl.int32, bitcast=True), mask=inside)
    tl.store(place + 7, b3.to(tl.int32, bitcast=True), mask=inside)


def stream(keys: torch.Tensor, start: int, pairs: int) -> torch.Tensor:
    """The key stream of AES-256 in counter mode from block `start`, which is even, on: uint8.

    keys: planes of the round keys, int32 [15, 8]. The counter block begins at zero. Returns
    32 bytes for each of `pairs` pairs of blocks.
    """
    out = torch.empty(8 * pairs, dtype=torch.int32, device=keys.device)
    block = threads(1)
    launch(_stream, triton.cdiv(pairs, block), keys, out, start, pairs, BLOCK=block)
    return out.view(torch.uint8)
