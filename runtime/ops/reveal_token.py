"""Tell the client the token that its logits choose, and nothing else about them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from mergec.runtime.core.cases import Case, Sampler
from mergec.runtime.core.context import Context
from mergec.runtime.core.draw import TEMPERATURE_BITS
from mergec.runtime.core.messages import Protocol, ToClient
from mergec.runtime.core.op import Kind, Op
from mergec.runtime.core.spec import CLIENT, FRACTIONAL_BITS, SERVER, Cost, Vis
from mergec.runtime.core.values import Held, Shared
from mergec.runtime.kernels.ghosts import ghost
from mergec.runtime.protocols.argmax import (
    Candidates,
    again_cost,
    best,
    best_cost,
    plan_for,
    plans,
)
from mergec.runtime.protocols.compare import take_window
from mergec.runtime.protocols.gumbel import gumbel
from mergec.runtime.protocols.saturate import SCALAR_DOMAIN
from mergec.runtime.protocols.truncate import truncate, truncate_cost


class RevealToken(Op):
    """Tell the client the token that its logits choose, and nothing else about them.

    logits [..., V], shared, |logit| < 2**14, give [...], held by the client. Cost: see `protocol`.

    groups: sizes of the groups that are compared pair by pair, level by level (`protocols.argmax`);
    by default the first of `plans`.
    """

    name = "reveal_token"
    schema = "(Tensor logits, int[] groups=[]) -> Tensor"
    operands = {"logits": "share"}
    result = "revealed"
    domain = SCALAR_DOMAIN
    kind = Kind.OPENING

    @staticmethod
    def reference(logits: torch.Tensor, groups: Sequence[int] = ()) -> torch.Tensor:
        return logits.argmax(-1)

    @staticmethod
    def cases() -> list[Case]:
        make = Sampler()
        # The result is an index. These logits are further apart than CrypTen's errors.
        return [Case([make.normal(3, 40)], 0.5), Case([make.small(1, 9)], stock=0.5)]

    @classmethod
    def visibility(cls, *operands: Vis) -> Vis:
        return Vis.CLIENT

    @classmethod
    def known_to(cls, *operands: Vis) -> Vis | None:
        """No message is needed for what the client knows already."""
        return operands[0] if operands[0] in (Vis.PUBLIC, Vis.CLIENT) else None

    @classmethod
    def variants(cls, arguments: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
        """Small groups cost fewer bytes, large ones fewer rounds."""
        return ({"groups": list(sizes)} for sizes in plans(arguments["logits"].shape[-1]))

    @classmethod
    def cost(
        cls, logits: Shared, groups: Sequence[int] = (), *, fixed: int, top_k: int = 0
    ) -> Cost:
        """For a choice from the whole vocabulary, or from the `top_k` largest logits."""
        rows, vocabulary = math.prod(logits.shape[:-1]), logits.shape[-1]
        last = truncate_cost(rows * vocabulary, logits.frac - _FINEST)
        last += Cost(rounds=1, online=4 * rows)
        if not top_k:
            noise = Cost(offline=8 * rows * vocabulary)
            return noise + best_cost(rows, vocabulary, 1, _groups(vocabulary, groups)) + last
        few = best_cost(rows, vocabulary, top_k, plan_for(vocabulary, top_k))
        one = again_cost(rows, top_k, 1, plan_for(top_k, 1))
        return few + Cost(offline=8 * rows * top_k) + one + last

    @classmethod
    def protocol(cls, ctx: Context, logits: Shared, groups: Sequence[int] = ()) -> Protocol:
        """The largest of logits + temperature * Gumbel noise, which is a draw from their softmax.

        In: logits [..., V] with at least 16 fractional bits, |logit| + 37 temperature < 2**14.
        Beyond 48 bits they are truncated first, which costs 1 round and 16 bytes online each.
        `ctx.draw` holds the public temperature, 0 for the largest logit itself, and the public
        number of tokens to choose from. Out: held by the client. Rounds 3 per level of groups, and
        1. Online and offline bytes as in `protocols.argmax`, plus 4 online to the client, plus 8
        offline for each candidate that gets noise.

        The client sees the token. It learns no logit, nor by how much the token leads. The server
        sees masked values alone. The noise is the dealer's: each party has a random share of it, so
        nobody can undo the noise to trace a token back to the logits. Logits and noise are cut to
        16 fractional bits, each by less than two units: of logits that are closer than 2**-15 any
        may win, and a token's probability is off by a factor of at most exp(2**-13 / temperature).
        Source: Gumbel-max, as in Maddison, Tarlow and Minka (NeurIPS 2014).
        """
        shape, vocabulary = logits.shape[:-1], logits.shape[-1]
        frac, share = logits.frac, logits.share.reshape(-1, vocabulary)
        if frac > _FINEST:
            share, frac = (yield from truncate(ctx, share, frac - _FINEST)), _FINEST
        keys = take_window(share, frac - FRACTIONAL_BITS)
        candidates = Candidates(keys)
        top_k = ctx.draw.top_k
        sizes: Sequence[int] = _groups(vocabulary, groups)
        if top_k:
            few = plan_for(vocabulary, top_k)
            candidates = yield from best(ctx, candidates, top_k, few)
            sizes = plan_for(top_k, 1)
        noisy = candidates.keys + _noise(ctx, candidates.keys.shape)
        winner = yield from best(ctx, Candidates(noisy, candidates.labels), 1, sizes)
        label = winner.labels.reshape(shape)
        if ctx.party == SERVER:
            yield ToClient(label)
            return Held(Vis.CLIENT, ghost(shape))
        share = yield ToClient(ghost(shape, dtype=torch.int32))
        token = label + share if ctx.party == CLIENT else label
        return Held(Vis.CLIENT, token.long())

    @classmethod
    def stock(cls, logits: Any, groups: Sequence[int] = ()) -> Any:
        """CrypTen's argmax, revealed to the client; of equal logits any may win."""
        index = logits.argmax(dim=-1, one_hot=False).get_plain_text(dst=CLIENT)
        if index is None:
            return Held(Vis.CLIENT, torch.empty(logits.shape[:-1], device="meta"))
        return Held(Vis.CLIENT, index.long().reshape(logits.shape[:-1]))


_FINEST = FRACTIONAL_BITS + 32
"""Most fractional bits of a share whose window of 32 bits above the 16th is exact at the top."""


def _groups(vocabulary: int, given: Sequence[int]) -> Sequence[int]:
    return given or next(iter(plans(vocabulary)))


def _noise(ctx: Context, shape: Sequence[int]) -> torch.Tensor:
    """Shares modulo 2**32 of temperature * noise, with 16 fractional bits, one unit off at most.

    The noise is dealt with 16 fractional bits whatever the temperature, and multiplied by zero at
    temperature 0. So what is dealt says nothing about the request.
    """
    unit = ctx.deal(shape, lambda: gumbel(ctx.private_words(shape)))
    if unit.is_meta:
        return unit.to(torch.int32)
    return take_window(unit * ctx.draw.units, TEMPERATURE_BITS)
