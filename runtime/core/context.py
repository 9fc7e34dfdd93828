"""The environment of a protocol: which role it runs for, and the correlated randomness.

The same protocol code runs at the client, the server and the dealer. The computation that the
dealer needs for dealing is written right beside its use, as the function passed to `deal`; the
parties never call it. So the randomness cannot disagree with the program, and it is dealt in
program order.
"""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from typing import Protocol as Interface

import torch

from mergec.runtime.core.draw import Draw
from mergec.runtime.core.memory import mapped_words, returned_words
from mergec.runtime.core.messages import Message
from mergec.runtime.core.spec import CLIENT, DEALER, FRACTIONAL_BITS, SERVER
from mergec.runtime.core.values import Expanded
from mergec.runtime.correlations.dpf import SEED_WORDS, Correct, Generator, Keys
from mergec.runtime.correlations.prg import derive, new_seed, stream
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.kernels.long import added
from mergec.runtime.kernels.spread import Ranks, Spread, write_rows
from mergec.runtime.kernels.transfers import to_device, to_host

_LARGE_BYTES = 1 << 20
"""Size in words from which on a weight is one that may not fit into memory."""

_PIECE = 1 << 22
"""Elements of a weight that are given to the ranks at once."""


class ByteSink(Interface):
    """Where the dealer writes a party's corrections."""

    def write(self, data: torch.Tensor) -> None: ...


class ByteSource(Interface):
    """Where a party reads the dealer's corrections."""

    def read(self, nbytes: int) -> torch.Tensor: ...


def constant_seed_of(seed: bytes) -> bytes:
    """Seed of `Context.constant_words` in a session in which the client has this seed."""
    return derive(seed, "constants")


class Context(ABC):
    """One party's side of a session.

    fixed: number of fractional bits of the program. salt: the session's public salt, the same at
    all roles (`correlations.dpf`); empty in simulations.
    """

    party: int

    def __init__(
        self,
        device: str = "cpu",
        fixed: int = FRACTIONAL_BITS,
        *,
        salt: bytes = b"",
        exact: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.salt = salt
        self.fixed = fixed
        self.exact = exact
        """Whether roundings are independent of what the client sees (`protocols.opening`)."""
        self.offline_bytes = 0
        """Bytes of corrections so far: read, at a party; written to both parties, at the dealer."""
        self.draw = Draw()
        """How the token is chosen in this step when only the token is revealed."""
        self.constant_seed: bytes | None = None
        """Seed of `constant_words`; the server receives it from the client."""
        self.ranks: Ranks | None = None
        """The ranks that share this party's weights and caches; None if this process has them."""
        self._spent: dict[int, weakref.ref[torch.Tensor]] = {}
        self._static: set[str] = set()
        self._branches: dict[str, bytes] = {}
        """Seeds of the streams of branches, by the attribute that holds the stream."""
        self._branch = -1

    @contextmanager
    def branch(self, number: int) -> Iterator[None]:
        """Within, masks and shares come from streams of their own, which `number` names.

        They are the same at all roles whatever was drawn outside, so a step can be dealt before it
        is known whether it will run; if it does not, nobody reads these streams again. Raises
        RuntimeError unless the number is above all earlier ones: masks would be used twice.
        """
        if number <= self._branch:
            raise RuntimeError(f"the masks of branch {number} would be drawn a second time")
        self._branch = number
        before = {name: getattr(self, name) for name in self._branches}
        for name, seed in self._branches.items():
            setattr(self, name, stream(derive(seed, f"branch {number}"), self.device))
        try:
            yield
        finally:
            for name, own in before.items():
                setattr(self, name, own)

    @property
    def tensor_device(self) -> torch.device:
        """Where this party's shares are stored: a real device, or `meta` at the dealer."""
        return self.device

    @abstractmethod
    def mask(self, shape: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """A fresh uniform mask: additive shares at the parties, the mask itself at the dealer."""

    def long_mask(self, count: int, halves: int) -> torch.Tensor:
        """`mask` for words modulo 2**(32 halves), as 32-bit halves: int32 [count, halves]."""
        return self.mask((count, halves), torch.int32)

    @abstractmethod
    def client_mask(self, shape: Sequence[int]) -> torch.Tensor:
        """A fresh uniform mask known to the client and the dealer; a meta tensor at the server."""

    @abstractmethod
    def server_mask(self, shape: Sequence[int]) -> torch.Tensor:
        """A fresh uniform mask known to the server and the dealer; a meta tensor at the client."""

    def weight_mask(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """The static mask of a weight, known to the server and the dealer; meta at the client."""
        return next(self.weight_masks(name, [shape]))

    @abstractmethod
    def weight_masks(self, name: str, shapes: Iterable[Sequence[int]]) -> Iterator[torch.Tensor]:
        """The static mask of a weight in consecutive pieces, each generated when it is requested.

        Raises RuntimeError if the mask of `name` was requested before: a second constant under the
        same mask would reveal the difference of the two constants to the client.
        """

    def kept_weight_mask(
        self, name: str, shape: Sequence[int], pieces: Sequence[Sequence[int]]
    ) -> torch.Tensor | Expanded:
        """The static mask of a weight, for all of a session; expanded in these pieces, if at all.

        Raises RuntimeError as `weight_masks` does.
        """
        return self.weight_mask(name, shape)

    def weight_room(self, shape: Sequence[int]) -> torch.Tensor:
        """An uninitialized int64 tensor for a weight under its static mask."""
        room = self._spread_room(shape, torch.int64)
        return (
            torch.empty(tuple(shape), device=self.device, dtype=torch.int64)
            if room is None
            else room
        )

    def keep_weight(self, words: torch.Tensor, *, mapped: bool = False) -> torch.Tensor:
        """A weight, int32 or int64, where this party computes with it: on its device or ranks.

        mapped: let ranks keep a large one in files; see `Ranks.room`. A matrix that lies in a file
        of theirs stays there.
        """
        if self.ranks is not None and not words.is_meta and words.dim() == 2:
            there = self.ranks.mapped(words)
            if there is not None:
                return there
        room = None if words.is_meta else self._spread_room(words.shape, words.dtype, mapped)
        if room is None:
            return to_device(words, self.device, "input")
        start = 0
        for piece in words.split(max(1, _PIECE // max(1, words.shape[1]))):
            write_rows(room, start, to_device(piece, self.device, "input"))
            start += len(piece)
        return room

    def cache_room(self, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """An uninitialized tensor for a cache [B, G, L, D]: of `like`, or on this party's ranks,
        split by heads G. Without data where `like` has none."""
        if like.is_meta:
            return ghost(shape, dtype=like.dtype)
        if self.ranks is None or len(shape) != 4:
            # What it outgrows is returned: kept, it would be twice as much as the cache.
            return returned_words(shape, like)
        return self.ranks.room(shape, like.dtype, 1)

    def keep_cache(self, words: torch.Tensor) -> torch.Tensor:
        """A cache that does not grow, where this party computes with it."""
        room = self.cache_room(words.shape, words) if self.ranks is not None else words
        if isinstance(room, Spread):
            write_rows(room, 0, words)
        return room if isinstance(room, Spread) else words

    def _spread_room(
        self, shape: Sequence[int], dtype: torch.dtype, mapped: bool = False
    ) -> Spread | None:
        """Room for a weight on this party's ranks; None if this process keeps it.

        Matrices are spread, along their longer side: of operand and result, the one along the other
        side is sent N - 1 times. Other weights are small. mapped: as in `keep_weight`.
        """
        if self.ranks is None or len(shape) != 2:
            return None
        large = 8 * math.prod(shape) >= _LARGE_BYTES
        axis = 0 if shape[0] >= shape[1] else 1
        return self.ranks.room(shape, dtype, axis, mapped=mapped and large)

    def spend(self, mask: torch.Tensor) -> None:
        """Record that a value is opened under `mask`. Raises RuntimeError if one was before."""
        spent, key = self._spent, id(mask)
        if key in spent:
            raise RuntimeError("a second value would be opened under the same mask")
        # The record must go with the mask, because its address may be reused.
        spent[key] = weakref.ref(mask, lambda _: spent.pop(key))

    def cover(self, parts: Iterable[torch.Tensor]) -> None:  # noqa: B027
        """Note that what is sent next are parts of a value opened under a spent mask.

        Only a context that watches (`engine.audit`) keeps it.
        """

    def _spend_name(self, name: str) -> None:
        if name in self._static:
            raise RuntimeError(f"a second constant would be opened under the mask of {name}")
        self._static.add(name)

    def constant_words(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """Uniform words for the constant of this name, which all three roles know.

        Raises RuntimeError at the server if the client has not sent the seed.
        """
        if self.constant_seed is None:
            raise RuntimeError("the client has not sent the seed of shared constants")
        prg = stream(derive(self.constant_seed, name), self.device)
        return prg.tensor(shape, torch.int64)

    def private_words(self, shape: Sequence[int]) -> torch.Tensor:
        """Fresh uniform words that only the dealer knows. Raises RuntimeError at the parties."""
        raise RuntimeError("only the dealer has private words")

    def server_words(self, shape: Sequence[int]) -> torch.Tensor:
        """Fresh uniform words that only the server knows, not the dealer either.

        Raises RuntimeError at the other roles.
        """
        raise RuntimeError("only the server has words of its own")

    @abstractmethod
    def deal(
        self,
        shape: Sequence[int],
        secret: Callable[[], torch.Tensor],
        dtype: torch.dtype = torch.int64,
    ) -> torch.Tensor:
        """Additive shares, in the ring of `dtype`, of what `secret` returns; meta at the dealer.

        uint8 stands for eight bits, not a number: its shares are XOR shares (`deal_bits`). Only the
        dealer calls `secret`. Offline bytes: the size of the result, sent to the server; the client
        expands its share from its seed.
        """

    @abstractmethod
    def deal_corrected(
        self, shape: Sequence[int], correct: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor | None:
        """A table of bytes, uint8 of this shape, in shares of any kind; None at the dealer.

        The client's share is the next bytes of its stream. correct: called by the dealer with that
        share, which it may change in place; returns the server's. For each secret it has to be a
        bijection of the client's share, so that the server's is as uniform as the client's. Offline
        bytes: the size of the table, sent to the server.
        """

    @abstractmethod
    def deal_keys(self, count: int, words: int, correct: Correct) -> Keys | None:
        """Keys of `count` point functions (`correlations.dpf`); None at the dealer.

        correct: called by the dealer with the roots of client and server, [count, 2] each; returns
        the corrections, uint64 [count, words]. Both parties receive the corrections (offline bytes:
        twice their size) and expand their own roots from their seeds.
        """

    def point_functions(self, blocks: int) -> Generator:
        """The generator of this session's point functions, with `blocks` blocks per leaf."""
        return Generator(blocks, self.salt)

    def deal_bits(self, shape: Sequence[int], secret: Callable[[], torch.Tensor]) -> torch.Tensor:
        """XOR shares of the uint8 tensor that `secret` returns; meta at the dealer."""
        return self.deal(shape, secret, torch.uint8)

    def mask_bits(self, shape: Sequence[int]) -> torch.Tensor:
        """A fresh uniform uint8 mask: XOR shares at the parties, the mask itself at the dealer."""
        return self.mask(shape, torch.uint8)

    def public(self, value: torch.Tensor) -> torch.Tensor:
        """This party's additive share of a public value: the value at the client, else zero."""
        return value if self.party != SERVER else torch.zeros_like(value)


class _PartyContext(Context):
    """A party expands its own words from one seed, and reads corrections from the dealer."""

    def __init__(
        self,
        seed: bytes,
        corrections: ByteSource,
        device: str = "cpu",
        fixed: int = FRACTIONAL_BITS,
        *,
        salt: bytes = b"",
        exact: bool = False,
    ) -> None:
        super().__init__(device, fixed, salt=salt, exact=exact)
        self._prg = stream(derive(seed, "shares"), self.device)
        self._branches = {"_prg": derive(seed, "branches")}
        self._corrections = corrections

    def mask(self, shape: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return self._prg.tensor(shape, dtype)

    def deal_keys(self, count: int, words: int, correct: Correct) -> Keys:
        roots = self._prg.tensor((count, SEED_WORDS), torch.int64)
        return Keys(roots, self._read((count, words), torch.int64))

    def _read(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        self.offline_bytes += size
        words = self._corrections.read(size).view(dtype).reshape(tuple(shape))
        return to_device(words, self.device, "dealt")


class ClientContext(_PartyContext):
    """The client expands every share of its own from its seed."""

    party = CLIENT

    def __init__(
        self,
        seed: bytes,
        corrections: ByteSource,
        device: str = "cpu",
        fixed: int = FRACTIONAL_BITS,
        *,
        salt: bytes = b"",
        exact: bool = False,
        constant_seed: bytes | None = None,
    ) -> None:
        """constant_seed: seed of `constant_words`; default: `constant_seed_of(seed)`."""
        super().__init__(seed, corrections, device, fixed, salt=salt, exact=exact)
        self.constant_seed = constant_seed or constant_seed_of(seed)

    def client_mask(self, shape: Sequence[int]) -> torch.Tensor:
        return self.mask(shape)

    def server_mask(self, shape: Sequence[int]) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=torch.int64, device="meta")

    def weight_masks(self, name: str, shapes: Iterable[Sequence[int]]) -> Iterator[torch.Tensor]:
        return (torch.empty(tuple(shape), dtype=torch.int64, device="meta") for shape in shapes)

    def weight_room(self, shape: Sequence[int]) -> torch.Tensor:
        """For W - B, which is uniform and tells the client nothing of W. On a CPU it lies in a
        file, so that a server's weights may exceed the client's memory."""
        large = 8 * math.prod(shape) >= _LARGE_BYTES
        spread = self._spread_room(shape, torch.int64, mapped=True)
        if spread is not None:
            return spread
        return (
            mapped_words(shape)
            if large and self.device.type == "cpu"
            else super().weight_room(shape)
        )

    def deal(
        self,
        shape: Sequence[int],
        secret: Callable[[], torch.Tensor],
        dtype: torch.dtype = torch.int64,
    ) -> torch.Tensor:
        return self.mask(shape, dtype)

    def deal_corrected(
        self, shape: Sequence[int], correct: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        return self._prg.tensor(shape, torch.uint8)


class ServerContext(_PartyContext):
    """The server expands masks from its seed; its shares of dealt values are corrections."""

    party = SERVER

    def __init__(
        self,
        seed: bytes,
        corrections: ByteSource,
        device: str = "cpu",
        fixed: int = FRACTIONAL_BITS,
        weight_seed: bytes | None = None,
        own_seed: bytes | None = None,
        *,
        salt: bytes = b"",
        exact: bool = False,
    ) -> None:
        """weight_seed: seed of the static masks of weights; default: `seed`.

        own_seed: seed of `server_words`; default: a fresh one. The dealer, which knows `seed`, must
        not know it.
        """
        super().__init__(seed, corrections, device, fixed, salt=salt, exact=exact)
        self._weight_seed = weight_seed or seed
        self._own = stream(own_seed or new_seed(), self.device)

    def client_mask(self, shape: Sequence[int]) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=torch.int64, device="meta")

    def server_mask(self, shape: Sequence[int]) -> torch.Tensor:
        return self.mask(shape)

    def server_words(self, shape: Sequence[int]) -> torch.Tensor:
        return self._own.tensor(shape, torch.int64)

    def weight_masks(self, name: str, shapes: Iterable[Sequence[int]]) -> Iterator[torch.Tensor]:
        self._spend_name(name)
        prg = stream(derive(self._weight_seed, f"weight {name}"), self.device)
        return (prg.tensor(shape, torch.int64) for shape in shapes)

    def deal(
        self,
        shape: Sequence[int],
        secret: Callable[[], torch.Tensor],
        dtype: torch.dtype = torch.int64,
    ) -> torch.Tensor:
        return self._read(shape, dtype)

    def deal_corrected(
        self, shape: Sequence[int], correct: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        return self._read(shape, torch.uint8)


class DealerContext(Context):
    """The dealer knows both seeds, and writes what the parties cannot derive from their own."""

    party = DEALER

    def __init__(
        self,
        client_seed: bytes,
        server_seed: bytes,
        to_client: ByteSink,
        to_server: ByteSink,
        device: str = "cpu",
        fixed: int = FRACTIONAL_BITS,
        own_seed: bytes | None = None,
        weight_seed: bytes | None = None,
        *,
        salt: bytes = b"",
        exact: bool = False,
        expand: bool = False,
    ) -> None:
        """own_seed: seed of `private_words`; default: a fresh one.

        weight_seed: seed of the static masks of weights; default: the server's seed. expand: keep
        no static masks of large weights, but expand them at each product; the words are the same.
        """
        super().__init__(device, fixed, salt=salt, exact=exact)
        self._expand = expand
        self._own = stream(own_seed or new_seed(), self.device)
        self._weight_seed = weight_seed or server_seed
        self.constant_seed = constant_seed_of(client_seed)
        self._client = stream(derive(client_seed, "shares"), self.device)
        self._server = stream(derive(server_seed, "shares"), self.device)
        seeds = {"_client": client_seed, "_server": server_seed}
        self._branches = {name: derive(seed, "branches") for name, seed in seeds.items()}
        self._to_client, self._to_server = to_client, to_server

    @property
    def tensor_device(self) -> torch.device:
        return torch.device("meta")

    def private_words(self, shape: Sequence[int]) -> torch.Tensor:
        return self._own.tensor(shape, torch.int64)

    def mask(self, shape: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        client = self._client.tensor(shape, dtype)
        server = self._server.tensor(shape, dtype)
        return client.bitwise_xor_(server) if dtype is torch.uint8 else client.add_(server)

    def long_mask(self, count: int, halves: int) -> torch.Tensor:
        parts = (prg.tensor((count, halves), torch.int32) for prg in (self._client, self._server))
        return added(*parts)

    def client_mask(self, shape: Sequence[int]) -> torch.Tensor:
        return self._client.tensor(shape, torch.int64)

    def server_mask(self, shape: Sequence[int]) -> torch.Tensor:
        return self._server.tensor(shape, torch.int64)

    def weight_masks(self, name: str, shapes: Iterable[Sequence[int]]) -> Iterator[torch.Tensor]:
        self._spend_name(name)
        return self._weight_words(name, shapes)

    def _weight_words(self, name: str, shapes: Iterable[Sequence[int]]) -> Iterator[torch.Tensor]:
        prg = stream(derive(self._weight_seed, f"weight {name}"), self.device)
        return (prg.tensor(shape, torch.int64) for shape in shapes)

    def kept_weight_mask(
        self, name: str, shape: Sequence[int], pieces: Sequence[Sequence[int]]
    ) -> torch.Tensor | Expanded:
        if not self._expand or 8 * math.prod(shape) < _LARGE_BYTES:
            room = self._spread_room(shape, torch.int64)
            if room is None:
                return self.weight_mask(name, shape)
            start = 0
            for piece in self.weight_masks(name, pieces):
                write_rows(room, start, piece)
                start += len(piece)
            return room
        self._spend_name(name)
        return Expanded(torch.Size(shape), lambda: self._weight_words(name, pieces))

    def deal(
        self,
        shape: Sequence[int],
        secret: Callable[[], torch.Tensor],
        dtype: torch.dtype = torch.int64,
    ) -> torch.Tensor:
        share = self._client.tensor((math.prod(shape),), dtype)
        value = secret().reshape(-1)
        value = value if value.dtype is dtype else value.to(dtype)
        combine = torch.bitwise_xor if dtype is torch.uint8 else torch.sub
        self._write(combine(value, share, out=share), self._to_server)
        return ghost(shape, dtype=dtype)

    def deal_corrected(
        self, shape: Sequence[int], correct: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self._write(correct(self._client.tensor(shape, torch.uint8)), self._to_server)

    def deal_keys(self, count: int, words: int, correct: Correct) -> None:
        client, server = (
            prg.tensor((count, SEED_WORDS), torch.int64) for prg in (self._client, self._server)
        )
        corrections = correct((client, server))
        if corrections.shape != (count, words):
            raise ValueError(f"keys have {words} words, not {corrections.shape[1:]}")
        self._write(corrections, self._to_client, self._to_server)

    def _write(self, words: torch.Tensor, *sinks: ByteSink) -> None:
        data = to_host(words.reshape(-1).view(torch.uint8), "dealt")
        for sink in sinks:
            self.offline_bytes += data.nbytes
            sink.write(data)


class ShapeContext(Context):
    """No role's side: for running a program on shapes alone. It has no randomness.

    dealt: bytes that a dealer would have sent so far, by role.
    """

    party = DEALER

    def __init__(self, **arithmetic: Any) -> None:
        """arithmetic: `fixed` and `exact`, as in `Context`."""
        super().__init__(**arithmetic)
        self.dealt = {"client": 0, "server": 0}

    @property
    def tensor_device(self) -> torch.device:
        return torch.device("meta")

    def mask(self, shape: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device="meta")

    def client_mask(self, shape: Sequence[int]) -> torch.Tensor:
        return self.mask(shape)

    def server_mask(self, shape: Sequence[int]) -> torch.Tensor:
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
        words = ghost(shape, dtype=dtype)
        self.dealt["server"] += words.nbytes
        return words

    def deal_corrected(
        self, shape: Sequence[int], correct: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self.dealt["server"] += math.prod(shape)

    def deal_keys(self, count: int, words: int, correct: Correct) -> None:
        for role in self.dealt:
            self.dealt[role] += 8 * count * words

    def sent(self, messages: Sequence[Message]) -> None:
        """Called with the messages of each round of a protocol."""
