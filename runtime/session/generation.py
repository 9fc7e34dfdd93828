"""Generation: the client's loop, from the prompt to the last token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from mergec.runtime.core.arguments import Arguments
from mergec.runtime.core.draw import Draw
from mergec.runtime.core.errors import BundleError, PromptError
from mergec.runtime.engine.trees import Branches
from mergec.runtime.program.manifest import Manifest
from mergec.runtime.session.drafting.speculation import Speculation
from mergec.runtime.session.drafting.steady import Steady, Stride, singly
from mergec.runtime.session.sampling import Chooser, Sampling, draw_for
from mergec.runtime.session.steps import Session, StepReport, measured

_UNCHECKED = "this program does not check drafts as it says; compile it again"


def check_prompt(prompt: Sequence[int], max_tokens: int, manifest: Manifest, pads: int = 0) -> None:
    """Raise PromptError for a prompt that the program cannot run, before anything is sent.

    pads: how many tokens are put before it.
    """
    vocabulary, limit = manifest.vocab_size, manifest.max_length
    check = Arguments(PromptError)
    max_tokens = check.whole("max_tokens", max_tokens, 1)
    if not prompt:
        raise PromptError("the prompt is empty; give at least one token")
    for number, given in enumerate(prompt):
        token = check.whole(f"token {number} of the prompt", given, 0)
        if vocabulary and token >= vocabulary:
            raise PromptError(
                f"the prompt's token {token} is not in the vocabulary of {vocabulary}; "
                "use the model's own tokenizer"
            )
    length = pads + len(prompt)
    if limit and length + max_tokens > limit:
        raise PromptError(
            f"the prompt has {length} tokens, which with {max_tokens} to generate is more "
            f"than this program's {limit}; shorten it, ask for fewer, or compile with a larger "
            "max_length"
        )


@dataclass(frozen=True)
class Token:
    """One token of an answer.

    reports: one for each step that led to the token; several for the first token of a prompt that
    is fed in parts, none for one that came of the step before, behind a right draft. logits: those
    it was chosen from, [V]; None if only the token is revealed.
    """

    token: int
    reports: tuple[StepReport, ...]
    logits: torch.Tensor | None


def answer(
    session: Session,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[int] = (),
    announce: Callable[[int, int], object] = lambda _new, _past: None,
    first: int = 0,
    cached: int = 0,
    piece: int = 0,
    ahead: Sequence[int] = (),
    fixed_length: bool = False,
    speculation: Speculation | None = None,
    planned: int = 0,
    pads: int = 0,
) -> Iterator[Token]:
    """The client's loop: yields the tokens after the prompt, a stop token included.

    sampling: how tokens are chosen; by default as the checkpoint's generation settings say.
    announce: called with new and past tokens before each step, to tell the other roles. first:
    number of prompt tokens that the first step takes, while the later steps take one token each; 0
    for all. cached: number of prompt tokens that are in the caches already, fewer than all; the
    first step cuts the caches to them. piece: most prompt tokens of a step, which bounds the memory
    that a long prompt takes; 0 for any number; a program without caches takes a prompt whole, and
    so does an encoder-decoder. ahead: tokens of the prompt's first steps, which were dealt ahead.
    fixed_length: after a stop token, run the steps up to `max_tokens` without yielding their
    tokens. The caller may leave the loop at any token.

    speculation: drafts the next tokens, and steps check them. A step takes the last token and the
    drafts, and gives a result at each of its positions. Token after token is chosen from these as
    it would be without drafts, by the same processors, with the same history and the same numbers
    of the generator, until one is not the drafted one. The later results were computed for another
    text and are dropped, as are their entries of the caches, by the `past` of the next step. So a
    draft is kept with exactly the probability that the model gives it, and where it is not, the
    token is drawn from the rest: rejection sampling (Leviathan et al., ICML 2023) for drafts that
    are no random choice. A seed gives the same tokens with and without drafts.

    Where `speculation` fixes how many tokens a step keeps, all steps look alike (`Steady`), and
    `fixed_length` runs those of an answer of `max_tokens`. Where it bounds the extra steps, an
    answer that would need another one goes on with one token a step instead. planned: tokens in
    the caches after the last step that such an answer was prepared for; 0 for as many as it needs.

    Drafts may form a tree. Then a token is looked for among all drafts that follow the one before,
    and the caches keep the path of the right ones. As each token is drawn from the model's own
    distribution first, and compared then, this is recursive rejection over siblings with their
    residuals (Miao et al., SpecInfer, ASPLOS 2024) for drafts that are no random choice.

    The drafters are told what each step gives, and, if the model has heads that guess the tokens
    after the next one, what these say at the last position that is kept.

    pads: tokens of padding that are put before the prompt. All other numbers count them as tokens
    of the prompt, so steps are those of a prompt that is longer by as much. No token of prompt and
    answer attends to them, and neither what chooses tokens nor what drafts them knows of them.

    A program that resends its hidden state knows no token before the last step: it runs all
    `max_tokens` steps, whatever `stop` says, and the first token's reports are those of all steps.
    """
    check_prompt(prompt, max_tokens, session.program.manifest, pads)
    sampling = sampling or Sampling()
    manifest = session.program.manifest
    if pads and not session.program.pads:
        raise PromptError("this program takes no padding; compile it with pad_prompt")
    session.pads, text = pads, [*[manifest.pad_token] * pads, *prompt]
    draw, revealed = draw_for(sampling, manifest), manifest.reveals_logits
    choose: Callable[[torch.Tensor], int] = int
    if revealed:
        choose = Chooser(sampling, manifest, prompt, max_tokens)
    if speculation is not None:
        _check_speculation(session, fixed_length and speculation.fixed is None)
        speculation.begin(session.program, len(text), session.rehearsal)
    if session.program.resends:
        rows, reports = _resend(session, prompt, max_tokens, announce)
        for row in rows:
            token = choose(row)
            yield Token(token, tuple(reports), row)
            if token in stop:
                return
            reports = []
        return
    tokens: list[int] = []
    # An encoder reads a source as a whole.
    pieces = session.cached and not session.program.encodes
    first = first if pieces and 0 < first < len(text) else len(text)
    piece = piece if pieces and piece else len(text)
    begun, feeds = cached, list[list[int]]()
    for size in ahead:
        feeds.append(text[begun : begun + size])
        begun += size
    feeds += [text[n : min(n + piece, first)] for n in range(begun, first, piece)]
    if speculation is not None and (steady := speculation.steady(manifest)) is not None:
        yield from _steadily(
            session,
            text,
            feeds,
            cached,
            speculation,
            steady,
            partial(_run, session, draw, announce),
            choose,
            max_tokens=max_tokens,
            stop=stop,
            fixed_length=fixed_length,
            planned=planned,
            pads=pads,
        )
        return
    feeds += [[token] for token in text[first:]]
    past, ended = cached, False
    drafts: list[int] = []
    parents: tuple[int, ...] = ()
    keep: tuple[int, ...] = ()
    while True:
        reports = []
        for feed in feeds:
            results: list[torch.Tensor | None] = []

            def work(
                feed: list[int] = feed,
                past: int = past,
                branches: Branches = Branches(keep, parents),  # noqa: B008  (as of this step)
                results: list[Any] = results,
            ) -> None:
                session.branches = branches
                session.divide(len(feed), past)
                session.rehearse(len(feed), past, draw)
                announce(len(feed), past)
                results.append(session.rows(len(feed), past, feed, draw))

            report = measured(session, len(feed), past, work)
            reports.append(replace(report, phase="decode" if tokens else "prompt"))
            past += len(feed) if session.cached else 0
        found = results[0]
        if found is None:
            raise BundleError("only the client sees a result; run this loop there")
        if len(found) <= len(drafts):
            raise BundleError(_UNCHECKED)
        found = found[-1 - len(drafts) :]
        chosen, path = _accepted(found, drafts, parents, choose, stop)
        right = len(chosen) - 1
        if drafts:
            reports[-1] = replace(reports[-1], drafted=len(drafts), accepted=right)
        if speculation is not None and tokens:
            speculation.learn(1 + len(drafts), reports[-1].seconds, [token for token, _ in chosen])
        past -= len(drafts) - right
        keep = path if parents else ()
        if speculation is not None:
            speculation.expect(feeds[-1][-len(found) :], found)
            if manifest.medusa:
                # Behind the last right draft; all that follows is of another text.
                last = path[-1] - len(drafts) - 1
                speculation.guess(session.guesses[:, last].tolist())
                speculation.rank(session.candidates[:, last].tolist())
        for token, row in chosen:
            tokens.append(token)
            if not ended:
                yield Token(token, tuple(reports), row if revealed else None)
            ended, reports = ended or token in stop, []
        if len(tokens) == max_tokens or (ended and not fixed_length):
            return
        if speculation is not None:
            drafts = speculation.draft([*prompt, *tokens], max_tokens - len(tokens))
            parents = speculation.parents
        feeds = [[tokens[-1], *drafts] if session.cached else [*text, *tokens]]


def _accepted(
    rows: torch.Tensor,
    drafts: Sequence[int],
    parents: Sequence[int],
    choose: Callable[[torch.Tensor], int],
    stop: Sequence[int],
) -> tuple[list[tuple[int, torch.Tensor]], tuple[int, ...]]:
    """The tokens of a step's results [1 + drafts, …], each with its row: up to the first that is
    not a drafted one, or that ends the answer. Also the places of these rows.

    parents: see `Branches`; empty if the drafts follow each other.
    """
    chosen: list[tuple[int, torch.Tensor]] = []
    places: list[int] = []
    follows: dict[tuple[int, int], int] = {}
    for number, draft in enumerate(zip(parents or range(len(drafts)), drafts, strict=True), 1):
        follows.setdefault(draft, number)
    place: int | None = 0
    while place is not None:
        token = choose(rows[place])
        chosen.append((token, rows[place]))
        places.append(place)
        place = None if token in stop else follows.get((place, token))
    return chosen, tuple(places)


def _check_speculation(session: Session, fixed_length: bool) -> None:
    """Raise PromptError if drafts do not go with the program or with the other options."""
    if session.program.resends or not session.cached:
        raise PromptError("this program has no caches to roll back; leave speculate out")
    if fixed_length:
        raise PromptError(
            "with drafts the number of steps depends on the answer, which fixed_length is to hide; "
            "leave one of them out"
        )


def _run(
    session: Session,
    draw: Draw,
    announce: Callable[[int, int], object],
    feed: Sequence[int],
    past: int,
) -> tuple[torch.Tensor, StepReport]:
    """Run a step as a whole, at the client; returns all rows of its results, and its report."""
    rows: torch.Tensor | None = None

    def work() -> None:
        nonlocal rows
        session.divide(len(feed), past)
        session.rehearse(len(feed), past, draw)
        announce(len(feed), past)
        rows = session.rows(len(feed), past, feed, draw)

    report = measured(session, len(feed), past, work)
    if rows is None:
        raise BundleError("only the client sees a result; run this loop there")
    return rows, report


def _steadily(
    session: Session,
    prompt: Sequence[int],
    feeds: Sequence[Sequence[int]],
    past: int,
    speculation: Speculation,
    steady: Steady,
    run: Callable[[Sequence[int], int], tuple[torch.Tensor, StepReport]],
    choose: Callable[[torch.Tensor], int],
    *,
    max_tokens: int,
    stop: Sequence[int],
    fixed_length: bool,
    planned: int,
    pads: int,
) -> Iterator[Token]:
    """`answer` in steps whose lengths do not depend on which drafts are right (`Steady`).

    prompt: with its padding. feeds: what the prompt's first steps take; the steady steps take the
    rest, which is known. past: tokens in the caches before. run: runs a step of some tokens after
    cached ones.
    """
    manifest = session.program.manifest
    known, last = list(prompt), len(prompt) + max_tokens - 1
    reports, chosen, ended = [], list[tuple[int, torch.Tensor]](), False

    def learned(rows: torch.Tensor, drafts: Sequence[int]) -> list[tuple[int, torch.Tensor]]:
        """What a step says that took all known tokens and these drafts behind them."""
        rows = rows[-1 - len(drafts) :]
        speculation.expect([known[-1], *drafts], rows)
        found, _ = _accepted(rows, drafts, (), choose, stop)
        if manifest.medusa:
            speculation.guess(session.guesses[:, len(found) - len(drafts) - 2].tolist())
        return found

    for feed in feeds:
        rows, report = run(feed, past)
        reports.append(replace(report, phase="prompt"))
        past += len(feed)
        if past == len(known):
            chosen = learned(rows, ())
    strides = steady.strides(past, max(planned, last))
    stride, due, taken, extra = Stride(0, past, 0), True, past, 0
    while True:
        for token, row in chosen:
            known.append(token)
            if not ended:
                yield Token(token, tuple(reports), row if manifest.reveals_logits else None)
            ended, reports = ended or token in stop, []
        left = last + 1 - len(known)
        if (ended or not left) and not fixed_length:
            return
        if due:
            following = next(strides, None)
            if following is None or following.past >= last:
                return
            stride = following
        due = not left or len(known) - stride.past >= stride.move
        if not due and extra == speculation.extra:
            strides = singly(stride.past, last)
            stride, due = next(strides), True
        extra += not due
        new, past = (stride.new, stride.past) if due else stride.extra
        feed = known[past : past + new]
        drafts = speculation.fill(known[pads:], new - len(feed))
        rows, report = run([*feed, *drafts], past)
        if len(rows) < new:
            raise BundleError(_UNCHECKED)
        chosen = []  # a known token, or one behind the answer's end, is not chosen anew
        if left and past + len(feed) == len(known):
            chosen = learned(rows, drafts)[:left]
        right = max(len(chosen) - 1, 0)
        repeated = min(len(feed), max(taken - past, 0))
        taken = max(taken, past + len(feed) + right)
        phase = "prompt" if left == max_tokens else "decode"
        counts = {"drafted": len(drafts), "accepted": right, "repeated": repeated}
        reports.append(replace(report, phase=phase, **counts))


def _resend(
    session: Session,
    prompt: Sequence[int],
    max_tokens: int,
    announce: Callable[[int, int], object],
) -> tuple[torch.Tensor, list[StepReport]]:
    """The logits [max_tokens, V] of a program that resends its hidden state, and its reports."""
    rows: torch.Tensor | None = None
    reports = []
    decoded = ((1, len(prompt) + i) for i in range(max_tokens - 1))
    for new, past in ((len(prompt), 0), *decoded, (0, max_tokens)):

        def step(new: int = new, past: int = past) -> None:
            nonlocal rows
            session.rehearse(new, past)
            announce(new, past)
            rows = session.step(new, past, prompt)

        reports.append(measured(session, new, past, step))
    if rows is None:
        raise BundleError("only the client sees logits; run this loop there")
    return rows, reports


def generate(
    session: Session,
    prompt: Sequence[int],
    *,
    on_token: Callable[[int], object] = lambda _: None,
    on_step: Callable[[StepReport], object] = lambda _: None,
    **options: Any,
) -> list[int]:
    """Run `answer` with its options to the end; returns the tokens.

    on_token, on_step: called with each token and each step's report as they are computed.
    """
    tokens = []
    for token in answer(session, prompt, **options):
        tokens.append(token.token)
        for report in token.reports:
            on_step(report)
        on_token(token.token)
    return tokens
