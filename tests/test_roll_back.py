"""Steps that name a past shorter than what is cached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergec.runtime.core.draw import Draw
from mergec.runtime.core.errors import BundleError, PartyError
from mergec.runtime.core.spec import DEALER, ROLES
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.roles.inprocess import InProcessSession
from mergec.runtime.session.plain import PlainSession
from mergec.runtime.session.requests import Schedule, write_step
from mergec.runtime.transport.frames import Kind
from tests import decoder, session
from tests.services import deployment

ERROR = 2e-2
"""Error of the tiny decoders' logits under MPC, with a reserve."""

STEPS = [([5, 1, 7], 0), ([2, 3, 9], 3), ([4], 4), ([8, 8], 5), ([6, 1, 2, 3], 1), ([1], 5)]
KEPT = [5, 6, 1, 2, 3, 1]
"""The tokens whose entries the caches hold after these steps."""


def straight(plain: PlainExecutor) -> torch.Tensor:
    """Logits after the kept tokens, from a session that never took another one."""
    run = PlainSession(plain)
    run.step(1, 0, KEPT[:1])
    run.step(4, 1, KEPT[1:5])
    last = run.step(1, 5, KEPT[5:])
    assert last is not None
    return last


def test_a_session_in_the_clear_forgets_exactly_what_it_drops() -> None:
    plain = PlainExecutor(decoder.program())
    run = PlainSession(plain)
    for ids, past in STEPS:
        last = run.step(len(ids), past, ids)
        assert run.length == past + len(ids)
    assert torch.equal(last, straight(plain))  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"preset": "merge-mm"}], ids=["masked", "sent"])
def test_the_parties_forget_what_they_drop(options: dict[str, Any]) -> None:
    _, program = session.compiled("gpt2", **options)
    roles = program.roles
    forms = {spec.form for spec in roles["client"].inputs if spec.cache_output}
    assert forms >= ({"sent"} if options else {"masked"})
    with InProcessSession(roles) as parties:
        for ids, past in STEPS:
            last = parties.step(ids, past)
    expected = straight(PlainExecutor(roles["server"]))
    assert float((last - expected).abs().max()) < ERROR


def test_no_mask_returns_after_a_roll_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each word that hides an entry of a position is another one each time, as are all masks."""
    drawn = session.drawn_masks(monkeypatch)
    _, program = session.compiled("gpt2")
    with InProcessSession(program.roles) as parties:
        dealer, server = parties._sessions[DEALER], parties._sessions[1]
        parties.step([5, 1, 7], 0)
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        for _ in range(3):
            parties.step([2, 3], 3)  # the same tokens, at the same positions
            for name, cache in dealer._caches.items():
                opened = server._caches[name].opened[..., 3:, :].clone()
                seen.append((cache.mask[..., 3:, :].clone(), opened))
                assert cache.shape[-2] == 5
    masks, opened = (torch.cat([x.reshape(-1) for x in part]) for part in zip(*seen, strict=True))
    assert len(masks.unique()) == len(masks)
    assert len(opened.unique()) == len(opened)
    words = torch.cat(drawn)
    assert len(words) > 1000
    assert len(words.unique()) == len(words)
    assert set(masks.tolist()) <= set(words.tolist())


def test_roll_backs_cost_what_their_lengths_say() -> None:
    """A step costs the same whether it follows a longer cache or not: the client can check it."""
    roles = session.compiled("gpt2")[1].roles
    with InProcessSession(roles) as parties:
        parties.step([5, 1, 7], 0)
        parties.step([2], 3)
        plain = parties.record.total
        parties.step([2], 3)
        assert parties.record.total == plain


def test_a_past_that_is_not_cached_is_refused() -> None:
    roles = session.compiled("gpt2")[1].roles
    assert set(roles) == set(ROLES)
    run = PlainSession(PlainExecutor(roles["server"]))
    run.step(3, 0, [1, 2, 3])
    for new, past in ((1, 4), (1, -1), (0, 2), (-1, 2)):
        assert not run.allows(new, past)
        with pytest.raises(BundleError, match="out of turn; 3 are cached"):
            run.step(new, past, [1])
    assert run.allows(1, 3)
    assert run.allows(2, 1)


def test_a_resending_program_cannot_roll_back() -> None:
    _, program = session.compiled("gpt2", preset="merge-er")
    run = PlainSession(PlainExecutor(program.roles["server"]))
    run.step(3, 0, [1, 2, 3])
    run.step(1, 3, [1, 2, 3])
    assert run.allows(1, 4)
    assert not run.allows(1, 3)


def test_a_store_allows_the_roll_backs_of_its_plan_and_no_other() -> None:
    greedy = Draw()
    schedule = Schedule([(3, 0), (2, 3), (2, 4)])
    for step in ((3, 0), (2, 3), (2, 4)):
        schedule.check(*step, greedy, "client")
    schedule = Schedule([(3, 0), (2, 3), (2, 5)])
    schedule.check(3, 0, greedy, "client")
    schedule.check(2, 3, greedy, "client")
    with pytest.raises(PartyError, match="requests 2 tokens after 4, but the store holds"):
        schedule.check(2, 4, greedy, "client")


def _asked(connection: Any, new: list[int], past: int) -> Any:
    """A step that the client requests of both services without looking whether it may."""
    for channel in connection._peers.channels:
        channel.send(Kind.STEP, write_step(len(new), past, Draw()))
    return connection._session.steps.step(len(new), past, new)


def test_services_roll_back_and_refuse_what_is_not_cached(tmp_path: Path) -> None:
    folder = decoder.save(tmp_path / "bundles")
    expected = straight(PlainExecutor(decoder.program()))
    with deployment(folder) as services:
        with services.connection() as connection:
            session, channel = connection._session.steps, connection._peers.channels[0]
            connection._session.begin(session, channel, 3, 12)
            for ids, past in STEPS:
                last = _asked(connection, ids, past)
            assert float((last - expected).abs().max()) < ERROR
            with pytest.raises(BundleError, match="7 tokens after 7 is out of turn"):
                session.step(7, 7, [1] * 7)
        with services.connection() as connection:
            connection._session.begin(
                connection._session.steps, connection._peers.channels[0], 3, 12
            )
            _asked(connection, [5, 1, 7], 0)
            connection._session.steps.length = 9  # a client that does not keep to what is cached
            for channel in connection._peers.channels:
                channel.send(Kind.STEP, write_step(1, 4, Draw()))
            with pytest.raises(PartyError, match="asks for 1 tokens after 4, out of turn"):
                connection._peers.channels[0].receive(Kind.ROUND, limit=1 << 20)
        with services.connection() as connection:
            connection._session.begin(
                connection._session.steps, connection._peers.channels[0], 3, 1
            )
            _asked(connection, [5, 1, 7], 0)
            _asked(connection, [2], 1)
            with pytest.raises(PartyError, match="asks for 5 tokens in an answer of 4"):
                _asked(connection, [2], 1)
