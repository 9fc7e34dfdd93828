"""What a protocol sees of its surroundings: who it runs for, and the correlated randomness.

The same protocol code runs at the client, the server and the dealer. What the dealer must know to
deal stands right beside its use, as the function that is passed to `deal`; the parties never call
it. So the randomness can't disagree with the program, and its order is the program's own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol as Interface

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary

from runtime.correlations.prg import Prg, derive, new_seed
from runtime.sampling import Draw
from runtime.spec import CLIENT, DEALER, FRACTIONAL_BITS, SERVER

_ITEM_BYTES = {torch.int64: 8, torch.int32: 4, torch.int16: 2, torch.int8: 1, torch.uint8: 1}


INDICATOR_WORDS = 4
"""Words of an indicator row: one, and the first three powers of the low part of the mask."""


def _spread(index: torch.Tensor, payload: torch.Tensor, windows: int) -> torch.Tensor:
    rows = torch.zeros((*payload.shape, windows), dtype=torch.int64, device=payload.device)
    rows.scatter_(2, index[:, None, None].expand(*payload.shape, 1), payload[:, :, None])
    return rows


class ByteSink(Interface):
    """Where the dealer writes corrections for the server."""

    def write(self, data: torch.Tensor) -> None: ...


class ByteSource(Interface):
    """Where the server reads corrections from the dealer."""

    def read(self, nbytes: int) -> torch.Tensor: ...


class Context(ABC):
    """One party's side of a session. `fixed` is the number of fractional bits of the program."""

    party: int

    def __init__(self, device: str = "cpu", fixed: int = FRACTIONAL_BITS) -> None:
        self.device = torch.device(device)
        self.fixed = fixed
        self.offline_bytes = 0
        """Bytes of corrections so far: read at the server, written at the dealer."""
        self.draw = Draw()
        """How a token that is revealed alone is chosen in this step."""
        self.constant_seed: bytes | None = None
        """Seed of `constant_words`; the server has it from the client."""
        self._spent = WeakIdKeyDictionary()
        self._static: set[str] = set()

    @property
    def tensor_device(self) -> torch.device:
        """Where this party's shares are: a real device, or `meta` at the dealer."""
        return self.device

    @abstractmethod
    def mask(self, shape: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """A fresh uniform mask: additive shares at the parties, the mask itself at the dealer."""

    @abstractmethod
    def client_mask(self, shape: Sequence[int]) -> torch.Tensor:
        """A fresh uniform mask that the client and the dealer know; a meta tensor at the server."""

    def weight_mask(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """The static mask of a weight, known to the server and the dealer; meta at the client."""
        return next(self.weight_masks(name, [shape]))

    @abstractmethod
    def weight_masks(self, name: str, shapes: Iterable[Sequence[int]]) -> Iterator[torch.Tensor]:
        """The same in consecutive pieces, each made when it is asked for.

        RuntimeError if it was asked for before: a second constant under the same mask would tell
        the client the difference of the two.
        """

    def spend(self, mask: torch.Tensor) -> None:
        """Note that a value is opened under `mask`; RuntimeError if one was before."""
        if mask in self._spent:
            raise RuntimeError("a second value would be opened under the same mask")
        self._spent[mask] = True

    def _spend_name(self, name: str) -> None:
        if name in self._static:
            raise RuntimeError(f"a second constant would be opened under the mask of {name}")
        self._static.add(name)

    def constant_words(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """Uniform words for the constant of this name, which all three roles know."""
        if self.constant_seed is None:
            raise RuntimeError("the client has not told the seed of shared constants")
        prg = Prg(derive(self.constant_seed, name))
        return self._words(prg, shape, torch.int64).to(self.device)

    def private_words(self, shape: Sequence[int]) -> torch.Tensor:
        """Fresh uniform words that the dealer alone knows."""
        raise RuntimeError("only the dealer has words of its own")

    @abstractmethod
    def deal(
        self,
        shape: Sequence[int],
        secret: Callable[[], torch.Tensor],
        dtype: torch.dtype = torch.int64,
    ) -> torch.Tensor:
        """Additive shares, in the ring of `dtype`, of what `secret` returns; meta at the dealer.

        uint8 is no number here but eight bits: its shares are XOR shares (`deal_bits`).
        """

    def deal_indicator(
        self,
        count: int,
        windows: int,
        secret: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """Shares modulo 2**64 of rows that are zero but in one window: [count, words, windows].

        `secret` returns the windows [count] and what stands there [count, words].
        """
        return self.deal((count, INDICATOR_WORDS, windows), lambda: _spread(*secret(), windows))

    @abstractmethod
    def deal_bits(self, shape: Sequence[int], secret: Callable[[], torch.Tensor]) -> torch.Tensor:
        """XOR shares of the uint8 tensor that `secret` returns; meta at the dealer."""

    @abstractmethod
    def mask_bits(self, shape: Sequence[int]) -> torch.Tensor:
        """A fresh uniform uint8 mask: XOR shares at the parties, the mask itself at the dealer."""

    def public(self, value: torch.Tensor) -> torch.Tensor:
        """This party's additive share of a public value: all of it at the client."""
        return value if self.party != SERVER else torch.zeros_like(value)

    def _words(self, prg: Prg, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        count = math.prod(shape)
        raw = prg.read(count * _ITEM_BYTES[dtype])
        return torch.from_numpy(raw).view(dtype).reshape(tuple(shape))


class ClientContext(Context):
    """The client reads every share of its own from one seed; nothing is sent to it."""

    party = CLIENT

    def __init__(self, seed: bytes, device: str = "cpu", fixed: int = FRACTIONAL_BITS) -> None:
        super().__init__(device, fixed)
        self._prg = Prg(derive(seed, "shares"))
        self.constant_seed = derive(seed, "constants")

    def mask(self, shape: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return self._words(self._prg, shape, dtype).to(self.device)

    def client_mask(self, shape: Sequence[int]) -> torch.Tensor:
        return self.mask(shape)

    def weight_masks(self, name: str, shapes: Iterable[Sequence[int]]) -> Iterator[torch.Tensor]:
        return (torch.empty(tuple(shape), dtype=torch.int64, device="meta") for shape in shapes)

    def deal(
        self,
        shape: Sequence[int],
        secret: Callable[[], torch.Tensor],
        dtype: torch.dtype = torch.int64,
    ) -> torch.Tensor:
        return self.mask(shape, dtype)

    def deal_bits(self, shape: Sequence[int], secret: Callable[[], torch.Tensor]) -> torch.Tensor:
        return self.mask(shape, torch.uint8)

    def mask_bits(self, shape: Sequence[int]) -> torch.Tensor:
        return self.mask(shape, torch.uint8)


class ServerContext(Context):
    """The server reads masks from its seed and corrections from the dealer's stream."""

    party = SERVER

    def __init__(
        self,
        seed: bytes,
        corrections: ByteSource,
        device: str = "cpu",
        fixed: int = FRACTIONAL_BITS,
        weight_seed: bytes | None = None,
    ) -> None:
        """weight_seed: of the static masks of weights; by default `seed`."""
        super().__init__(device, fixed)
        self._weight_seed = weight_seed or seed
        self._prg = Prg(derive(seed, "shares"))
        self._corrections = corrections

    def mask(self, shape: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return self._words(self._prg, shape, dtype).to(self.device)

    def client_mask(self, shape: Sequence[int]) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=torch.int64, device="meta")

    def weight_masks(self, name: str, shapes: Iterable[Sequence[int]]) -> Iterator[torch.Tensor]:
        self._spend_name(name)
        prg = Prg(derive(self._weight_seed, f"weight {name}"))
        return (self._words(prg, shape, torch.int64).to(self.device) for shape in shapes)

    def deal(
        self,
        shape: Sequence[int],
        secret: Callable[[], torch.Tensor],
        dtype: torch.dtype = torch.int64,
    ) -> torch.Tensor:
        size = math.prod(shape) * _ITEM_BYTES[dtype]
        self.offline_bytes += size
        raw = self._corrections.read(size)
        return raw.view(dtype).reshape(tuple(shape)).to(self.device)

    def deal_bits(self, shape: Sequence[int], secret: Callable[[], torch.Tensor]) -> torch.Tensor:
        return self.deal(shape, secret, torch.uint8)

    def mask_bits(self, shape: Sequence[int]) -> torch.Tensor:
        return self.mask(shape, torch.uint8)


class DealerContext(Context):
    """The dealer knows both seeds, and writes what the server can't derive from its own."""

    party = DEALER

    def __init__(
        self,
        client_seed: bytes,
        server_seed: bytes,
        corrections: ByteSink,
        device: str = "cpu",
        fixed: int = FRACTIONAL_BITS,
        own_seed: bytes | None = None,
        weight_seed: bytes | None = None,
    ) -> None:
        """own_seed: of `private_words`; a fresh one by default.

        weight_seed: of the static masks of weights; by default the server's seed.
        """
        super().__init__(device, fixed)
        self._own = Prg(own_seed or new_seed())
        self._weight_seed = weight_seed or server_seed
        self.constant_seed = derive(client_seed, "constants")
        self._client = Prg(derive(client_seed, "shares"))
        self._server = Prg(derive(server_seed, "shares"))
        self._corrections = corrections

    @property
    def tensor_device(self) -> torch.device:
        return torch.device("meta")

    def private_words(self, shape: Sequence[int]) -> torch.Tensor:
        return self._words(self._own, shape, torch.int64).to(self.device)

    def mask(self, shape: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        client = self._words(self._client, shape, dtype)
        server = self._words(self._server, shape, dtype)
        return (client ^ server if dtype is torch.uint8 else client + server).to(self.device)

    def client_mask(self, shape: Sequence[int]) -> torch.Tensor:
        return self._words(self._client, shape, torch.int64).to(self.device)

    def weight_masks(self, name: str, shapes: Iterable[Sequence[int]]) -> Iterator[torch.Tensor]:
        self._spend_name(name)
        prg = Prg(derive(self._weight_seed, f"weight {name}"))
        return (self._words(prg, shape, torch.int64).to(self.device) for shape in shapes)

    def deal(
        self,
        shape: Sequence[int],
        secret: Callable[[], torch.Tensor],
        dtype: torch.dtype = torch.int64,
    ) -> torch.Tensor:
        share = self._words(self._client, shape, dtype).numpy().reshape(-1)
        value = secret().to("cpu", dtype).contiguous().numpy().reshape(-1)
        combine = np.bitwise_xor if dtype is torch.uint8 else np.subtract
        correction = combine(value, share, out=share)
        self.offline_bytes += correction.nbytes
        self._corrections.write(torch.from_numpy(correction.view(np.uint8)))
        return torch.empty(tuple(shape), dtype=dtype, device="meta")

    def deal_bits(self, shape: Sequence[int], secret: Callable[[], torch.Tensor]) -> torch.Tensor:
        return self.deal(shape, secret, torch.uint8)

    def mask_bits(self, shape: Sequence[int]) -> torch.Tensor:
        return self.mask(shape, torch.uint8)


class ShapeContext(Context):
    """Nobody's side: for walking a program on shapes alone. It has no randomness."""

    party = DEALER

    @property
    def tensor_device(self) -> torch.device:
        return torch.device("meta")

    def mask(self, shape: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device="meta")

    def client_mask(self, shape: Sequence[int]) -> torch.Tensor:
        return self.mask(shape)

    def weight_masks(self, name: str, shapes: Iterable[Sequence[int]]) -> Iterator[torch.Tensor]:
        return map(self.mask, shapes)

    def constant_words(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        return self.mask(shape)

    def deal(
        self,
        shape: Sequence[int],
        secret: Callable[[], torch.Tensor],
        dtype: torch.dtype = torch.int64,
    ) -> torch.Tensor:
        return self.mask(shape, dtype)

    def deal_bits(self, shape: Sequence[int], secret: Callable[[], torch.Tensor]) -> torch.Tensor:
        return self.mask(shape, torch.uint8)

    def mask_bits(self, shape: Sequence[int]) -> torch.Tensor:
        return self.mask(shape, torch.uint8)
