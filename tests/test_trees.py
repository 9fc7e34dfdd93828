"""Drafts that form a tree: what a step computes, keeps, costs and refuses."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mergec.compiler.config import CompileConfig
from mergec.compiler.driver import compile_decoder
from mergec.runtime.cli import app
from mergec.runtime.core.draw import Draw
from mergec.runtime.core.errors import BundleError, PartyError, PromptError
from mergec.runtime.core.spec import CLIENT, DEALER, ROLES, SERVER, Vis
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.engine.plan import Plan
from mergec.runtime.engine.rehearsal import Rehearsal, step_cost
from mergec.runtime.engine.trees import (
    LINE,
    Branches,
    Trees,
    check_parents,
    depths,
    is_path,
    lineage,
)
from mergec.runtime.program.program import Instruction, Ref
from mergec.runtime.roles.inprocess import InProcessSession
from mergec.runtime.roles.local import run_local
from mergec.runtime.session.conversations import Place
from mergec.runtime.session.drafting import Drafter, Speculation
from mergec.runtime.session.drafting.datastore import Datastore
from mergec.runtime.session.drafting.drafter import Target
from mergec.runtime.session.drafting.lookup import Lookup
from mergec.runtime.session.drafting.medusa import Medusa
from mergec.runtime.session.drafting.pace import best_count
from mergec.runtime.session.drafting.recycle import Recycle
from mergec.runtime.session.drafting.retrieve import Retrieve
from mergec.runtime.session.drafting.tree import Tree, grown, merged
from mergec.runtime.session.generation import answer
from mergec.runtime.session.plain import PlainSession
from mergec.runtime.session.requests import Schedule, read_step, write_step
from mergec.runtime.session.sampling import Sampling
from mergec.runtime.transport.frames import Kind
from tests import characters, decoder, session
from tests.families import every_family, slow
from tests.sampled import BEST, DRAWS, FIRST, HEAT, LAW, ByLastToken, check_law
from tests.services import deployment
from tests.test_more_families import example

ERROR = 2e-2
"""Error of the tiny decoders' logits under MPC, with a reserve."""

MOST = 7
PROMPT = [5, 1, 7]
IDS = [4, 10, 2, 3, 8, 5, 6, 7]
PARENTS = (0, 0, 1, 1, 2, 3, 0)
"""Three branches of four levels."""


def program(role: str = "server", **manifest: Any) -> Any:
    return decoder.program(role, **{"speculate_up_to": MOST, **manifest})


def roles(**manifest: Any) -> dict[str, Any]:
    return {role: program(role, **manifest) for role in ROLES}


def plain(of: Any = None) -> PlainSession:
    return PlainSession(PlainExecutor(program() if of is None else of))


def step(run: PlainSession, ids: Sequence[int], past: int, branches: Branches) -> torch.Tensor:
    run.branches = branches
    rows = run.rows(len(ids), past, ids)
    assert rows is not None
    return rows


def path_to(place: int, parents: Sequence[int] = PARENTS) -> list[int]:
    found = [place]
    while found[0]:
        found.insert(0, parents[found[0] - 1])
    return found


# ---------------------------------------------------------------------------------- shapes


def test_every_small_tree_and_its_paths() -> None:
    for count in range(1, 5):
        for parents in itertools.product(range(count), repeat=count):
            sound = all(parent <= place for place, parent in enumerate(parents))
            assert (check_parents(parents, count + 1) == "") is sound
            if not sound:
                continue
            paths = [path_to(place, parents) for place in range(count + 1)]
            assert depths(parents) == [len(path) - 1 for path in paths]
            seen = lineage(parents)
            assert [row.nonzero().flatten().tolist() for row in seen] == [sorted(p) for p in paths]
            for length in range(count + 2):
                for places in itertools.product(range(count + 2), repeat=length):
                    assert is_path(places, parents) is (list(places) in paths)
    assert "has 2 parents, not 3" in check_parents((0, 0, 0), 3)
    assert "follows token 3, which is none before it" in check_parents((0, 3), 3)


def test_requests_of_trees_are_read_back_and_lines_stay_as_they_were() -> None:
    whole = write_step(2, 9, Draw(), Place(), 0)
    assert whole == write_step(2, 9, Draw(), Place(), 0, LINE)
    assert len(whole) == 56
    for branches in (LINE, Branches((0, 2)), Branches((), (0, 0)), Branches((0,), (0, 0, 2))):
        for place in (Place(1, 1), Place(0, -2, (3, 5))):
            request = write_step(2, 9, Draw(1, 2), place, 0, branches)
            assert read_step(memoryview(request), "client") == (
                2,
                9,
                Draw(1, 2),
                place,
                0,
                branches,
            )
    for more in (b"\xff", b"\xff\3\0\1", b"\xff\1", b"\xff" + bytes(600), bytes(40)):
        with pytest.raises(PartyError, match="a step that cannot be read"):
            read_step(whole + more, "client")
    for wrong in (whole[:-1], b""):
        with pytest.raises(PartyError, match="a step that cannot be read"):
            read_step(wrong, "client")


# ---------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("family", ["llama", *slow("gpt2")])
def test_logits_of_a_tree_are_those_of_the_model_with_its_mask(family: str) -> None:
    """The model takes the whole mask [1, 1, L, L] and the positions; the parties, the parents."""
    model, compiled = session.compiled(family, speculate_up_to=MOST)
    past, new = len(PROMPT), len(IDS)
    mask = torch.ones(past + new, past + new).tril().bool()
    mask[past:, past:] = lineage(PARENTS)
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    positions = torch.tensor([[*range(past), *(past + depth for depth in depths(PARENTS))]])
    with torch.no_grad():
        wanted = model(
            input_ids=torch.tensor([[*PROMPT, *IDS]]),
            attention_mask=added[None, None],
            position_ids=positions,
            use_cache=False,
        ).logits[0, past:]
    run = plain(compiled.roles["server"])
    run.rows(past, 0, PROMPT)
    assert float((step(run, IDS, past, Branches((), PARENTS)) - wanted).abs().max()) < 1e-5
    with InProcessSession(compiled.roles) as parties:
        parties.step(PROMPT, 0)
        found = parties.rows(IDS, past, Branches((), PARENTS))
        assert float((found - wanted).abs().max()) < ERROR
        spent = parties.record.total
        predicted = step_cost(Rehearsal(compiled.any_role), new, past, parents=PARENTS).cost
        assert spent == predicted
        line = step_cost(Rehearsal(compiled.any_role), new, past).cost
        assert predicted.rounds == line.rounds
        assert predicted.online < line.online, "hidden scores are not computed"


@every_family(())
def test_each_token_of_a_tree_is_computed_as_in_its_own_text(family: str) -> None:
    """Windows, learned and rotary positions, and biases by distance."""
    _, compiled = session.compiled(family, speculate_up_to=MOST)
    tree, line = (plain(compiled.roles["server"]) for _ in range(2))
    prompt = [5, 1, 7, 3, 2, 9]
    tree.rows(len(prompt), 0, prompt)
    rows = step(tree, IDS, len(prompt), Branches((), PARENTS))
    for place, row in enumerate(rows):
        path = path_to(place)
        line.rows(len(prompt), 0, prompt)
        wanted = line.rows(len(path), len(prompt), [IDS[n] for n in path])
        assert float((row - wanted[-1]).abs().max()) < 1e-5  # type: ignore[index]
    kept = path_to(5)
    line.rows(len(kept), len(prompt), [IDS[n] for n in kept])
    past = len(prompt) + len(kept)
    mine, theirs = step(tree, [8], past, Branches(tuple(kept))), line.rows(1, past, [8])
    assert float((mine - theirs).abs().max()) < 1e-5


@pytest.mark.slow
def test_lengths_may_be_read_off_secret_values() -> None:
    """A bias of one layer is expanded to the shape of what the layer before gives."""
    model = example.decoder("gpt_neox_japanese")
    config = CompileConfig(max_length=32, logit_noise=0.0, speculate_up_to=MOST)
    compiled = compile_decoder(model, config=config)
    tree, line = (plain(compiled.roles["server"]) for _ in range(2))
    assert Trees(Plan(compiled.any_role)).sizes
    tree.rows(3, 0, PROMPT)
    line.rows(3, 0, PROMPT)
    ids, branches = IDS[:3], Branches((), (0, 0))
    wanted = line.rows(2, 3, [ids[0], ids[2]])
    assert wanted is not None
    assert float((step(tree, ids, 3, branches)[2] - wanted[-1]).abs().max()) < 1e-5
    with InProcessSession(compiled.roles) as parties:
        parties.step(PROMPT, 0)
        assert float((parties.rows(ids, 3, branches)[2] - wanted[-1]).abs().max()) < ERROR


@pytest.mark.parametrize(
    "options",
    slow({"reveal": "token"}, {"network": "wan"}, {"weights": "shared"}, {"rounding": "exact"}),
)
def test_the_parties_check_a_tree_and_keep_a_path(options: dict[str, Any]) -> None:
    _, compiled = session.compiled("llama", speculate_up_to=MOST, **options)
    clear = plain(compiled.roles["server"])
    clear.rows(3, 0, PROMPT)
    with InProcessSession(compiled.roles) as parties:
        parties.step(PROMPT, 0)
        for ids, past, branches in (
            (IDS, 3, Branches((), PARENTS)),
            ([9, 9, 1], 6, Branches((0, 2, 5), (0, 0))),
            ([8], 8, Branches((0, 2))),
            ([8], 5, LINE),
        ):
            mine, theirs = step(clear, ids, past, branches), parties.rows(ids, past, branches)
            assert len(theirs) == len(ids)
            if options.get("reveal"):
                assert torch.equal(mine.long(), theirs.long())
            else:
                assert float((mine - theirs).abs().max()) < ERROR


def test_all_roles_keep_the_entries_of_a_path_under_their_masks() -> None:
    """What is kept stays as it was opened; what is dropped never comes back."""
    with InProcessSession(roles()) as parties:
        held = {party: parties._sessions[party] for party in (CLIENT, SERVER, DEALER)}
        parties.step(PROMPT, 0)
        parties.rows(IDS, 3, Branches((), PARENTS))
        before = {
            (party, name, part): getattr(cache, part).clone()
            for party, run in held.items()
            for name, cache in run._caches.items()
            for part in ("opened", "mask")
        }
        path = (0, 1, 4)
        parties.rows([2], 6, Branches(path))
        for (party, name, part), words in before.items():
            now = getattr(held[party]._caches[name], part)
            assert now.shape[-2] == 7
            if now.is_meta:
                continue
            kept = [0, 1, 2, *(3 + place for place in path)]
            assert torch.equal(now[..., :6, :], words[..., kept, :])
            dropped = words[..., [n for n in range(11) if n not in kept], :]
            assert not set(now[..., 6, :].flatten().tolist()) & set(dropped.flatten().tolist())
        tokens = [*PROMPT, *(IDS[place] for place in path), 2]
        assert held[CLIENT].tokens == tokens
        last = parties.step([1], 7)
    run = plain()
    run.rows(7, 0, tokens)
    assert float((run.rows(1, 7, [1])[-1] - last).abs().max()) < ERROR  # type: ignore[index]


def test_no_mask_returns_after_a_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = session.drawn_masks(monkeypatch)
    with InProcessSession(roles()) as parties:
        dealer, server = parties._sessions[DEALER], parties._sessions[SERVER]
        parties.step(PROMPT, 0)
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        past, branches = 3, Branches((), PARENTS)
        for _ in range(3):
            parties.rows(IDS, past, branches)
            for name, cache in dealer._caches.items():
                opened = server._caches[name].opened[..., past:, :].clone()
                seen.append((cache.mask[..., past:, :].clone(), opened))
            past, branches = past + 1, Branches((0,), PARENTS)
    masks, opened = (torch.cat([x.reshape(-1) for x in part]) for part in zip(*seen, strict=True))
    for words in (masks, opened, torch.cat(drawn)):
        assert len(words.unique()) == len(words) > 300
    assert set(masks.tolist()) <= set(torch.cat(drawn).tolist())


def test_trees_that_cannot_be_are_refused() -> None:
    run = plain()
    for ids, past, branches, why in (
        (IDS, 0, Branches((), PARENTS), "8 tokens after 0 is not what"),
        ([1], 0, Branches((0,)), "the last step was no tree"),
    ):
        run.rows(3, 0, PROMPT)
        with pytest.raises(BundleError, match=why):
            step(run, ids, past, branches)
    for parents, why in (
        ((0, 0, 1, 1, 2, 3, 7), "token 7 of the tree follows token 7"),
        ((1, 0, 1, 1, 2, 3, 0), "token 1 of the tree follows token 1"),
        (PARENTS[:-1], "a tree of 8 tokens has 7 parents, not 6"),
        ((*PARENTS, 0), "a tree of 8 tokens has 7 parents, not 8"),
    ):
        with pytest.raises(BundleError, match=why):
            step(run, IDS, 3, Branches((), parents))
    with pytest.raises(BundleError, match="a tree of 9 tokens after 3 is not what this program"):
        step(run, [*IDS, 1], 3, Branches((), (*PARENTS, 0)))
    step(run, IDS, 3, Branches((), PARENTS))
    for past, keep in ((5, (0, 3)), (4, (1,)), (6, (0, 2, 3)), (5, (0, 1, 3)), (5, (0, 99))):
        with pytest.raises(BundleError, match="are no path to token"):
            step(run, [1], past, Branches(keep))
    for past in (6, 11):  # the second token of the tree and the third one both follow the first
        with pytest.raises(BundleError, match="are no path"):
            step(run, [1], past, LINE)
    step(run, [1], 5, LINE)
    assert run.tokens == [*PROMPT, *IDS[:2], 1]
    step(run, IDS[:3], 6, Branches((), (0, 0)))
    assert run.tokens == [*PROMPT, *IDS[:2], 1, *IDS[:2]], "not what follows another token"
    run.turn_to(Place(1, 0))
    with pytest.raises(BundleError, match="are no path"):
        step(run, [1], 9, LINE)
    step(run, [1], 8, Branches((0, 2)))
    assert run.tokens == [*PROMPT, *IDS[:2], 1, IDS[0], IDS[2], 1]
    with pytest.raises(PartyError, match="but the store holds"):
        Schedule([(3, 4)]).check(3, 4, Draw(), "client", branches=Branches((), (0, 0)))


@pytest.mark.parametrize("rows_of_tokens", [True, False])
def test_rows_that_no_mask_is_for_must_not_be_of_tokens(rows_of_tokens: bool) -> None:
    made, frac = program(), 46
    source = Ref("mixed.flat")  # [1, new, width]
    if rows_of_tokens:
        turned = Instruction(
            "turned", "aten.transpose.int", (source, 1, 2), {}, Vis.SHARED, frac, "", ""
        )
        made.instructions.append(turned)
        source = Ref("turned")
    made.instructions.append(
        Instruction("odd", "mpc.softmax", (source,), {}, Vis.SHARED, 32, "", "")
    )
    rehearsal = Rehearsal(made)
    if not rows_of_tokens:
        rehearsal.check_trees()
        assert rehearsal.step(3, 4, parents=(0, 0))
        return
    for check in (rehearsal.check_trees, lambda: rehearsal.step(3, 4, parents=(0, 0))):
        with pytest.raises(BundleError, match="odd has no mask of positions; draft without trees"):
            check()


def test_programs_without_trees_are_refused(tmp_path: Path) -> None:
    _, merged = session.compiled("gpt2", preset="merge-mm", speculate_up_to=3)
    with pytest.raises(BundleError, match=r"attention\S* has no mask of positions; draft without"):
        Rehearsal(merged.any_role).check_trees()
    made = Speculation(Lookup(), 3, tree=True)
    with pytest.raises(PromptError, match=r"has no mask of positions.*leave speculate_tree out"):
        next(answer(plain(merged.roles["server"]), PROMPT, max_tokens=3, speculation=made))
    manifest = program().manifest
    with pytest.raises(PromptError, match="speculate_tree needs speculate"):
        Speculation.open("none", None, manifest, None, tree=True)
    with pytest.raises(PromptError, match="all steps look alike, and trees do not"):
        Speculation.open("lookup", None, manifest, None, fixed=2.0, tree=True)
    with pytest.raises(PromptError, match="stock protocols check drafts in a line"):
        run_local(decoder.save(tmp_path), [1], max_tokens=3, mode="crypten", speculate_tree=True)


# ---------------------------------------------------------------------------------- answers


class Grown(Drafter):
    """Drafts the tree that a function of the tokens so far says."""

    name = "grown"

    def __init__(self, rule: Any) -> None:
        self.rule = rule

    @classmethod
    def open(cls, place: str, target: Target) -> Grown:
        raise NotImplementedError

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        raise NotImplementedError

    def tree(self, tokens: Sequence[int], most: int) -> Tree:
        found: Tree = self.rule(list(tokens))
        return found.first(most)


def answered(
    drafter: Drafter | Sequence[Drafter] | None, tokens: int | None = MOST, **options: Any
) -> list[Any]:
    made = None if drafter is None else Speculation(drafter, tokens, tree=True)
    return list(answer(plain(), PROMPT, **{"max_tokens": 12, "speculation": made, **options}))


GREEDY = [token.token for token in answered(None)]


def beside(right: Sequence[int]) -> Grown:
    """Drafts a known answer as the second of two branches, each token beside a wrong one."""

    def rule(tokens: list[int]) -> Tree:
        ahead = right[len(tokens) - len(PROMPT) :][:3]
        found, at = Tree(), 0
        for token in ahead:
            found.tokens += [(token + 1) % 13, token]
            found.parents += [at, at]
            found.shares += [0.5, 0.5]
            at = len(found.tokens)
        return found

    return Grown(rule)


def test_greedy_and_seeded_answers_are_those_without_trees() -> None:
    random = np.random.default_rng(3)

    def wild(_: list[int]) -> Tree:
        count = int(random.integers(0, 9))
        parents = [int(random.integers(0, n + 1)) for n in range(count)]
        return Tree(random.integers(0, 13, count).tolist(), parents, [0.3] * count)

    for sampling in (Sampling(), Sampling(temperature=1.5, seed=8), Sampling(2.0, 5, 0.9, 9)):
        without = [token.token for token in answered(None, sampling=sampling)]
        both = [Grown(wild), beside(without)]
        for drafter in (Grown(wild), beside(without), Lookup(), Recycle(), both):
            for tokens in (MOST, 3, None):
                found = answered(drafter, tokens, sampling=sampling)
                assert [token.token for token in found] == without
                reports = [report for token in found for report in token.reports]
                assert sum(report.tokens for report in reports[1:]) == len(without) - 1
        found = answered(beside(without), 6, sampling=sampling)
        reports = [report for token in found for report in token.reports][1:]
        assert [report.accepted for report in reports[:2]] == [3, 3], "the second branch is right"


def test_trees_are_merged() -> None:
    one = Tree([1, 2, 3], [0, 1, 1], [1.0, 0.6, 0.4])
    two = Tree([4, 1, 2, 5], [0, 0, 2, 3], [0.5, 0.5, 1.0, 1.0])
    both = merged([one, two], 9)
    paths: dict[tuple[int, ...], float] = {}
    place: list[tuple[int, ...]] = [()]
    for token, parent, share in zip(both.tokens, both.parents, both.shares, strict=True):
        place.append((*place[parent], token))
        paths[place[-1]] = share
    # After 1 and 2 one of them alone goes on.
    assert paths == pytest.approx(
        {(1,): 0.75, (4,): 0.25, (1, 2): 0.8, (1, 3): 0.2, (1, 2, 5): 1.0}
    )
    assert merged([one, two], 2) == both.first(2)
    assert merged([Tree(), Tree.line([7, 8])], 9) == Tree.line([7, 8])
    assert merged([], 3) == merged([Tree()], 3) == Tree()


def test_a_drafter_that_gives_no_tree_is_named() -> None:
    for tree, why in (
        (Tree([1, 2], [0, 2], [1.0, 1.0]), "follows token 2, which is none before it"),
        (Tree([1, 2], [0], [1.0, 1.0]), "has 2 parents, not 1"),
        (Tree([1, 2], [0, 0], [1.0]), "2 drafts have 1 shares"),
    ):
        with pytest.raises(PromptError, match=f"the drafter 'grown' gives no tree: .*{why}"):
            answered(Grown(lambda _, tree=tree: tree))
        with pytest.raises(PromptError, match=f"the drafter 'grown' gives no tree: .*{why}"):
            answered([Lookup(), Grown(lambda _, tree=tree: tree)])


def test_a_stop_token_in_a_tree_ends_the_answer() -> None:
    place = next(i for i in range(2, 9) if GREEDY[i] not in GREEDY[:i])
    found = answered(beside(GREEDY), stop=(GREEDY[place],))
    assert [token.token for token in found] == GREEDY[: place + 1]


def test_sampled_tokens_have_the_distribution_of_the_model() -> None:
    """Three tokens, each one of three, with two or three of them drafted at each place."""
    stub = ByLastToken(PlainExecutor(program()))

    def rule(width: int) -> Grown:
        def draft(tokens: list[int]) -> Tree:
            ranked = LAW[tokens[-1]].argsort(descending=True)[:width].tolist()
            behind = LAW[ranked[1]].argsort(descending=True)[:width].tolist()
            parents = [0] * width + [2] * width
            return Tree([*ranked, *behind], parents, [1 / width] * (2 * width))

        return Grown(draft)

    for width in (2, 3):
        seen: Counter[tuple[int, ...]] = Counter()
        second = 0
        made = Speculation(rule(width), MOST, tree=True)
        for seed in range(DRAWS):
            sampling = Sampling(temperature=HEAT, top_k=BEST, seed=seed)
            tokens = answer(stub, [FIRST], max_tokens=9, sampling=sampling, speculation=made)
            found = list(itertools.islice(tokens, 3))
            second += sum(report.accepted == 2 for token in found for report in token.reports)
            seen[tuple(token.token for token in found)] += 1
        assert second > DRAWS / 20, "the second branch is followed, and a second level of it"
        check_law(seen, 3)


def test_how_many_drafts_of_a_tree_pay() -> None:
    tree = Tree([1, 2, 3, 4], [0, 0, 1, 2], [0.75, 0.25, 1.0, 1.0])
    assert tree.chances(0.8) == pytest.approx([0.6, 0.2, 0.48, 0.16])
    assert Tree.line([5, 6, 7]).chances(0.5) == pytest.approx([0.5, 0.25, 0.125])
    assert tree.right([2, 4, 9]) == [2, 4]
    assert tree.right([2, 5]) == [2, -1]
    assert tree.right([9]) == [-1]
    assert Tree().right([1]) == []
    assert tree.first(2) == Tree([1, 2], [0, 0], [0.75, 0.25])
    seconds = [1.0, 1.2, 1.5]
    assert best_count(seconds, [0.5, 0.25]) == 1
    assert best_count([1.0, 1.1, 1.2, 1.3], [0.4, 0.05, 0.3]) == 3


# ---------------------------------------------------------------------------------- drafters


def test_a_tree_grows_where_it_is_likely() -> None:
    after = {"": [(1, 0.7, "1"), (2, 0.3, "2")], "1": [(3, 0.9, "3")], "2": [(4, 1.0, "4")]}
    found = grown("", 9, lambda place: after.get(place, []))
    assert found == Tree([1, 3, 2, 4], [0, 1, 0, 3], [0.7, 0.9, 0.3, 1.0])
    assert grown("", 2, lambda place: after.get(place, [])) == found.first(2)
    assert grown("", 9, lambda _: []) == Tree()


def test_lookup_drafts_several_continuations() -> None:
    look = Lookup()
    found = look.tree([1, 2, 5, 6, 1, 2, 7, 8, 1, 2], 4)
    assert found.tokens[:2] == [7, 5] or found.tokens[:2] == [7, 8]
    assert {(p, t) for p, t in zip(found.parents, found.tokens, strict=True) if p == 0} == {
        (0, 5),
        (0, 7),
    }
    longer = look.tree([9, 1, 2, 5, 6, 1, 2, 7, 8, 9, 1, 2], 3)
    assert longer.tokens[0] == 5, "a longer match before a later one"
    assert look.tree([1, 2, 3], 3) == look.tree([4], 3) == Tree()
    random = np.random.default_rng(0)
    for _ in range(100):
        ids = random.integers(0, 3, int(random.integers(1, 30))).tolist()
        found = look.tree(ids, 6)
        assert bool(found.tokens) == bool(look.draft(ids, 6))
        text = "".join(map(str, ids))
        if text[-2:] not in text[:-1]:
            assert found == Tree.line(look.draft(ids, 6)), "its end is new"
            continue
        for place in range(1, len(found.tokens) + 1):
            path = [found.tokens[n - 1] for n in path_to(place, found.parents)[1:]]
            assert "".join(map(str, [*ids[-2:], *path])) in text


def test_retrieval_drafts_the_most_frequent_continuations() -> None:
    pytest.importorskip("pydivsufsort")
    texts = [[1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 5, 7], [1, 2, 5, 7]]
    found = Retrieve(Datastore.of(texts, "v")).tree([9, 1, 2], 5)
    drafts = list(zip(found.parents, found.tokens, found.shares, strict=True))
    assert drafts[:3] == [(0, 5, 0.75), (1, 7, 2 / 3), (0, 3, 0.25)]
    assert sorted(drafts[3:]) == [(1, 6, 1 / 3), (3, 4, 1.0)], "both are as likely"
    assert Retrieve(Datastore.of(texts, "v")).tree([77], 5) == Tree()


def test_trees_of_heads_have_one_shape() -> None:
    drafter = Medusa()
    assert drafter.tree([1], 5) == Tree()
    shapes = set()
    for first in range(3):
        drafter.rank([[first, 5, 6, 7], [8 + first, 9, 1, 2], [1, 2, 3, 4]])
        found = drafter.tree([1], 7)
        assert found.tokens[:2] == [first, 8 + first]
        assert 5 in found.tokens
        shapes.add(tuple(found.parents))
    assert len(shapes) == 1
    drafter.rank([[3], [4]])
    assert drafter.tree([1], 7) == Tree([3, 4], [0, 1], [0.6, 0.6])


# ---------------------------------------------------------------------------------- sessions


def test_clients_of_services_draft_trees(tmp_path: Path) -> None:
    folder = characters.save(tmp_path / "bundles", speculate_up_to=MOST)
    prompt = characters.ids("abcab")
    expected = decoder.plaintext(folder, prompt, 20)

    def rule(tokens: list[int]) -> Tree:
        ahead = expected[len(tokens) - len(prompt) :][:3]
        wrong = [(token + 1) % 12 for token in ahead]
        count = len(ahead)
        parents = [*range(count), *(n and count + n for n in range(count))]
        return Tree([*wrong, *ahead], parents, [0.5] * (2 * count))

    serve = ("--tokens", "20")
    with deployment(folder, serve=serve) as services, services.connection() as connection:
        for drafter in (Grown(rule), "lookup"):
            found = list(
                connection.generate(
                    prompt, max_tokens=20, stop=(), speculate=drafter, speculate_tree=True
                )
            )
            assert [token.token for token in found] == expected
            steps = [report for token in found for report in token.reports]
            assert sum(report.tokens for report in steps[1:]) == 19
        # The next answer continues what the caches hold of this text.
        longer = [*prompt, *expected[:9], 3]
        answers = connection.generate(longer, max_tokens=4, stop=())
        assert [token.token for token in answers] == decoder.plaintext(folder, longer, 4)
        with pytest.raises(PromptError, match="speculate_tree needs speculate"):
            next(connection.generate(prompt, speculate_tree=True))
        assert connection.is_open


def _malformed(services: Any, new: int, past: int, more: bytes, tree: bool) -> str:
    """What the server says of a step with these bytes behind it, after a prompt or a tree."""
    with services.connection() as connection:
        run = connection._session.steps
        connection._session.begin(run, connection._peers.channels[0], 3, 12)
        steps = [(PROMPT, 0, LINE), *([([1, 2, 3], 3, Branches((), (0, 0)))] if tree else [])]
        for ids, cached, branches in steps:
            for channel in connection._peers.channels:
                channel.send(Kind.STEP, write_step(len(ids), cached, Draw(), branches=branches))
            run.branches = branches
            run.step(len(ids), cached, ids)
        for channel in connection._peers.channels:
            channel.send(
                Kind.STEP, write_step(new, past, Draw()) + (b"\xff" + more if more else b"")
            )
        with pytest.raises(PartyError) as refused:
            connection._peers.channels[0].receive(Kind.ROUND, limit=1 << 20)
        return str(refused.value)


def test_a_server_refuses_malformed_trees(tmp_path: Path) -> None:
    folder = decoder.save(tmp_path / "bundles", speculate_up_to=MOST)
    with deployment(folder) as services:
        for tree, new, past, more, said in (
            (False, 3, 3, b"\0\0\2", "token 2 of the tree follows token 2"),
            (False, 3, 3, b"\0\1\0", "token 1 of the tree follows token 1"),
            (False, 3, 3, b"\0\0", "has 2 parents, not 1"),
            (False, 9, 3, b"\0" * 9, "a tree of 9 tokens after 3 is not what this program checks"),
            (False, 1, 3, b"\1\0", "the last step was no tree"),
            (False, 3, 3, b"\5\0", "a step that cannot be read"),
            (True, 1, 6, b"\3\0\1\2", "tokens [0, 1, 2] of the last step are no path"),
            (True, 1, 6, b"", "the first 3 tokens of the last step are no path"),
        ):
            told = _malformed(services, new, past, more, tree)
            assert said in told
            assert "\n" not in told


@pytest.mark.slow
def test_three_processes_draft_a_tree(tmp_path: Path) -> None:
    folder = decoder.save(tmp_path, speculate_up_to=MOST)
    clear = plain()
    # The answer begins with what the last token had before it went on in two ways.
    prompt = next(
        [a, x, 1, a, x, 2, a]
        for a, x in itertools.product(range(3, 13), repeat=2)
        if int(clear.step(7, 0, [a, x, 1, a, x, 2, a]).argmax()) == x  # type: ignore[union-attr]
    )
    expected = decoder.plaintext(folder, prompt, 8)
    assert Lookup().tree([*prompt, expected[0]], 4).parents[:3].count(0) == 2
    told: dict[str, Any] = {"speculate": "lookup", "speculate_tokens": 4, "speculate_tree": True}
    result = run_local(folder, prompt, max_tokens=8, **told)
    assert result.tokens == expected
    assert result.records[1].drafted == 4
    done = CliRunner().invoke(
        app, ["generate", str(folder / "client"), "--prompt", "a", "--speculate-tree"]
    )
    assert done.exit_code != 0
    assert "Traceback" not in done.output
