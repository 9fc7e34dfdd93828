"""Several tokens a step: drafts them, decides how many, and counts how many were right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch

from mergec.runtime.core.errors import BundleError, PromptError
from mergec.runtime.core.network import NETWORKS
from mergec.runtime.engine.rehearsal import Rehearsal
from mergec.runtime.engine.trees import check_parents
from mergec.runtime.program.manifest import Manifest
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.session.drafting.drafter import Drafter, Target, read
from mergec.runtime.session.drafting.pace import (
    Acceptance,
    Seconds,
    best_count,
    modelled_seconds,
)
from mergec.runtime.session.drafting.steady import Steady
from mergec.runtime.session.drafting.tree import Tree, merged
from mergec.runtime.session.text import Text

NONE = "none"


class Speculation:
    """Drafters, and how many of their tokens a step checks.

    It serves one session, one answer at a time. What it has seen of drafts and of a session's steps
    stays from answer to answer.
    """

    def __init__(
        self,
        drafters: Drafter | Sequence[Drafter],
        tokens: int | None = None,
        *,
        fixed: float | None = None,
        extra: int | None = None,
        tree: bool = False,
    ) -> None:
        """drafters: of several, the first one that has drafts makes a line; a tree has those of
        all. tokens: drafts of a step, where there are as many; None to choose by `pace`.

        fixed: tokens by which each step makes the caches longer, whatever drafts are right
        (`Steady`); then all steps have equally many drafts, by default as many as the program
        checks. None for as many as are right. extra: most extra steps that such an answer takes
        before it goes on with one token a step; None for any number. tree: let drafts form a tree;
        not together with `fixed`.
        """
        if tokens is not None and tokens < 1:
            raise PromptError(f"speculate_tokens is {tokens}; it can be 1 or more")
        if tree and fixed is not None:
            raise PromptError(
                "with speculate_fixed all steps look alike, and trees do not; leave speculate_tree "
                "or speculate_fixed out"
            )
        check_extra(extra, fixed)
        self.drafters = [drafters] if isinstance(drafters, Drafter) else list(drafters)
        self.tokens, self.fixed, self.extra, self._branches = tokens, fixed, extra, tree
        self._acceptance = Acceptance()
        self._seconds: Seconds | None = None
        self._drafted = self._chosen = Tree()
        self._checked: RoleProgram | None = None
        self.most = 0
        """Most drafts of a step of the program."""

    @classmethod
    def open(
        cls,
        speculate: str,
        tokens: int | None,
        manifest: Manifest,
        text: Text | None,
        *,
        fixed: float | None = None,
        extra: int | None = None,
        tree: bool = False,
    ) -> Self | None:
        """What `speculate` names, as `lookup` or `lookup+retrieve:DIR`; None for "none" and "".

        Raises PromptError if there is no such drafter, if it does not fit the program, or if the
        program cannot check drafts.
        """
        if speculate in (NONE, ""):
            options = {"tokens": tokens, "fixed": fixed, "extra": extra, "tree": tree or None}
            for name, given in options.items():
                if given is not None:
                    raise PromptError(f"speculate_{name} needs speculate, as in speculate='lookup'")
            return None
        named = read(speculate)
        check(manifest)
        steady(manifest, tokens, fixed)
        target = Target(manifest.vocab_size, text, manifest.medusa)
        opened = [kind.open(place, target) for kind, place in named]
        return cls(opened, tokens, fixed=fixed, extra=extra, tree=tree)

    def begin(self, program: RoleProgram, length: int, rehearsal: Rehearsal | None = None) -> None:
        """Get ready for an answer to a prompt of `length` tokens; raises PromptError as `open`.

        rehearsal: of the program, if there is one.
        """
        check(program.manifest)
        self.most = program.manifest.speculate_up_to
        if self._branches and program.phases:
            raise PromptError("trees of drafts are for decoders so far; leave speculate_tree out")
        if self._branches and self.most > 1 and self._checked is not program:
            try:
                (rehearsal or Rehearsal(program)).check_trees()
            except BundleError as error:
                raise PromptError(f"{error}; leave speculate_tree out") from error
            self._checked = program
        if self.tokens is None and self.fixed is None and self._seconds is None:
            network = NETWORKS[program.manifest.network]
            limit = program.manifest.max_length or length + 1 + self.most
            most = max(1, min(1 + self.most, limit - length))
            counts = sorted({1, most})
            steps = rehearsal or Rehearsal(program)
            self._seconds = Seconds(modelled_seconds(steps, length, counts, network))

    def steady(self, manifest: Manifest) -> Steady | None:
        """The lengths of an answer's steps, if they do not depend on which drafts are right."""
        return steady(manifest, self.tokens, self.fixed)

    def fill(self, tokens: Sequence[int], count: int) -> list[int]:
        """Exactly `count` drafts after `tokens`; where a drafter has fewer, any tokens do."""
        drafted = self._line(tokens, count).tokens if count else []
        return [*drafted, *[tokens[-1]] * (count - len(drafted))]

    def draft(self, tokens: Sequence[int], room: int) -> list[int]:
        """The drafts of the next step after `tokens`. room: most tokens that may still come.

        Which of them each one follows is in `parents` then.
        """
        self._drafted = self._chosen = Tree()
        most = min(self.most, room - 1)
        if most < 1:
            return []
        wanted = most if self.tokens is None else min(most, self.tokens)
        make = self._tree if self._branches else self._line
        self._drafted = self._chosen = make(tokens, wanted)
        if self.tokens is None and self._seconds is not None and self._drafted.tokens:
            seconds = self._seconds.of(1 + len(self._drafted.tokens))
            chances = self._drafted.chances(self._acceptance.value)
            self._chosen = self._drafted.first(best_count(seconds, chances))
        return self._chosen.tokens

    def _line(self, tokens: Sequence[int], most: int) -> Tree:
        drafted = (drafter.draft(tokens, most)[:most] for drafter in self.drafters)
        return Tree.line(next(filter(None, drafted), []))

    def _tree(self, tokens: Sequence[int], most: int) -> Tree:
        trees = [_checked(drafter, tokens, most) for drafter in self.drafters]
        return trees[0] if len(trees) == 1 else merged(trees, most)

    @property
    def parents(self) -> tuple[int, ...]:
        """Which of the last drafts each one follows, from 1 on, or 0 for the last known token;
        empty if each follows the one before."""
        found = tuple(self._chosen.parents)
        return () if found == tuple(range(len(found))) else found

    def expect(self, tokens: Sequence[int], rows: torch.Tensor) -> None:
        """Tell the drafters what the model expects behind each of a step's last tokens."""
        for drafter in self.drafters:
            drafter.expect(tokens, rows)

    def guess(self, tokens: Sequence[int]) -> None:
        """Tell the drafters which tokens the model's heads expect after the next one."""
        for drafter in self.drafters:
            drafter.guess(tokens)

    def rank(self, candidates: Sequence[Sequence[int]]) -> None:
        """Tell the drafters which tokens each head thinks likely, the likeliest first."""
        for drafter in self.drafters:
            drafter.rank(candidates)

    def learn(self, new: int, seconds: float, tokens: Sequence[int]) -> None:
        """Note a step of `new` tokens, and the tokens that came of it."""
        self._acceptance.learn(self._drafted.right(tokens), tokens)
        if self._seconds is not None:
            self._seconds.learn(new, seconds)


def _checked(drafter: Drafter, tokens: Sequence[int], most: int) -> Tree:
    """Up to `most` of its drafts in a tree; raises PromptError if it gives something else."""
    found = drafter.tree(tokens, most).first(most)
    why = check_parents(found.parents, 1 + len(found.tokens))
    if len(found.shares) != len(found.tokens):
        why = f"{len(found.tokens)} drafts have {len(found.shares)} shares"
    if why:
        raise PromptError(f"the drafter {drafter.name!r} gives no tree: {why}")
    return found


def check(manifest: Manifest) -> None:
    """Raise PromptError if a program cannot check drafts."""
    if not manifest.speculate_up_to:
        raise PromptError(
            "this program answers one token a step; compile with speculate_up_to=7 "
            "(--speculate-up-to 7), or leave speculate out"
        )


def check_extra(extra: int | None, fixed: float | None) -> None:
    """Raise PromptError if an answer cannot have this bound of extra steps."""
    if extra is not None and fixed is None:
        raise PromptError("speculate_extra bounds the extra steps of speculate_fixed; give both")
    if extra is not None and extra < 0:
        raise PromptError(f"speculate_extra is {extra}; it can be 0 or more")


def steady(manifest: Manifest, tokens: int | None, fixed: float | None) -> Steady | None:
    """The lengths of steps with `fixed` tokens each and `tokens` drafts, None for all that the
    program checks; None without `fixed`. Raises PromptError as `check` and `Steady.of`."""
    if fixed is None:
        return None
    check(manifest)
    most = manifest.speculate_up_to
    return Steady.of(fixed, min(tokens or most, most))
