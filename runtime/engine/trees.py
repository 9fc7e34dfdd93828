"""Steps whose tokens form a tree: each token looks at the caches and at what leads to it alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from mergec.runtime.core.errors import BundleError
from mergec.runtime.core.op import Kind, Positions
from mergec.runtime.core.spec import Vis
from mergec.runtime.core.values import Held
from mergec.runtime.engine.plan import Plan, Planned
from mergec.runtime.kernels.transfers import to_device
from mergec.runtime.program.encoding import refs

_SHORT, _LONG, _LATER = (2, 1), (3, 2), (2, 2)
"""New and past tokens of steps that tell which dimensions of a value are of which length."""

_PARTS = ("aten.slice.Tensor", "aten.narrow.default", "aten.select.int")

Run = Callable[[int, int], Mapping[str, Any]]
"""Values of a step of so many new and past tokens, each after the one before: `Trees.names`, unless
something else is said."""


class Branches(NamedTuple):
    """How a step departs from tokens that follow each other. All three roles know it.

    keep: which tokens of the step before stay in the caches, a path that begins with its first one;
    empty for as many first ones as `past` says. parents: for each token of this step but the first
    one, which of its tokens it follows; empty if each follows the one before.
    """

    keep: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()


LINE = Branches()
"""Each token follows the one before, in this step and the last one."""


def check_parents(parents: Sequence[int], new: int) -> str:
    """Why these are no parents of the tokens of a step but the first; empty if they are."""
    if len(parents) != new - 1:
        return f"a tree of {new} tokens has {new - 1} parents, not {len(parents)}"
    for place, parent in enumerate(parents):
        if not 0 <= parent <= place:
            return f"token {place + 1} of the tree follows token {parent}, which is none before it"
    return ""


def depths(parents: Sequence[int]) -> list[int]:
    """How many tokens of the tree lead to each one."""
    found = [0]
    for parent in parents:
        found.append(found[parent] + 1)
    return found


def lineage(parents: Sequence[int]) -> torch.Tensor:
    """Which tokens lead to each one, itself included: bool [N, N]."""
    found = torch.eye(len(parents) + 1, dtype=torch.bool)
    for place, parent in enumerate(parents, 1):
        found[place] |= found[parent]
    return found


def is_path(places: Sequence[int], parents: Sequence[int]) -> bool:
    """Whether these tokens of a tree lead from its first one to the last of them."""
    if not places or places[0] != 0:
        return False
    steps = itertools.pairwise(places)
    return all(0 < after <= len(parents) and parents[after - 1] == at for at, after in steps)


class Trees:
    """What a program computes from lengths alone, for steps whose tokens form a tree.

    That are positions, rotary tables, and masks: public values, and those of the server that follow
    from them. For a tree they have the entries of a step of as many tokens as the tree has levels,
    each where a token of its level is. So a token has the position that it would have in its own
    text, and sees its own path as it would there, with whatever the model makes of distances. All
    other tokens of the tree are hidden from it. This is local: who knows the value computes it, and
    the tree is public.

    names: these values. Where a step takes them as inputs, its instructions are those of a line.
    sizes: which of the lengths that they follow from are read off secret values; from the inputs
    and these, no instruction on secrets leads to them. rows: secret values in whose rows no mask
    hides an entry, so these must not be of tokens (`check_rows`).
    """

    def __init__(self, plan: Plan) -> None:
        known = {
            planned.name
            for planned in plan.steps
            if planned.instruction.vis in (Vis.PUBLIC, Vis.SERVER)
        }
        given = {spec.name for spec in plan.program.inputs}
        sizes, rows = list[str](), list[str]()
        self._readers: dict[str, list[tuple[bool, str]]] = {}
        self._attentions: list[tuple[str, str]] = []
        for planned in plan.steps:
            if planned.name in known:
                if planned.reads_shape and planned.refs[0] not in known | given:
                    sizes.append(planned.name)
                continue
            attends = planned.op is not None and planned.op.kind is Kind.ATTENTION
            for place, name in _operands(planned):
                if name in known:
                    self._readers.setdefault(name, []).append((attends, place))
            if attends and _works_by_rows(planned):
                rows.append(planned.name)
            elif attends:
                mask = planned.argument("mask")
                self._attentions.append((planned.name, getattr(mask, "name", "")))
        self.names: tuple[str, ...] = tuple(self._readers)
        self.sizes, self.rows = tuple(sizes), tuple(rows)
        steps = [plan.steps[i] for i in plan.active({*given, *sizes}, self.names)]
        self._secret = [planned.name for planned in steps if planned.name not in known]
        self._axes: dict[str, tuple[int | None, int | None]] | None = None

    def check(self, run: Run) -> None:
        """Raise BundleError if the program cannot run a step of a tree."""
        self._found_axes(run)

    def check_rows(self, run: Run) -> None:
        """The same for the values `rows`, which `run` returns: their rows must stay as long where a
        step has more tokens, as those of a router do that chooses from experts."""
        short, long = (run(*lengths) for lengths in (_SHORT, _LONG))
        for name in self.rows:
            if short[name].shape[-1] != long[name].shape[-1]:
                raise _refused(f"{name} has no mask of positions")

    def values(self, parents: Sequence[int], past: int, run: Run) -> dict[str, Any]:
        """These values for a step of the tree after `past` tokens, by name.

        Raises BundleError if the program cannot run a step of a tree.
        """
        axes = self._found_axes(run)
        rows = torch.tensor(depths(parents))
        keys = torch.cat([torch.arange(past), past + rows])
        unseen = torch.cat([torch.zeros(len(rows), past, dtype=torch.bool), ~lineage(parents)], 1)
        line, found = run(int(rows.max()) + 1, past), {}
        for name, places in axes.items():
            value = line[name]
            words = value.value if isinstance(value, Held) else value
            for axis, places_of in zip(places, (rows, keys), strict=True):
                if axis is not None:
                    places_of = to_device(places_of, words.device, "public")
                    words = words.index_select(axis, places_of)
            if any(place == "mask" for _, place in self._readers[name]):
                lowest = torch.finfo(words.dtype).min
                words = words.where(to_device(~unseen, words.device, "public"), lowest)
            found[name] = Held(value.vis, words) if isinstance(value, Held) else words
        return found

    def _found_axes(self, run: Run) -> dict[str, tuple[int | None, int | None]]:
        """For each value that has one: its dimension of new tokens, and that of all tokens."""
        if self._axes is None:
            if self._secret:
                raise _refused(f"public values follow from {self._secret[0]}, which is none")
            short, long, later = (run(*lengths) for lengths in (_SHORT, _LONG, _LATER))
            axes = {}
            for name, shape in _shapes(short).items():
                of = self._axes_of(name, shape, long[name].shape)
                if of != (None, None):
                    axes[name] = of
            for name, mask in self._attentions:
                if axes.get(mask, (None, None))[1] is None:
                    raise _refused(f"{name} has no mask of positions")
            for name, readers in self._readers.items():
                cuts = any(place in _PARTS for _, place in readers)
                if cuts and isinstance(short[name], int) and short[name] != later[name]:
                    raise _refused(f"{name} says where a secret value is cut")
            self._axes = axes
        return self._axes

    def _axes_of(
        self, name: str, short: Sequence[int], long: Sequence[int]
    ) -> tuple[int | None, int | None]:
        axes: dict[tuple[int, int], int] = {}
        for axis, sizes in enumerate(zip(short, long, strict=True)):
            if sizes[0] != sizes[1] and axes.setdefault(sizes, axis) != axis:
                raise _refused(f"{name} has two dimensions of one length")
        row, key = axes.pop((_SHORT[0], _LONG[0]), None), axes.pop((sum(_SHORT), sum(_LONG)), None)
        if axes:
            raise _refused(f"{name} is neither of new tokens nor of all tokens")
        for attends, place in self._readers[name]:
            # Only attention looks at several tokens; everything else takes each for itself.
            alone = place in ("mask", "bias") if attends else key is None and "." not in place
            if (row, key) != (None, None) and not alone:
                raise _refused(f"{name} is read by more than attention")
        if key is not None and (key != len(short) - 1 or row not in (None, len(short) - 2)):
            raise _refused(f"{name} is no matrix of new tokens by all tokens")
        return row, key


def _operands(planned: Planned) -> list[tuple[str, str]]:
    """What an instruction reads: for each value the parameter of the op that takes it, or the name
    of the function that is no op."""
    item = planned.instruction
    if planned.op is None:
        return [(item.target, name) for name in planned.refs]
    bound = planned.bind(item.args, item.kwargs)
    return [(key, ref.name) for key, argument in bound.items() for ref in refs(argument)]


def _works_by_rows(planned: Planned) -> bool:
    """Whether an instruction sees one row of one operand at a time, and nothing else."""
    by_rows = planned.op is not None and planned.op.positions is Positions.ROWS
    return by_rows and len(planned.refs) == 1


def _shapes(values: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    """The shapes of those values that are tensors."""
    tensors = {name: v for name, v in values.items() if isinstance(v, (torch.Tensor, Held))}
    return {name: tuple(value.shape) for name, value in tensors.items()}


def _refused(why: str) -> BundleError:
    return BundleError(f"drafts cannot form a tree in this program: {why}; draft without trees")
