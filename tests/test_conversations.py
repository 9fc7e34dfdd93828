"""Caches between answers: what a prompt continues, what it costs, and what is given up."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mergec.runtime.core.draw import Draw
from mergec.runtime.core.errors import BundleError, PartyError
from mergec.runtime.core.spec import CLIENT, DEALER, ROLES, SERVER
from mergec.runtime.engine.trees import LINE
from mergec.runtime.proxy.replies import Usage
from mergec.runtime.proxy.sessions import Sessions
from mergec.runtime.roles.inprocess import InProcessSession
from mergec.runtime.session.conversations import (
    MOST_CONVERSATIONS,
    STILL,
    Conversations,
    Place,
    common_length,
    public_source,
)
from mergec.runtime.session.generation import generate
from mergec.runtime.session.requests import Schedule, read_step, write_step
from mergec.runtime.session.steps import StepReport
from tests import decoder
from tests.services import Deployment, answered, deployment, wait_until
from tests.session import compiled, drawn_masks
from tests.test_generation import Counting

ERROR = 2e-2
"""Error of the tiny decoders' logits under MPC, with a reserve."""

SYSTEM, ASKED = [5, 1, 7, 2], [3, 12]


def plaintext(bundles: Path, prompt: list[int], count: int) -> list[int]:
    return decoder.plaintext(bundles, prompt, count)


# ------------------------------------------------------------------------------------- the choice


def test_common_length() -> None:
    for mine in itertools.chain(*(itertools.product((0, 1), repeat=n) for n in range(4))):
        for theirs in itertools.chain(*(itertools.product((0, 1), repeat=n) for n in range(4))):
            found = common_length(mine, theirs)
            assert mine[:found] == theirs[:found]
            assert mine[: found + 1] != theirs[: found + 1] or found == min(len(mine), len(theirs))


def test_every_choice_of_a_small_domain() -> None:
    """Whatever is cached, the place exists, and what it continues is the prompt's beginning."""
    texts = [list(t) for n in range(4) for t in itertools.product((1, 2), repeat=n)]
    for prompt, first, second, public in itertools.product(texts, texts, texts, ([], [1], [1, 2])):
        if not prompt:
            continue
        for most in (1, 2, 3):
            cached = dict(enumerate([first, second][:most]))
            place, common = Conversations(most).choose(prompt, cached, [public] if public else [])
            assert 0 <= place.conversation < most
            assert 0 <= common < len(prompt)
            sources = {**cached, public_source(0): public}
            assert prompt[:common] == sources.get(place.source, [])[:common]
            if place.source < 0:
                assert common == len(public) > 0
            if not common:
                assert place.source == place.conversation
            best = max(min(common_length(prompt, t), len(prompt) - 1) for t in cached.values())
            assert common >= best
            # What is dropped of the source in place is less than what is kept, or there is no room.
            if place.source == place.conversation and common and most > 1:
                assert 2 * common >= len(cached[place.source])


def test_the_conversation_that_was_used_longest_ago_gives_way() -> None:
    shelf, cached = Conversations(3), dict[int, list[int]]()
    for prompt, number in (([1, 1], 0), ([2, 2], 1), ([3, 3], 2), ([4, 4], 0), ([5, 5], 1)):
        place, common = shelf.choose(prompt, cached)
        assert (place, common) == (Place(number, number), 0)
        cached[number] = prompt
    assert shelf.choose([3, 3, 9], cached) == (Place(2, 2), 2)  # used: now 0 is the oldest
    assert shelf.choose([6, 6], cached) == (Place(0, 0), 0)


def test_a_short_beginning_is_copied_and_a_long_one_is_continued() -> None:
    cached = {0: [1, 2, 3, 4, 5, 6], 1: [7]}
    assert Conversations(3).choose([1, 2, 9], cached) == (Place(2, 0), 2)
    assert Conversations(2).choose([1, 2, 9], cached) == (Place(1, 0), 2)  # and [7] gives way
    assert Conversations(3).choose([1, 2, 3, 9], cached) == (Place(0, 0), 3)
    assert Conversations(1).choose([1, 2, 9], {0: cached[0]}) == (Place(0, 0), 2)
    assert Conversations(3).choose(cached[0], cached) == (Place(0, 0), 5)
    assert Conversations(3).choose([1, 2, 9], cached, [[1, 2]]) == (Place(2, 0), 2)
    assert Conversations(3).choose([7, 8, 9], cached, [[7, 8]]) == (Place(2, -1), 2)
    assert Conversations(3).choose([7, 8], cached, [[7, 8]]) == (Place(1, 1), 1)


def test_bounds_of_a_number_of_conversations() -> None:
    for most, length in ((-1, 1), (0, 1), (1, 1), (1 << 40, MOST_CONVERSATIONS)):
        assert len(Conversations(most)._numbers) == length


@pytest.mark.parametrize(
    "place", [(-1, 0), (MOST_CONVERSATIONS, 0), (0, MOST_CONVERSATIONS), (0, -33), (1 << 62, 0)]
)
def test_places_out_of_bounds(place: tuple[int, int]) -> None:
    with pytest.raises(PartyError, match="requests caches"):
        read_step(write_step(1, 0, Draw(), Place(*place)), "client")
    step = 2, 1, Draw(), Place(3, -32), 1
    assert read_step(write_step(*step), "client") == (*step, LINE)


def test_a_store_has_one_conversation() -> None:
    schedule = Schedule([(3, 0), (1, 3)])
    schedule.check(3, 0, Draw(), "client", STILL)
    with pytest.raises(PartyError, match="but the store holds"):
        schedule.check(1, 3, Draw(), "client", Place(1, 0))


# ---------------------------------------------------------------------------------- three threads


@pytest.mark.parametrize("options", [{}, {"preset": "merge-mm"}], ids=["masked", "sent"])
def test_conversations_do_not_touch_each_other(options: dict[str, Any]) -> None:
    """A conversation that is continued in two ways, rolled back, and resumed, three times over."""
    roles = compiled("gpt2", **options)[1].roles

    def fresh(*fed: list[int]) -> torch.Tensor:
        with InProcessSession(roles) as session:
            past = 0
            for ids in fed:
                last = session.step(ids, past)
                past += len(ids)
        return last

    with InProcessSession(roles) as session:
        server, client = (session._sessions[party] for party in (SERVER, CLIENT))
        session.step([5, 1, 7, 2], 0)
        session.turn_to(Place(1, 0))
        forked = session.step([3], 3)
        session.turn_to(Place(2, 2))
        session.step([9, 9], 0)
        session.turn_to(Place(0, 0))
        before = {n: c.opened.clone() for n, c in server._caches.items()}
        resumed = session.step([4, 6], 4)
        for name, cache in server._caches.items():
            assert torch.equal(cache.opened[..., :4, :], before[name])
        session.step([8, 8, 8], 2)  # over rows that conversation 1 has a copy of
        session.turn_to(Place(1, 1))
        onward = session.step([6], 4)
        session.turn_to(Place(3, 1))
        session.step([1], 5)
        kept = client.cached_tokens()
    assert float((forked - fresh([5, 1, 7, 3])).abs().max()) < ERROR
    assert float((resumed - fresh([5, 1, 7, 2], [4, 6])).abs().max()) < ERROR
    assert float((onward - fresh([5, 1, 7, 3], [6])).abs().max()) < ERROR
    assert kept == {
        0: [5, 1, 8, 8, 8],
        1: [5, 1, 7, 3, 6],
        2: [9, 9],
        3: [5, 1, 7, 3, 6, 1],
    }


def test_a_copy_has_its_source_s_masks_and_new_rows_have_fresh_ones() -> None:
    roles = compiled("gpt2")[1].roles
    with InProcessSession(roles) as session:
        dealer, server = session._sessions[DEALER], session._sessions[SERVER]
        session.step([5, 1, 7], 0)
        before = server.traffic()
        session.turn_to(Place(1, 0))
        assert (server.traffic() - before).online == 0
        session.step([3], 3)
        one = {name: cache.mask.clone() for name, cache in dealer._caches.items()}
        session.turn_to(Place(0, 0))
        session.step([3], 3)  # the same token at the same position, in another conversation
        for name, cache in dealer._caches.items():
            assert torch.equal(cache.mask[..., :3, :], one[name][..., :3, :])
            new = cache.mask[..., 3, :].flatten().tolist()
            assert not set(new) & set(one[name][..., 3, :].flatten().tolist())


def test_places_that_a_session_cannot_turn_to() -> None:
    programs = {role: decoder.program(role) for role in ROLES}
    with InProcessSession(programs) as session:
        session.step([1, 2], 0)
        for place in (Place(0, -1), Place(1, -2)):
            with pytest.raises(BundleError, match="no caches"):
                session.turn_to(place)
        session.turn_to(Place(1, 1))
        with pytest.raises(BundleError, match="out of turn; 0 are cached"):
            session.step([1], 2)
    uncached = Counting(cached=False)
    uncached.turn_to(STILL)
    with pytest.raises(BundleError, match="no caches"):
        uncached.turn_to(Place(1, 0))


@pytest.mark.parametrize("piece", [0, 1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("cached", [0, 1, 3])
def test_a_prompt_is_fed_in_pieces(piece: int, cached: int) -> None:
    session, reports = Counting(), list[StepReport]()
    prompt = [1, 2, 3, 4, 5]
    if cached:
        session.step(cached, 0, prompt[:cached])
    found = generate(
        session, prompt, max_tokens=3, piece=piece, cached=cached, on_step=reports.append
    )
    assert found == [6, 7, 8]
    fed = [report for report in reports if report.phase == "prompt"]
    assert sum(report.new for report in fed) == 5 - cached
    assert [report.past for report in fed] == [
        cached + sum(r.new for r in fed[:n]) for n in range(len(fed))
    ]
    assert max(report.new for report in fed) == min(piece or 5, 5 - cached)
    assert len(fed) == -(-(5 - cached) // (piece or 5))
    assert session.tokens == [*prompt, 6, 7]


def test_a_piece_bounds_the_masks_that_a_step_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32 tokens in pieces of 4, a step draws about an eighth of what one step for all draws."""
    drawn = drawn_masks(monkeypatch)
    _, program = compiled("gpt2")
    prompt = list(range(1, 33))

    def words(piece: int) -> list[int]:
        counts = []
        with InProcessSession(program.roles) as parties:
            for begin in range(0, len(prompt), piece):
                drawn.clear()
                parties.step(prompt[begin : begin + piece], begin)
                counts.append(sum(map(torch.numel, drawn)))
        return counts

    (whole,), pieces = words(len(prompt)), words(4)
    assert len(pieces) == 8
    # Scores of later pieces look at more keys; all else is as large in each.
    assert pieces == sorted(pieces)
    assert 0 < max(pieces) < whole / 6


def test_pieces_of_a_program_without_caches_are_one() -> None:
    reports = list[StepReport]()
    session = Counting(cached=False)
    assert generate(session, [1, 2, 3], max_tokens=2, piece=1, on_step=reports.append) == [4, 5]
    assert [report.new for report in reports] == [3, 4]


# --------------------------------------------------------------------------------- three processes


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder.save(tmp_path_factory.mktemp("conversations"), model="tiny")


@pytest.fixture(scope="module")
def deployed(bundles: Path) -> Iterator[Deployment]:
    public = bundles / "public"
    public.write_text(json.dumps(SYSTEM))
    options = ("--timeout", "8", "--grace", "5", "--conversations", "2")
    with deployment(bundles, serve=(*options, "--public-prompt", str(public))) as made:
        yield made


def test_a_second_turn_costs_its_own_tokens(deployed: Deployment, bundles: Path) -> None:
    first = [*SYSTEM, *ASKED]
    with deployed.connection() as connection:
        said, new = answered(connection, first, 2)
        assert (said, new) == (plaintext(bundles, first, 2), [6, 1])
        second = [*first, *said, 4, 9]
        tokens = list(connection.generate(second, max_tokens=2))
        reports = [report for token in tokens for report in token.reports]
        assert [token.token for token in tokens] == plaintext(bundles, second, 2)
        # The last token of the first answer was chosen and never fed.
        assert [(r.new, r.past) for r in reports] == [(3, 7), (1, 10)]
    with InProcessSession({role: decoder.program(role) for role in ROLES}) as session:
        session.step(second[:7], 0)
        session.step(second[7:], 7)
        cost = session.record.total
    report = reports[0]
    assert (report.sent + report.received, report.rounds) == (cost.online, cost.rounds)


def test_conversations_in_turn_and_what_gives_way(deployed: Deployment, bundles: Path) -> None:
    """Two fit. A third one takes the place of the one that was used longest ago."""
    one, two, three = [5, 1, 7, 2], [9, 3, 3, 1], [12, 12]
    with deployed.connection() as connection:
        assert connection.limits["conversations"] == 2
        for prompt, new in (
            (one, 4), (two, 4), ([*one, 8], 1), ([*two, 8], 1),
            (three, 2), ([*two, 8, 8], 1), ([*one, 8, 8], 6), ([*three, 1], 3),
        ):  # fmt: skip
            said, steps = answered(connection, prompt, 1)
            assert (said, steps) == (plaintext(bundles, prompt, 1), [new]), prompt


def test_back_to_a_shared_beginning(deployed: Deployment, bundles: Path) -> None:
    with deployed.connection() as connection:
        for prompt, new in (
            ([*SYSTEM, 3, 12], 6),
            ([*SYSTEM, 9], 1),  # in place: 4 of 6 are kept
            ([*SYSTEM, 9, 1, 2, 3, 4, 5], 5),
            ([*SYSTEM, 6, 6], 2),  # 4 of 10: a copy
            ([*SYSTEM, 9, 1, 2, 3, 4, 5, 7], 1),
            ([*SYSTEM, 6, 6], 1),  # one token is always fed
        ):
            said, steps = answered(connection, prompt, 1)
            assert (said, steps) == (plaintext(bundles, prompt, 1), [new]), prompt


def test_public_text_and_conversations(deployed: Deployment, bundles: Path) -> None:
    with deployed.connection(public_prefixes=[SYSTEM]) as connection:
        for prompt, new in (
            ([*SYSTEM, 3, 12], 2), ([9, 9], 2), ([*SYSTEM, 3, 12, 1], 1), ([*SYSTEM, 8], 1),
            ([4], 1), ([*SYSTEM, 7, 7], 2),
        ):  # fmt: skip
            said, steps = answered(connection, prompt, 1)
            assert (said, steps) == (plaintext(bundles, prompt, 1), [new]), prompt


def test_an_answer_that_is_given_up_is_continued(deployed: Deployment, bundles: Path) -> None:
    with deployed.connection() as connection:
        for _ in connection.generate([5, 1, 7], max_tokens=9):
            break
        prompt = [5, 1, 7, *plaintext(bundles, [5, 1, 7], 1), 2]
        assert answered(connection, prompt, 1) == (plaintext(bundles, prompt, 1), [2])


def test_a_cut_connection_costs_the_whole_prompt(deployed: Deployment, bundles: Path) -> None:
    connection = deployed.connection()
    with connection:
        assert answered(connection, SYSTEM, 1)[1] == [4]
        for channel in connection._peers.channels:
            channel._socket.close()
        with pytest.raises(PartyError):
            answered(connection, [*SYSTEM, 3], 1)
        assert not connection.is_open
        assert connection.cached([*SYSTEM, 3]) == 0
        assert answered(connection, [*SYSTEM, 3], 1) == (plaintext(bundles, [*SYSTEM, 3], 1), [5])


def test_a_client_may_leave_caches_alone(deployed: Deployment, bundles: Path) -> None:
    with deployed.connection(reuse=False) as connection:
        for _ in range(3):
            assert answered(connection, SYSTEM, 1) == (plaintext(bundles, SYSTEM, 1), [4])
        assert connection.cached(SYSTEM) == 0


def test_a_fixed_length_stays_fixed(deployed: Deployment, bundles: Path) -> None:
    with deployed.connection() as connection:
        tokens = list(connection.generate(SYSTEM, max_tokens=3, fixed_length=True))
        prompt = [*SYSTEM, *(t.token for t in tokens), 1]
        assert answered(connection, prompt, 1) == (plaintext(bundles, prompt, 1), [4])


def test_pieces_at_a_server(deployed: Deployment, bundles: Path) -> None:
    prompt = [*SYSTEM, *ASKED, 1]
    with deployed.connection(prompt_piece=3) as connection:
        assert answered(connection, prompt, 2) == (plaintext(bundles, prompt, 2), [3, 3, 1, 1])


def test_a_client_that_asks_for_too_many_conversations(deployed: Deployment) -> None:
    connection = deployed.connection()
    connection.open()
    connection._place = lambda *_: (Place(2, 2), 0)  # type: ignore[method-assign]
    with pytest.raises(PartyError, match="more than 2 conversations"):
        answered(connection, [1], 1)


def test_requests_go_where_most_of_them_is_cached(deployed: Deployment, bundles: Path) -> None:
    wait_until(lambda: not deployed.server.workers)
    with deployed.connection() as first, deployed.connection() as second:
        answered(second, SYSTEM, 1)
        assert (first.cached([*SYSTEM, 1]), second.cached([*SYSTEM, 1])) == (0, 4)
        assert first.cached([]) == 0
        pool = Sessions.__new__(Sessions)
        pool._idle = [first, second]
        assert pool._free([*SYSTEM, 1]) is second
        assert pool._free([*SYSTEM, 1]) is first


def test_usage_says_what_was_cached() -> None:
    told = Usage(7, 2, 5).json()
    assert told["prompt_tokens_details"] == {"cached_tokens": 5}
    assert told["total_tokens"] == 9
