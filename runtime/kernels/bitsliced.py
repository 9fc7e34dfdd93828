"""AES as a circuit on bit planes: no table is read, and no branch is taken, anywhere.

Two blocks are encrypted together, as eight words of 32 bits: bit b of every byte of both blocks
stands in plane b. Byte (row, column) of block 0 is bit 8 row + 2 column of a plane, and that of
block 1 the next. All functions take and return eight planes of any type with `&`, `|`, `^` and
shifts of unsigned words: arrays of numpy here, blocks of a Triton kernel in `cuda.cipher`. None
calls another one, as kernels compile each of them by itself.

Sources: FIPS 197; the circuit of the S-box of Boyar and Peralta, "A small depth-16 circuit for the
AES S-box" (SEC 2012); the layout is that of the `aes_ct` of BearSSL.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WORD = 4
"""Words of 32 bits in a block."""


def transpose(q0, q1, q2, q3, q4, q5, q6, q7):  # type: ignore[no-untyped-def]
    """From words to planes and back. Word i of block b is number 2 i + b."""
    a, b, c, d = q0, q2, q4, q6
    q0 = (a & 0x55555555) | ((q1 & 0x55555555) << 1)
    q1 = ((a & 0xAAAAAAAA) >> 1) | (q1 & 0xAAAAAAAA)
    q2 = (b & 0x55555555) | ((q3 & 0x55555555) << 1)
    q3 = ((b & 0xAAAAAAAA) >> 1) | (q3 & 0xAAAAAAAA)
    q4 = (c & 0x55555555) | ((q5 & 0x55555555) << 1)
    q5 = ((c & 0xAAAAAAAA) >> 1) | (q5 & 0xAAAAAAAA)
    q6 = (d & 0x55555555) | ((q7 & 0x55555555) << 1)
    q7 = ((d & 0xAAAAAAAA) >> 1) | (q7 & 0xAAAAAAAA)
    a, b, c, d = q0, q1, q4, q5
    q0 = (a & 0x33333333) | ((q2 & 0x33333333) << 2)
    q2 = ((a & 0xCCCCCCCC) >> 2) | (q2 & 0xCCCCCCCC)
    q1 = (b & 0x33333333) | ((q3 & 0x33333333) << 2)
    q3 = ((b & 0xCCCCCCCC) >> 2) | (q3 & 0xCCCCCCCC)
    q4 = (c & 0x33333333) | ((q6 & 0x33333333) << 2)
    q6 = ((c & 0xCCCCCCCC) >> 2) | (q6 & 0xCCCCCCCC)
    q5 = (d & 0x33333333) | ((q7 & 0x33333333) << 2)
    q7 = ((d & 0xCCCCCCCC) >> 2) | (q7 & 0xCCCCCCCC)
    a, b, c, d = q0, q1, q2, q3
    q0 = (a & 0x0F0F0F0F) | ((q4 & 0x0F0F0F0F) << 4)
    q4 = ((a & 0xF0F0F0F0) >> 4) | (q4 & 0xF0F0F0F0)
    q1 = (b & 0x0F0F0F0F) | ((q5 & 0x0F0F0F0F) << 4)
    q5 = ((b & 0xF0F0F0F0) >> 4) | (q5 & 0xF0F0F0F0)
    q2 = (c & 0x0F0F0F0F) | ((q6 & 0x0F0F0F0F) << 4)
    q6 = ((c & 0xF0F0F0F0) >> 4) | (q6 & 0xF0F0F0F0)
    q3 = (d & 0x0F0F0F0F) | ((q7 & 0x0F0F0F0F) << 4)
    q7 = ((d & 0xF0F0F0F0) >> 4) | (q7 & 0xF0F0F0F0)
    return q0, q1, q2, q3, q4, q5, q6, q7


def substitute(q0, q1, q2, q3, q4, q5, q6, q7):  # type: ignore[no-untyped-def]
    """The S-box on every byte. The circuit's first bit is the highest one."""
    x0, x1, x2, x3, x4, x5, x6, x7 = q7, q6, q5, q4, q3, q2, q1, q0
    y14, y13, y9, y8 = x3 ^ x5, x0 ^ x6, x0 ^ x3, x0 ^ x5
    t0 = x1 ^ x2
    y1 = t0 ^ x7
    y4, y12, y2, y5 = y1 ^ x3, y13 ^ y14, y1 ^ x0, y1 ^ x6
    y3, t1 = y5 ^ y8, x4 ^ y12
    y15, y20 = t1 ^ x5, t1 ^ x1
    y6, y10, y11 = y15 ^ x7, y15 ^ t0, y20 ^ y9
    y7, y17, y19, y16 = x7 ^ y11, y10 ^ y11, y10 ^ y8, t0 ^ y11
    y21, y18 = y13 ^ y16, x0 ^ y16
    t2 = y12 & y15
    t4, t6 = (y3 & y6) ^ t2, (y4 & x7) ^ t2
    t7 = y13 & y16
    t9, t11 = (y5 & y1) ^ t7, (y2 & y7) ^ t7
    t12 = y9 & y11
    t14, t16 = (y14 & y17) ^ t12, (y8 & y10) ^ t12
    t21, t22 = t4 ^ t14 ^ y20, t6 ^ t16 ^ y19
    t23, t24 = t9 ^ t14 ^ y21, t11 ^ t16 ^ y18
    t25, t26 = t21 ^ t22, t21 & t23
    t27 = t24 ^ t26
    t29 = (t25 & t27) ^ t22
    t33 = ((t22 ^ t26) & (t23 ^ t24)) ^ t24
    t36 = t24 & (t27 ^ t33)
    t37 = t36 ^ t23 ^ t33
    t40 = t25 ^ (t29 & (t27 ^ t36))
    t41, t42, t43, t44 = t40 ^ t37, t29 ^ t33, t29 ^ t40, t33 ^ t37
    t45 = t42 ^ t41
    z0, z1, z2, z3, z4 = t44 & y15, t37 & y6, t33 & x7, t43 & y16, t40 & y1
    z5, z6, z7, z8, z9 = t29 & y7, t42 & y11, t45 & y17, t41 & y10, t44 & y12
    z10, z11, z12, z13 = t37 & y3, t33 & y4, t43 & y13, t40 & y5
    z14, z15, z16, z17 = t29 & y2, t42 & y9, t45 & y14, t41 & y8
    t46, t47, t48, t49 = z15 ^ z16, z10 ^ z11, z5 ^ z13, z9 ^ z10
    t50, t51, t52, t53 = z2 ^ z12, z2 ^ z5, z7 ^ z8, z0 ^ z3
    t54, t55, t56, t57 = z6 ^ z7, z16 ^ z17, z12 ^ t48, t50 ^ t53
    t58, t59 = z4 ^ t46, z3 ^ t54
    t60, t61, t62, t63, t64 = t46 ^ t57, z14 ^ t57, t52 ^ t58, t49 ^ t58, z4 ^ t59
    t65, t66 = t61 ^ t62, z1 ^ t63
    t67, s3 = t64 ^ t65, t53 ^ t66
    return (
        t48 ^ t60 ^ 0xFFFFFFFF, t56 ^ t62 ^ 0xFFFFFFFF, t47 ^ t65, t51 ^ t66, s3,
        t55 ^ t67 ^ 0xFFFFFFFF, t64 ^ s3 ^ 0xFFFFFFFF, t59 ^ t63,
    )  # fmt: skip


def shift_row(q):  # type: ignore[no-untyped-def]
    """One plane with its rows rotated: a row is a byte of it, a column two bits."""
    return (
        (q & 0x000000FF)
        | ((q & 0x0000FC00) >> 2)
        | ((q & 0x00000300) << 6)
        | ((q & 0x00F00000) >> 4)
        | ((q & 0x000F0000) << 4)
        | ((q & 0xC0000000) >> 6)
        | ((q & 0x3F000000) << 2)
    )


def mix_columns(q0, q1, q2, q3, q4, q5, q6, q7):  # type: ignore[no-untyped-def]
    """Each column times the polynomial of FIPS 197, section 5.1.3."""
    r0, r1 = (q0 >> 8) | (q0 << 24), (q1 >> 8) | (q1 << 24)
    r2, r3 = (q2 >> 8) | (q2 << 24), (q3 >> 8) | (q3 << 24)
    r4, r5 = (q4 >> 8) | (q4 << 24), (q5 >> 8) | (q5 << 24)
    r6, r7 = (q6 >> 8) | (q6 << 24), (q7 >> 8) | (q7 << 24)
    s0, s1, s2, s3 = q0 ^ r0, q1 ^ r1, q2 ^ r2, q3 ^ r3
    s4, s5, s6, s7 = q4 ^ r4, q5 ^ r5, q6 ^ r6, q7 ^ r7
    return (
        s7 ^ r0 ^ ((s0 << 16) | (s0 >> 16)),
        s0 ^ s7 ^ r1 ^ ((s1 << 16) | (s1 >> 16)),
        s1 ^ r2 ^ ((s2 << 16) | (s2 >> 16)),
        s2 ^ s7 ^ r3 ^ ((s3 << 16) | (s3 >> 16)),
        s3 ^ s7 ^ r4 ^ ((s4 << 16) | (s4 >> 16)),
        s4 ^ r5 ^ ((s5 << 16) | (s5 >> 16)),
        s5 ^ r6 ^ ((s6 << 16) | (s6 >> 16)),
        s6 ^ r7 ^ ((s7 << 16) | (s7 >> 16)),
    )


def _planes(blocks: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The planes of pairs of blocks [n, 4] of 32-bit words: uint32 [8, n]."""
    words = [each for i in range(WORD) for each in (blocks[:, i], others[:, i])]
    return np.array(transpose(*words))


def expand_key(key: bytes) -> np.ndarray:
    """The planes of all round keys of AES-128 or AES-256: uint32 [rounds + 1, 8].

    Source: FIPS 197, section 5.2; its S-box is `substitute`, so it reads no table either.
    """
    size = len(key) // WORD
    words = [int.from_bytes(key[i : i + WORD], "little") for i in range(0, len(key), WORD)]
    constant = 1
    for i in range(size, WORD * (size + 7)):
        word = words[-1]
        if i % size == 0:
            word = _substituted(word >> 8 | (word & 0xFF) << 24) ^ constant
            constant = constant << 1 ^ (0x11B if constant & 0x80 else 0)
        elif size > 6 and i % size == WORD:
            word = _substituted(word)
        words.append(words[-size] ^ word)
    blocks = np.array(words, np.uint32).reshape(-1, WORD)
    return np.ascontiguousarray(_planes(blocks, blocks).T)


def _substituted(word: int) -> int:
    """The S-box on the four bytes of a word."""
    block = np.full((1, WORD), word, np.uint32)
    found = np.array(transpose(*substitute(*_planes(block, block))))
    return int(found[0, 0])


def encrypt(keys: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """AES of blocks, uint32 [n, 4], under planes from `expand_key`: the reference for kernels."""
    pairs = np.concatenate([blocks, blocks[: len(blocks) % 2]]).reshape(-1, 2, WORD)
    state: Sequence[np.ndarray] = list(_planes(pairs[:, 0], pairs[:, 1]) ^ keys[0][:, None])
    for number, key in enumerate(keys[1:], 1):
        state = [shift_row(plane) for plane in substitute(*state)]
        if number + 1 < len(keys):
            state = mix_columns(*state)
        state = [plane ^ word for plane, word in zip(state, key, strict=True)]
    words = np.array(transpose(*state))
    return words.reshape(WORD, 2, -1).transpose(2, 1, 0).reshape(-1, WORD)[: len(blocks)]
