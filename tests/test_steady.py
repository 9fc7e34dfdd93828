"""Steps that look alike, whatever drafts are right: lengths, answers, stored randomness."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mergec.runtime.cli import app
from mergec.runtime.core.draw import Draw
from mergec.runtime.core.errors import BundleError, PartyError, PromptError
from mergec.runtime.engine.audit import audit
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.program.manifest import Manifest
from mergec.runtime.roles.local import run_local
from mergec.runtime.session.drafting import Drafter, Speculation
from mergec.runtime.session.drafting.lookup import Lookup
from mergec.runtime.session.drafting.recycle import Recycle
from mergec.runtime.session.drafting.steady import Steady, Stride
from mergec.runtime.session.generation import Token, answer
from mergec.runtime.session.plain import PlainSession
from mergec.runtime.session.requests import Plan, write_step
from mergec.runtime.session.sampling import Sampling
from mergec.runtime.session.stores.format import HEADER, read_header
from mergec.runtime.session.stores.reader import Store
from mergec.runtime.transport.frames import Kind
from tests import characters, decoder, session
from tests.sampled import BEST, DRAWS, FIRST, HEAT, LAW, ByLastToken, check_law
from tests.services import Deployment, deployment
from tests.test_speculation import MOST, PROMPT, Fixed, plain

COUNT = 12
PACES = (1, 1.5, 2, 2.75, 1 + MOST)
KEY = b"\0" * 32

Steps = list[tuple[int, int]]


def run(
    drafter: Drafter,
    fixed: float,
    tokens: int | None = None,
    extra: int | None = None,
    **options: Any,
) -> list[Token]:
    made = Speculation(drafter, tokens, fixed=fixed, extra=extra)
    given = {"max_tokens": COUNT, **options}
    return list(answer(plain(), PROMPT, speculation=made, **given))


def oracle(right: Sequence[int], every: int = 99) -> Fixed:
    """Drafts a known answer, with a mistake at each place that `every` divides."""

    def rule(tokens: list[int]) -> list[int]:
        at = len(tokens) - len(PROMPT)
        places = enumerate(right[at:], at)
        return [(token + (place % every == every - 1)) % 13 for place, token in places]

    return Fixed(rule)


def numbers(found: Sequence[Token]) -> list[int]:
    return [token.token for token in found]


LONG = numbers(list(answer(plain(), PROMPT, max_tokens=13)))
GREEDY = LONG[:COUNT]
WRONG = Fixed(lambda _: [])


def kept(steps: Steps) -> tuple[Steps, int]:
    """An answer's steps without extra ones, and the number of these."""
    pairs = itertools.zip_longest(steps, steps[1:])
    due = [step for step, following in pairs if following is None or following[1] != step[1]]
    return due, len(steps) - len(due)


# --------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize("drafts", [1, 2, 3, 7])
def test_strides_keep_what_is_due(drafts: int) -> None:
    for pace in (*range(100, 100 * (1 + drafts), 37), 100 * (1 + drafts)):
        for begin, length in itertools.product((0, 1, 5), range(14)):
            strides = list(Steady(drafts, pace).strides(begin, begin + length))
            assert sum(stride.move for stride in strides) == length
            past = begin
            for number, stride in enumerate(strides, 1):
                assert stride.past == past
                past += stride.move
                assert past == min(begin + number * pace // 100, begin + length)
                # All that is kept is in the step, and no step goes beyond the end.
                assert 1 <= stride.move <= stride.new <= 1 + drafts
                assert stride.new == min(1 + drafts, begin + length - stride.past)
                assert stride.steps[-1] == (stride.new, stride.past)
                assert stride.steps[:-1] == [(stride.new - 1, stride.past)] * (stride.move - 1)


@pytest.mark.parametrize("fixed", [0.99, 0, -1, 5.01, math.inf, math.nan])
def test_what_no_step_can_keep_is_refused(fixed: float) -> None:
    with pytest.raises(PromptError, match=r"with 4 drafts a step it can be 1 to 5"):
        Steady.of(fixed, 4)
    with pytest.raises(PromptError, match="it can be 1 to 5"):
        Speculation.open("lookup", None, plain().program.manifest, None, fixed=fixed)


def test_it_needs_drafts() -> None:
    manifest = plain().program.manifest
    with pytest.raises(PromptError, match="speculate_fixed needs speculate"):
        Speculation.open("none", None, manifest, None, fixed=2)
    with pytest.raises(PromptError, match="compile with speculate_up_to"):
        Speculation.open("lookup", None, replace(manifest, speculate_up_to=0), None, fixed=2)
    with pytest.raises(PromptError, match="with 2 drafts a step it can be 1 to 3"):
        Speculation.open("lookup", 2, manifest, None, fixed=4)
    with pytest.raises(PromptError, match="speculate_extra needs speculate"):
        Speculation.open("none", None, manifest, None, extra=2)
    with pytest.raises(PromptError, match="bounds the extra steps of speculate_fixed; give both"):
        Speculation.open("lookup", None, manifest, None, extra=2)
    with pytest.raises(PromptError, match="speculate_extra is -1"):
        Speculation.open("lookup", None, manifest, None, fixed=2, extra=-1)
    assert Steady.of(1.5, 4) == Steady(4, 150)
    assert Steady(4, 150).fixed == 1.5


# --------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("fixed", PACES)
@pytest.mark.parametrize("every", [1, 2, 3, 5, 99])
def test_answers_are_those_without_drafts(fixed: float, every: int) -> None:
    for most in (None, max(1, math.ceil(fixed) - 1)):
        steps: Steps = []
        found = run(oracle(LONG, every), fixed, most, announce=lambda *s, to=steps: to.append(s))
        assert numbers(found) == GREEDY
        drafts = MOST if most is None else most
        strides = Steady.of(fixed, drafts).strides(len(PROMPT), len(PROMPT) + COUNT - 1)
        due, extra = kept(steps[1:])
        assert due == [(stride.new, stride.past) for stride in strides][: len(due)]
        planned = [step for s in Steady.of(fixed, drafts).strides(3, 14) for step in s.steps]
        rest = iter(planned)
        assert all(step in rest for step in steps[1:]), "a plan has all extra steps"
        if fixed == 1:
            assert not extra
        reports = [report for token in found for report in token.reports]
        assert sum(report.tokens for report in reports[1:]) == COUNT - 1
        assert all(report.phase == "decode" for report in reports[1:])
        assert all(r.repeated + 1 + r.drafted >= r.new for r in reports[1:])


def test_right_drafts_give_as_many_tokens_a_step_as_are_kept() -> None:
    for fixed, extra in ((1, 0), (1.5, 0), (2, 1), (3, 1)):
        steps: Steps = []
        run(oracle(LONG), fixed, announce=lambda *s, to=steps: to.append(s), fixed_length=True)
        due, found = kept(steps[1:])
        assert len(due) == math.ceil((COUNT - 1) / fixed)
        assert found == extra, "only at the beginning, where nothing is known ahead"


def test_wrong_drafts_never_take_more_steps_than_none() -> None:
    for fixed in PACES:
        steps: Steps = []
        assert numbers(run(WRONG, fixed, announce=lambda *s, to=steps: to.append(s))) == GREEDY
        assert len(steps) <= COUNT


def traces(fixed: float, extra: int | None, count: int) -> set[tuple[tuple[int, int], ...]]:
    """The steps of an answer of `count` tokens, for all ways in which its drafts can be right."""
    seen = set()
    for wrong in itertools.product((0, 1), repeat=count - 1):
        # The first token comes of the prompt's step, without drafts.
        drafts = [(t + bad) % 13 for t, bad in zip(LONG, (0, *wrong), strict=False)]
        steps: Steps = []
        found = run(
            Fixed(lambda tokens, to=drafts: to[len(tokens) - len(PROMPT) :]),
            fixed, extra=extra, max_tokens=count, fixed_length=True,
            announce=lambda *s, to=steps: to.append(s),
        )  # fmt: skip
        assert numbers(found) == GREEDY[:count]
        seen.add(tuple(steps[1:]))
    return seen


@pytest.mark.parametrize("fixed", [1.5, 2, 3])
def test_a_bound_of_extra_steps_bounds_what_lengths_tell(fixed: float) -> None:
    """How many different lengths the steps of all answers of seven tokens have."""
    count, end = 7, len(PROMPT) + 6
    strides = list(Steady.of(fixed, MOST).strides(len(PROMPT), end))
    planned = [step for stride in strides for step in stride.steps]
    without, told = traces(fixed, None, count), []
    for extra in range(count):
        found = traces(fixed, extra, count)
        for steps in found:
            assert kept(list(steps))[1] <= extra
            rest = iter(planned)
            single = list(itertools.dropwhile(lambda step, of=rest: step in of, steps))
            assert single == [(1, past) for past in range(end - len(single), end)]
        # So many extra steps, or fewer, and one place more, where steps of one token begin.
        places = len(strides)
        ways = sum(math.comb(places + j - 1, j) for j in range(extra + 2))
        assert len(found) <= ways <= (places + 1) ** (extra + 1)
        told.append(len(found))
    assert told[0] < told[-1] == len(without)
    assert found == without, "no answer needs more extra steps than it has tokens"


def test_without_extra_steps_wrong_drafts_are_given_up() -> None:
    steps: Steps = []
    found = run(WRONG, 2, extra=0, announce=lambda *s: steps.append(s))
    assert numbers(found) == GREEDY
    assert steps[1:] == [(1, past) for past in range(len(PROMPT), len(PROMPT) + COUNT - 1)]
    # Right drafts need the one at the beginning.
    told: list[Steps] = [[], []]
    for extra, to in zip((None, 1), told, strict=True):
        run(oracle(LONG), 2, extra=extra, announce=lambda *s, to=to: to.append(s))
    assert told[0] == told[1]


@pytest.mark.parametrize("fixed", [1.5, 3])
def test_seeded_answers_are_those_without_drafts(fixed: float) -> None:
    for sampling in (
        Sampling(temperature=1.5, seed=8),
        Sampling(2.0, 5, 0.9, 9),
        Sampling(temperature=1.0, seed=4, repetition_penalty=1.8),
    ):
        if sampling.repetition_penalty:
            pytest.importorskip("transformers")
        without = list(answer(plain(), PROMPT, max_tokens=COUNT, sampling=sampling))
        right, half = oracle(numbers(without)), oracle(numbers(without), 2)
        for drafter in (right, half, Lookup(), Recycle(), WRONG):
            found = run(drafter, fixed, sampling=sampling)
            assert numbers(found) == numbers(without)
            assert numbers(run(drafter, fixed, extra=1, sampling=sampling)) == numbers(without)
            for mine, theirs in zip(found, without, strict=True):
                assert float((mine.logits - theirs.logits).abs().max()) < 1e-4  # type: ignore[operator]


def test_sampled_tokens_have_the_distribution_of_the_model() -> None:
    """Four tokens, each one of three, in 800 answers with good drafts."""
    made = Speculation(Fixed(lambda tokens: [int(LAW[tokens[-1]].argmax())] * 3), 3, fixed=1.5)
    stub = ByLastToken(PlainExecutor(decoder.program(speculate_up_to=MOST)))
    seen: Counter[tuple[int, ...]] = Counter()
    right = 0
    for seed in range(DRAWS):
        sampling = Sampling(temperature=HEAT, top_k=BEST, seed=seed)
        found = list(answer(stub, [FIRST], max_tokens=4, sampling=sampling, speculation=made))
        right += sum(report.accepted for token in found for report in token.reports)
        seen[tuple(numbers(found))] += 1
    assert right > DRAWS / 4, "drafts were accepted"
    check_law(seen, 4)


def test_an_answer_of_fixed_length_takes_all_steps() -> None:
    at = next(i for i in range(2, 9) if GREEDY[i] not in GREEDY[:i])
    for drafter in (oracle(LONG), oracle(LONG, 3)):
        told = []
        for stop in ((), (GREEDY[at],), (GREEDY[0],)):
            steps: Steps = []
            found = run(
                drafter, 2, stop=stop, fixed_length=True,
                announce=lambda *s, to=steps: to.append(s),
            )  # fmt: skip
            length = COUNT if not stop else GREEDY.index(stop[0]) + 1
            assert numbers(found) == GREEDY[:length]
            told.append(steps)
        assert told[0] == told[1] == told[2]
        assert len(kept(told[0])[0]) == 1 + math.ceil((COUNT - 1) / 2)
    steps = []
    run(oracle(LONG), 2, stop=(GREEDY[at],), announce=lambda *s: steps.append(s))
    assert len(steps) < len(told[0])


def test_a_bundle_that_gives_one_result_is_refused() -> None:
    lying = plain(speculate_up_to=0)
    lying.program.manifest = replace(lying.program.manifest, speculate_up_to=3)
    with pytest.raises(BundleError, match="does not check drafts"):
        list(answer(lying, PROMPT, max_tokens=9, speculation=Speculation(WRONG, 3, fixed=2)))


def test_programs_that_reveal_tokens() -> None:
    _, program = session.compiled("llama", speculate_up_to=MOST, reveal="token")
    clear = PlainSession(PlainExecutor(program.roles["server"]))
    expected = numbers(list(answer(clear, PROMPT, max_tokens=7)))
    found = list(
        answer(clear, PROMPT, max_tokens=7, speculation=Speculation(oracle(expected, 3), fixed=2))
    )
    assert numbers(found) == expected
    assert all(token.logits is None for token in found)


# ----------------------------------------------------------------------------------- three roles


def test_clients_of_services(tmp_path: Path) -> None:
    folder = characters.save(tmp_path / "bundles", speculate_up_to=MOST)
    prompt = characters.ids("abcab")
    expected = decoder.plaintext(folder, prompt, 20)
    right = Fixed(lambda tokens: expected[len(tokens) - len(prompt) :])
    options: dict[str, Any] = {"max_tokens": 20, "stop": (), "speculate_fixed": 2}
    with deployment(folder, serve=("--tokens", "20")) as services:
        with pytest.raises(PromptError, match="it can be 1 to 5"):
            services.connection().speculation("lookup", None, 6)
        with services.connection() as connection:
            for drafter in (right, "lookup"):
                found = list(connection.generate(prompt, speculate=drafter, **options))
                assert numbers(found) == expected
                steps = [report for token in found for report in token.reports]
                # No later prompt says how many drafts of the last step were right.
                tokens = connection._session.steps.tokens  # type: ignore[union-attr]
                assert tokens == [*prompt, *expected][: steps[-1].past]
            wrong = Fixed(lambda _: [])
            bound = {**options, "max_tokens": 5, "speculate_extra": 1}
            found = list(connection.generate(prompt, speculate=wrong, **bound))
            assert numbers(found) == expected[:5]
            lengths = [(r.new, r.past - len(prompt)) for t in found for r in t.reports]
            assert lengths[1:] == [(3, 0), (4, 0), (1, 2), (1, 3)]
            longer = [*prompt, *expected[:12], 3]
            found = list(connection.generate(longer, max_tokens=4, stop=(), speculate="none"))
            assert numbers(found) == decoder.plaintext(folder, longer, 4)
            assert found[0].reports[0].past == len(longer) - 1
            many = {**options, "speculate_fixed": 4, "speculate_tokens": 2}
            with pytest.raises(PromptError, match="it can be 1 to 3"):
                next(connection.generate(prompt, speculate=right, **many))
            assert connection.is_open


@pytest.mark.slow
def test_three_processes(tmp_path: Path) -> None:
    folder = decoder.save(tmp_path, speculate_up_to=MOST)
    result = run_local(folder, PROMPT, max_tokens=COUNT, speculate="lookup", speculate_fixed=1.5)
    assert result.tokens == GREEDY
    assert sum(record.tokens for record in result.records[1:]) == COUNT - 1
    with pytest.raises(PromptError, match="it can be 1 to 5"):
        run_local(folder, PROMPT, max_tokens=3, speculate="lookup", speculate_fixed=9)


# --------------------------------------------------------------------------------------- storage


def reads(drafts: int = 3) -> Manifest:
    """A manifest by which plans are read."""
    return replace(plain().program.manifest, max_length=16, speculate_up_to=drafts)


def test_a_plan_has_all_extra_steps() -> None:
    plan = Plan(1, 3, 5, drafts=3, pace=200)
    steps = [(3, 0), (3, 3), (4, 3), (2, 5), (3, 5), (1, 7)]
    assert plan.steps() == steps
    assert Plan.read(plan.fields(), reads(), "client") == plan
    schedule = plan.schedule()
    assert schedule.end == 8
    found = [schedule.check(*step, Draw(), "client") for step in (steps[0], *steps[2:5])]
    assert found == [(0, []), (2, [(3, 3)]), (3, []), (4, [])]
    for wrong in ((3, 5), (2, 5), (1, 8), (1, 6), (4, 7)):
        with pytest.raises(PartyError, match="holds randomness for 1 tokens after 7"):
            schedule.check(*wrong, Draw(), "client")
    assert schedule.check(1, 7, Draw(), "client") == (5, [])
    with pytest.raises(PartyError, match="no further step"):
        schedule.check(1, 8, Draw(), "client")
    early = plan.schedule()
    early.check(3, 0, Draw(), "client")
    for wrong in ((3, 5), (2, 3), (1, 7)):
        with pytest.raises(PartyError, match="holds randomness for 3 tokens after 3"):
            early.check(*wrong, Draw(), "client")
    # Nothing may be left out of a plan whose steps share their streams of masks.
    single = Plan(1, 3, 2).schedule()
    with pytest.raises(PartyError, match="holds randomness for 3 tokens after 0"):
        single.check(1, 3, Draw(), "client")


@pytest.mark.parametrize(
    "wrong",
    [
        {"drafts": -1}, {"drafts": 4}, {"drafts": 0}, {"pace": 0}, {"pace": 99}, {"pace": 401},
        {"pace": 1.5}, {"drafts": None},
    ],
)  # fmt: skip
def test_plans_of_a_peer_that_cannot_be(wrong: dict[str, Any]) -> None:
    fields = {**Plan(1, 3, 5, drafts=3, pace=200).fields(), **wrong}
    with pytest.raises(PartyError, match="requests an invalid"):
        Plan.read(fields, reads(), "client")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder.save(tmp_path_factory.mktemp("steady"), speculate_up_to=MOST)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    (folder / "key").write_text(KEY.hex())
    return folder


@pytest.fixture(scope="module")
def deployed(bundles: Path, stores: Path) -> Any:
    serve = ("--stores", str(stores / "server"), "--store-key", str(stores / "key"))
    with deployment(bundles, serve=serve) as services:
        yield services


def test_stored_answers(deployed: Deployment, bundles: Path, stores: Path) -> None:
    plan = Plan(4, 3, 11, MOST, 200)
    place, _ = deployed.connection().prepare(plan, stores / "mine", KEY)
    with deployed.connection(dealer=None, store=Store.open(place, KEY)) as connection:
        options: dict[str, Any] = {"speculate_fixed": 2, "stop": ()}
        right = oracle(LONG)
        for drafter, asked in (
            (right, PROMPT),
            (oracle(LONG, 3), PROMPT),
            ("lookup", PROMPT),
            (WRONG, [*PROMPT, *GREEDY[:4]]),  # of a longer prompt, steady steps take the rest
        ):
            count = COUNT - (len(asked) - len(PROMPT))
            found = list(connection.generate(asked, max_tokens=count, speculate=drafter, **options))
            assert numbers(found) == decoder.plaintext(bundles, asked, count)
            reports = [report for token in found for report in token.reports]
            assert sum(report.tokens for report in reports) == len(asked) + count - 1
            due, extra = kept([(report.new, report.past) for report in reports])
            assert len(due) <= 1 + math.ceil((len(asked) - 3 + count - 1) / 2)
            assert extra == 1 or drafter is not right
        with pytest.raises(PromptError, match="is used up"):
            next(connection.generate(PROMPT, max_tokens=3, speculate="lookup", **options))
        assert connection.is_open
        for wrong in ({}, {"speculate": "lookup"}, {"speculate": "lookup", "speculate_fixed": 3}):
            with pytest.raises(PromptError, match="give these, with what drafts"):
                next(connection.generate(PROMPT, max_tokens=3, **wrong))
        bound = {**options, "speculate": "lookup", "speculate_extra": 1}
        with pytest.raises(PromptError, match="leave speculate_extra out, or use the dealer"):
            next(connection.generate(PROMPT, max_tokens=3, **bound))


def test_a_stored_answer_may_end_early(deployed: Deployment, stores: Path) -> None:
    place, _ = deployed.connection().prepare(Plan(2, 3, 9, MOST, 150), stores / "early", KEY)
    options: dict[str, Any] = {"speculate_fixed": 1.5, "speculate": WRONG, "stop": ()}
    with deployed.connection(dealer=None, store=Store.open(place, KEY)) as connection:
        assert numbers(list(connection.generate(PROMPT, max_tokens=3, **options))) == GREEDY[:3]
        found = list(connection.generate(PROMPT, max_tokens=10, fixed_length=True, **options))
        assert numbers(found) == GREEDY[:10]


def test_a_server_holds_a_client_to_the_plan(deployed: Deployment, stores: Path) -> None:
    place, _ = deployed.connection().prepare(Plan(3, 3, 6, 3, 200), stores / "held", KEY)
    for wrong in ((4, 4), (2, 3), (1, 3)):
        with deployed.connection(dealer=None, store=Store.open(place, KEY)) as connection:
            opened, server = connection._session.steps, connection._peers.channels[0]
            assert opened is not None
            first, schedule = connection._session.begin(opened, server, 3, 4)
            assert schedule is not None
            opened.follow(*schedule.check(first, 0, Draw(), "client")[:1], first, 0)
            server.send(Kind.STEP, write_step(first, 0, Draw()))
            opened.step(first, 0, PROMPT)
            server.send(Kind.STEP, write_step(*wrong, Draw()))
            with pytest.raises(PartyError, match="keep to the plan|out of turn"):  # noqa: RUF043
                server.receive(Kind.ROUND, limit=1 << 20)


def test_more_drafts_than_a_program_checks_are_not_prepared(deployed: Deployment) -> None:
    with pytest.raises(PromptError, match="checks up to 4 drafts a step, not 5"):
        deployed.connection().prepare(Plan(1, 3, 4, 5, 200), Path("nowhere"), KEY)


def test_the_command_prepares(deployed: Deployment, bundles: Path, stores: Path) -> None:
    given = [
        "prepare",
        str(bundles),
        "--plaintext",
        "--store",
        str(stores / "told"),
        "--prompt",
        "3",
    ]
    given += ["--tokens", "8", "--answer", "8", "--store-key", str(stores / "key")]
    given += ["--server", str(deployed.server.address), "--dealer", str(deployed.dealer.address)]
    done = CliRunner().invoke(app, [*given, "--speculate-fixed", "2", "--speculate-tokens", "3"])
    assert done.exit_code == 0, done.output
    place = next((stores / "told").iterdir())
    header = read_header(place, (place / HEADER).read_bytes())
    assert header.plan == Plan(1, 3, 8, 3, 200)
    for more, words in (
        (["--speculate-tokens", "3"], "needs --speculate-fixed"),
        (["--speculate-fixed", "6"], "it can be 1 to 5"),
    ):
        done = CliRunner().invoke(app, [*given, *more])
        assert words in str(done.exception)


def test_headers_of_single_steps_are_read(tmp_path: Path) -> None:
    fields = {
        "store": "0" * 32, "role": "client", "program": "p", "answers": 2, "prompt": 3, "tokens": 4,
        "salt": "00", "client": "", "weights": "", "format": 2,
    }  # fmt: skip
    assert read_header(tmp_path, json.dumps(fields).encode()).plan == Plan(2, 3, 4)


def test_a_stride_is_told_from_its_extra_step() -> None:
    assert Stride(4, 7, 2).extra == (3, 7)


def test_the_audit_says_what_lengths_tell() -> None:
    text = audit(decoder.program("client", speculate_up_to=MOST)).to_text()
    assert "were right, or with speculate_fixed where too few were" in " ".join(text.split())
