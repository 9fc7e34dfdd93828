"""Polynomials of secret bits, evaluated on one opening of the bits under mask bits.

The parties hold XOR shares of up to eight bits b_i. They open c_i = b_i xor rho_i with fresh mask
bits rho_i. As b_i = c_i + (1 - 2 c_i) rho_i, a multilinear polynomial of the bits is also a
polynomial of the mask bits, whose coefficients depend only on the opened bits. The dealer shares
the products of mask bits that occur, as words, and each product times any further word that it
knows. The polynomial's value, and the value times masked numbers, are then public linear
combinations of dealt words. One round, and the result is an arithmetic share.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch

from mergec.runtime.core.context import Context
from mergec.runtime.core.messages import Protocol, Swap
from mergec.runtime.kernels.backends import Kernel
from mergec.runtime.kernels.compiled import compiled
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.kernels.transfers import to_device

Polynomial = dict[frozenset[int], int]
"""Coefficient of each product of bits; the empty product is the constant term."""

_BITS = 8


class Formula:
    """Turns opened bits and dealt words into shares of a polynomial's value.

    words: number of words dealt per evaluation and per number that the value is multiplied by.
    """

    def __init__(self, polynomial: Polynomial) -> None:
        self.polynomial = polynomial
        monomials: set[frozenset[int]] = {s for term in polynomial for s in _subsets(term)} | {
            frozenset()
        }
        ordered = sorted(monomials, key=lambda s: (len(s), sorted(s)))
        column = {monomial: index for index, monomial in enumerate(ordered)}
        self.words = len(ordered)
        self.coefficients = np.zeros((2**_BITS, self.words), np.int64)
        self.products = np.zeros((2**_BITS, self.words), np.uint8)
        for byte in range(2**_BITS):
            bit = [(byte >> i) & 1 for i in range(_BITS)]
            for term, factor in polynomial.items():
                for chosen in _subsets(term):
                    weight = factor
                    for i in term:
                        weight *= (1 - 2 * bit[i]) if i in chosen else bit[i]
                    self.coefficients[byte, column[chosen]] += weight
            for monomial, index in column.items():
                self.products[byte, index] = all(bit[i] for i in monomial)

    def deal(
        self,
        ctx: Context,
        mask: torch.Tensor,
        payload: Callable[[], torch.Tensor] | None = None,
        payloads: int = 1,
        dtype: torch.dtype = torch.int64,
    ) -> torch.Tensor:
        """Shares of the payload times each product of mask bits: [*mask, payloads, words].

        mask: uint8 [...], from `Context.mask_bits`. payload: called by the dealer only; returns
        [..., payloads], broadcast against the mask. Without it the payload is one.
        """

        def secret() -> torch.Tensor:
            factors = torch.ones((1,) * (mask.dim() + 1), dtype=torch.int64, device=mask.device)
            if payload is not None:
                factors = payload().long()
            factors = factors.expand(*mask.shape, payloads).reshape(mask.numel(), payloads)
            words: torch.Tensor = _PRODUCTS(mask, factors, self, dtype)
            return words

        return ctx.deal((*mask.shape, payloads, self.words), secret, dtype)

    def evaluate(self, bits: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Shares of the value times each payload, [..., payloads], from the opened bits [...]."""
        if bits.is_meta:
            return ghost(words.shape[:-1], dtype=words.dtype)
        value: torch.Tensor = _EVALUATED(bits, words, self)
        return value

    def rows(self, device: torch.device) -> torch.Tensor:
        """`coefficients` on a device."""
        return _rows(self, device)[0]

    def masked_rows(self, device: torch.device) -> torch.Tensor:
        """`products` on a device, as int64."""
        return _rows(self, device)[1]


@lru_cache(256)
def _rows(formula: Formula, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    tables = formula.coefficients, formula.products.astype(np.int64)
    rows, products = (to_device(torch.from_numpy(each), device, "public") for each in tables)
    return rows, products


def _products_host(
    mask: torch.Tensor, factors: torch.Tensor, formula: Formula, dtype: torch.dtype
) -> torch.Tensor:
    out = torch.empty((*factors.shape, formula.words), dtype=dtype)
    _multiply_products(
        mask.numpy().reshape(-1), formula.products, factors.contiguous().numpy(), out.numpy()
    )
    return out


def _products_tensors(
    mask: torch.Tensor, factors: torch.Tensor, formula: Formula, dtype: torch.dtype
) -> torch.Tensor:
    rows = formula.masked_rows(mask.device)[mask.reshape(-1).long()]
    return (factors[..., None] * rows[:, None]).to(dtype)


def _evaluated_host(bits: torch.Tensor, words: torch.Tensor, formula: Formula) -> torch.Tensor:
    out = torch.empty(words.shape[:-1], dtype=words.dtype)
    _evaluate_cpu(
        bits.numpy().reshape(-1),
        words.numpy().reshape(bits.numel(), words.shape[-2], formula.words),
        formula.coefficients,
        out.numpy().reshape(bits.numel(), words.shape[-2]),
    )
    return out


def _evaluated_tensors(bits: torch.Tensor, words: torch.Tensor, formula: Formula) -> torch.Tensor:
    rows = formula.rows(bits.device)[bits.long()]
    return (rows[..., None, :].to(words.dtype) * words).sum(-1, dtype=words.dtype)


_PRODUCTS = Kernel("formula.products", _products_host, _products_tensors, triton=False)
_EVALUATED = Kernel("elements.evaluated", _evaluated_host, _evaluated_tensors)


def open_bits(ctx: Context, mine: torch.Tensor, mask: torch.Tensor) -> Protocol:
    """Open XOR shares of bits, uint8 with eight bits each, under this party's share of their mask.

    Rounds 1, online 2 bytes per element. Each party sees the bits under mask bits that are fresh
    and uniform. Raises RuntimeError if the mask was used before.
    """
    ctx.spend(mask)
    if mine.is_meta:
        yield Swap(mine)
        return mine
    masked = mine ^ mask
    other = yield Swap(masked)
    return masked ^ other


def negated(polynomial: Polynomial) -> Polynomial:
    """1 minus a polynomial."""
    return added({frozenset(): 1}, polynomial, -1)


def added(one: Polynomial, other: Polynomial, factor: int = 1) -> Polynomial:
    """The sum of one polynomial and a multiple of another."""
    terms = {t: one.get(t, 0) + factor * other.get(t, 0) for t in [*one, *other]}
    return {term: value for term, value in terms.items() if value}


def shifted(polynomial: Polynomial, places: int) -> Polynomial:
    """The same polynomial of the bits `places` positions higher."""
    return {frozenset(i + places for i in term): f for term, f in polynomial.items()}


def conjunction(bits: Sequence[int]) -> Polynomial:
    """The product of the bits: 1 if all are set."""
    return {frozenset(bits): 1}


def _subsets(items: frozenset[int]) -> list[frozenset[int]]:
    ordered = sorted(items)
    return [
        frozenset(c)
        for size in range(len(ordered) + 1)
        for c in itertools.combinations(ordered, size)
    ]


@compiled()
def _multiply_products(bits, products, factors, out):  # type: ignore[no-untyped-def]
    for i in range(bits.shape[0]):
        row = products[bits[i]]
        for p in range(factors.shape[1]):
            factor, target = factors[i, p], out[i, p]
            for j in range(products.shape[1]):
                target[j] = factor * row[j]


@compiled()
def _evaluate_cpu(bits, words, coefficients, out):  # type: ignore[no-untyped-def]
    for i in range(bits.shape[0]):
        row = bits[i]
        for p in range(words.shape[1]):
            total = np.int64(0)
            for j in range(words.shape[2]):
                total += coefficients[row, j] * np.int64(words[i, p, j])
            out[i, p] = total
