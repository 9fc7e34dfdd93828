"""What a client knows of the roundings of a query, and what its logits tell it with that.

A truncation rounds up or down by a coin. The client knows the odds of each coin: the low bits of a
value that is opened to it, or of its own share where both parties drop bits locally. A semi-honest
client that asks one prompt again and again, and regresses the logits on these bits, estimates by
how much an error of one unit on that wire moves each logit. For the wire before the last layer,
that is the last layer.

`record` collects what the client sees; `Evidence` is the regression. The program that uses both is
rounding_attack.py.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from mergec.runtime.core.messages import ToClient, ToServer, as_tuple
from mergec.runtime.core.spec import CLIENT, SERVER
from mergec.runtime.core.values import Wide
from mergec.runtime.engine import executor
from mergec.runtime.engine.functions import Call
from mergec.runtime.protocols import compare, wide
from mergec.runtime.roles.inprocess import InProcessSession

OPENED, DROPPED, SENT, RECEIVED = "opened", "dropped", "sent", "received"
"""Kinds of words: opened to both parties; the client's own share, of which bits are dropped; what
the client alone sends; and what the server alone sends."""

_LARGEST_SHIFT = {64: 62, 32: 30, 16: 14}
_SEARCHED = 4000
"""Queries used to find which low bits are coins."""


@dataclass(frozen=True)
class Group:
    """The words of one message or of one local shift of an instruction, a slice of each query's.

    bits: width of a word. shift: number of low bits that are dropped, or 0 if it is to be found.
    """

    instruction: str
    kind: str
    bits: int
    shift: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def shifts(self) -> Sequence[int]:
        return (self.shift,) if self.shift else range(2, _LARGEST_SHIFT[self.bits] + 1)


@dataclass(frozen=True)
class Recording:
    """Queries of one prompt.

    groups: what the client sees in each. words: uint64 [queries, words], as it sees them. logits:
    int64 [queries, V], the sum of both shares before anything is revealed, with `frac` fractional
    bits. No party has it: from it the real op reveals the logits in whatever setting.
    """

    groups: tuple[Group, ...]
    words: np.ndarray
    logits: np.ndarray
    frac: int

    def first(self, queries: int) -> Recording:
        return replace(self, words=self.words[:queries], logits=self.logits[:queries])

    def shuffled(self, order: np.ndarray) -> Recording:
        """With the words of other queries: a control, in which there is nothing to find."""
        return replace(self, words=self.words[order])

    def save(self, path: Path) -> None:
        groups = json.dumps([asdict(group) for group in self.groups])
        with path.open("wb") as file:
            np.savez(file, words=self.words, logits=self.logits, frac=self.frac, groups=groups)

    @classmethod
    def load(cls, path: Path) -> Recording:
        with np.load(path) as data:
            groups = tuple(Group(**group) for group in json.loads(str(data["groups"])))
            return cls(groups, data["words"], data["logits"], int(data["frac"]))


_DROPPING = {
    "take_window": compare.take_window,
    "narrow": wide.narrow,
    "narrow_of_zeros": wide.narrow_of_zeros,
}
"""What drops low bits of a share, the last argument but one, by the last."""


class _Tap:
    """Sees what a session computes: the client's messages and shares, and the hidden logits."""

    def __init__(self) -> None:
        self._place = threading.local()
        self.clear()

    def clear(self) -> None:
        self.seen: list[tuple[str, str, int, torch.Tensor]] = []
        self.logits: dict[int, Any] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Watch every instruction that needs a protocol, and every local shift in one."""
        watched = patch.object(executor, "evaluate", self._watched(executor.evaluate))
        with ExitStack() as patches:
            patches.enter_context(watched)
            for module in [m for name, m in sys.modules.items() if name.startswith("mergec.")]:
                for name, original in _DROPPING.items():
                    if getattr(module, name, None) is original:
                        dropping = patch.object(module, name, self._dropping(original))
                        patches.enter_context(dropping)
            yield

    def _dropping(self, original: Any) -> Any:
        def dropping(*arguments: Any) -> Any:
            share, drop = arguments[-2:]
            name = getattr(self._place, "name", None)
            words = share.low if isinstance(share, Wide) else share
            if name is not None and drop and not words.is_meta:
                self.seen.append((name, DROPPED, drop, words))
            return original(*arguments)

        return dropping

    def _watched(self, evaluate: Any) -> Any:
        def watched(context: Any, planned: Any, operands: Any, weights: Any) -> Any:
            result = evaluate(context, planned, operands, weights)
            if not isinstance(result, Call):
                return result
            if result.op.name == "reveal":
                self.logits[context.party] = result.bound["x"]
            elif context.party == CLIENT:
                # A stand-in for the op, with the one attribute that the executor uses.
                result.op = _Watched(result.op, planned.name, self)  # type: ignore[assignment]
            return result

        return watched

    def protocol(self, op: Any, name: str, ctx: Any, arguments: Sequence[Any]) -> Any:
        protocol, reply = op.protocol(ctx, *arguments), None
        while True:
            self._place.name = name
            try:
                yielded = protocol.send(reply)
            except StopIteration as stop:
                return stop.value
            finally:
                self._place.name = None
            reply = yield yielded
            answers = reply if isinstance(yielded, tuple) else [reply]
            for message, answer in zip(as_tuple(yielded), answers, strict=True):
                if isinstance(message, ToServer):
                    self.seen.append((name, SENT, 0, message.payload))
                elif isinstance(message, ToClient):
                    self.seen.append((name, RECEIVED, 0, answer))
                elif message.payload.element_size() >= 4:
                    self.seen.append((name, OPENED, 0, message.payload + answer))


@dataclass
class _Watched:
    op: Any
    name: str
    tap: _Tap

    def protocol(self, ctx: Any, *arguments: Any) -> Any:
        return self.tap.protocol(self.op, self.name, ctx, arguments)


def record(programs: Mapping[str, Any], prompt: Sequence[int], queries: int) -> Recording:
    """Ask `prompt` again and again in one session, and record what the client sees."""
    tap, words, logits = _Tap(), [], []
    groups: tuple[Group, ...] = ()
    frac = 0
    with tap.installed(), InProcessSession(programs) as session:
        for _ in range(queries):
            tap.clear()
            session.step(prompt, 0)
            # The executor may start instructions of one round in any order of their names.
            seen = sorted(tap.seen, key=lambda item: item[0])
            if not groups:
                groups = tuple(_groups(seen))
            words.append(np.concatenate([_unsigned(item[3]) for item in seen]))
            client, server = tap.logits[CLIENT], tap.logits[SERVER]
            frac = client.frac
            logits.append((client.share + server.share).reshape(-1).numpy())
    return Recording(groups, np.stack(words), np.stack(logits), frac)


def _unsigned(words: torch.Tensor) -> np.ndarray:
    flat = words.reshape(-1).numpy()
    return flat.view(f"u{flat.itemsize}").astype(np.uint64)


def _groups(seen: Sequence[tuple[str, str, int, torch.Tensor]]) -> Iterator[Group]:
    start = 0
    for name, kind, shift, words in seen:
        stop = start + words.numel()
        yield Group(name, kind, 8 * words.element_size(), shift, start, stop)
        start = stop


def coins(words: np.ndarray, shift: int) -> np.ndarray:
    """The odds of rounding up, about zero: in (-1/2, 1/2), and uniform."""
    low = words & np.uint64((1 << shift) - 1)
    return 0.5 - (low.astype(np.float64) + 0.5) / 2.0**shift


def _varying(words: np.ndarray, shift: int) -> np.ndarray:
    """The odds about their mean, which is all there is of bits that never change."""
    odds = coins(words, shift)
    return np.asarray(odds - odds.mean(0))


@dataclass(frozen=True)
class Coins:
    """A group with its shift, and the part of the logits' variance that it explains beyond chance.

    score: that part in units of its standard deviation if the coins meant nothing.
    """

    group: Group
    shift: int
    excess: float
    score: float


class Evidence:
    """What the client makes of the logits of many queries of one prompt.

    It averages first: the mean over the queries is the part that no coin explains. space, [V, W]:
    columns that span the logits of all prompts. A client learns them from about W logits of other
    prompts; projecting on them removes noise that was added to each logit independently.
    """

    def __init__(
        self, recording: Recording, logits: np.ndarray, space: np.ndarray | None = None
    ) -> None:
        self.recording = recording
        if space is None:
            space = np.eye(logits.shape[1])
        self._basis = np.linalg.svd(space, full_matrices=False)[0]
        self._seen = (logits - logits.mean(0)) @ self._basis
        """The logits less their mean, as coordinates in the space."""

    def find(self) -> list[Coins]:
        """Of every group, the low bits that explain most of the logits; the best group first.

        This needs no knowledge of the program: coins are independent and uniform, so the variance
        that each explains adds up. Bits that are always the same explain nothing.
        """
        logits = self._seen[:_SEARCHED] - self._seen[:_SEARCHED].mean(0)
        count, total = len(logits), (logits**2).sum()
        spread = np.linalg.eigvalsh(logits.T @ logits)
        rank = spread.sum() ** 2 / (spread**2).sum()
        found = []
        for group in self.recording.groups:
            words = self.recording.words[:count, group.start : group.stop]
            chance = group.size / count
            explained = {
                shift: 12 * ((_varying(words, shift).T @ logits) ** 2).sum() / (count * total)
                for shift in group.shifts
            }
            best_shift = max(explained, key=explained.__getitem__)
            best = explained[best_shift] - chance
            deviation = chance * np.sqrt(2 / (group.size * rank))
            found.append(Coins(group, best_shift, best, best / deviation))
        return sorted(found, key=lambda item: item.excess, reverse=True)

    def estimate(self, target: Coins, others: Sequence[Coins] = ()) -> np.ndarray:
        """How far one unit on each wire of `target` moves each logit, [V, size], up to a factor.

        Least squares on the coins of `target` and of `others` jointly.
        """
        words = self.recording.words[: len(self._seen)]
        blocks = []
        for used in (target, *others):
            odds = coins(words[:, used.group.start : used.group.stop], used.shift)
            blocks.append(self._sharpened(odds))
        known = np.concatenate(blocks, 1)
        known -= known.mean(0)
        # The Gram matrix of independent coins is well conditioned, but some words are constant.
        solved = np.linalg.pinv(known.T @ known, hermitian=True) @ (known.T @ self._seen)
        estimate: np.ndarray = self._basis @ solved[: target.group.size].T
        return estimate

    def _sharpened(self, odds: np.ndarray) -> np.ndarray:
        """The coins themselves where the logits tell how they fall.

        A value rounds up if its own low bits exceed those that the client knows. Where these are
        the same in each query, as in the first truncation of a prompt, the coin is a step, which
        explains up to a third more than its odds. Where they vary, the odds are all there is.
        """
        count, seen = len(odds), self._seen.astype(np.float32)
        total = float((self._seen**2).sum())
        explained = 12 * ((odds.astype(np.float32).T @ seen) ** 2).sum(1) / count
        # Random logits would explain so much more by a step only once in a thousand coins.
        found, needed = odds.copy(), explained + 4 * total / count
        for place in np.linspace(-0.5, 0.5, 33)[1:-1]:
            step = (odds > place).astype(np.float32) - np.float32(0.5 - place)
            by_step = ((step.T @ seen) ** 2).sum(1) / (count * (0.25 - place**2))
            better = by_step > needed
            found[:, better], needed[better] = step[:, better], by_step[better]
        return found


def correlation(estimate: np.ndarray, truth: np.ndarray) -> float:
    """Between all entries of two matrices."""
    return float(np.corrcoef(estimate.ravel(), truth.ravel())[0, 1])
