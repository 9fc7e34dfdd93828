"""Public blocks: computed once, combined at will, and equal to the model with their mask."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mergec.compiler.config import CompileConfig
from mergec.compiler.driver import compile_decoder
from mergec.compiler.program import Program
from mergec.runtime.cli.exits import FAILED
from mergec.runtime.core.draw import Draw
from mergec.runtime.core.errors import BundleError, MergecError, PartyError, PromptError
from mergec.runtime.core.spec import CLIENT, DEALER, ROLES, SERVER, Vis
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.engine.trees import LINE
from mergec.runtime.program.bundle import load_bundle, role_path
from mergec.runtime.program.program import Instruction, Ref
from mergec.runtime.roles.client import Connection
from mergec.runtime.roles.inprocess import InProcessSession
from mergec.runtime.roles.local import run_local
from mergec.runtime.session import public_blocks
from mergec.runtime.session.conversations import Place, block_marks, public_source
from mergec.runtime.session.public_blocks import (
    PublicTexts,
    block_of_file,
    block_tokens,
    check_combines,
    combined_caches,
    frame,
    head_forms,
    place_of,
    texts_of,
)
from mergec.runtime.session.public_text import MOST_PREFIXES, PublicText, prompt_tokens
from mergec.runtime.session.requests import read_step, write_step
from mergec.runtime.session.text import Text
from mergec.runtime.transport.address import Address
from mergec.runtime.transport.connect import Security
from mergec.runtime.transport.frames import Kind
from tests import decoder
from tests.families import random_decoder, slow
from tests.services import Deployment, answered, deployment
from tests.session import compiled
from tests.test_public_text import TEMPLATE, characters, elements

HEAD, BLOCKS, SECRET = [5, 1], [[7, 2, 9], [4], [8, 8]], [3, 12]
ORDERS = [order for n in (1, 2, 3) for order in itertools.permutations(range(3), n)]


def programs() -> dict[str, Any]:
    return {role: decoder.program(role) for role in ROLES}


# ------------------------------------------------------------------------- against the model itself


@functools.cache
def of_model(family: str) -> tuple[Any, Program]:
    """A tiny model in float64, and its program."""
    model = random_decoder(family)
    return model, compile_decoder(model, config=CompileConfig(max_length=64, logit_noise=0.0))


def by_transformers(
    model: Any, head: Sequence[int], blocks: Sequence[Sequence[int]], new: Sequence[int]
) -> torch.Tensor:
    """Logits of all tokens at once, with a mask and positions that say who sees whom."""
    parts = [*([head] if head else []), *blocks]
    ids = [token for part in parts for token in part] + list(new)
    past, total = len(ids) - len(new), len(ids)
    seen = torch.zeros(total, total, dtype=torch.bool)
    positions, begun = torch.arange(total), 0
    for part in parts:
        end = begun + len(part)
        seen[begun:end, : len(head)] = True
        seen[begun:end, begun:end] = True
        positions[begun:end] = torch.arange(len(part)) + (len(head) if begun else 0)
        begun = end
    seen[past:] = True
    if head:
        seen[: len(head), len(head) :] = False
    seen &= torch.ones_like(seen).tril()
    mask = torch.zeros(total, total, dtype=torch.float64)
    mask.masked_fill_(~seen, torch.finfo(torch.float64).min)
    with torch.no_grad():
        found = model(
            input_ids=torch.tensor([ids]),
            attention_mask=mask[None, None],
            position_ids=positions[None],
            use_cache=False,
        )
    logits: torch.Tensor = found.logits[0]
    return logits


@pytest.mark.parametrize("head", [[], [11, 60, 2]], ids=["alone", "head"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_logits_are_those_of_the_model_with_this_mask(family: str, head: list[int]) -> None:
    """Learned and rotary positions; every order and subset, two steps after each."""
    model, program = of_model(family)
    blocks, steps = [[40, 7, 13, 22], [90], [5, 5, 31]], ([17, 3, 66], [8])
    plain = PlainExecutor(program.roles["server"])
    name, (logits,) = (
        plain.program.inputs[0].name,
        set(plain.program.outputs) - {spec.cache_output for spec in plain.program.inputs},
    )
    following = {s.name: s.cache_output for s in plain.program.inputs if s.cache_output}
    # Tables of rotary embeddings and norms are computed in float32.
    error = 1e-10 if family == "gpt2" else 1e-6
    full = []
    for order in ORDERS:
        caches = combined_caches(plain, head, [blocks[n] for n in order])
        new: list[int] = []
        for step in steps:
            new += step
            outputs = plain.step({name: torch.tensor([step]), **caches})
            caches = {key: outputs[output] for key, output in following.items() if output}
            wanted = by_transformers(model, head, [blocks[n] for n in order], new)[-1]
            assert float((outputs[logits].flatten() - wanted).abs().max()) < error
        full.append(wanted)
    # It is another function than full attention, and no order of blocks is another one.
    ids = torch.tensor([[*head, *blocks[0], *blocks[1], *blocks[2], *steps[0], *steps[1]]])
    with torch.no_grad():
        usual = model(input_ids=ids).logits[0, -1]
    assert float((full[-1] - usual).abs().max()) > 1e-4
    for wanted in full[-6:]:
        assert float((wanted - full[-1]).abs().max()) < error


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_parties_logits_are_those_of_the_model(family: str) -> None:
    """In one session, which enters each block once."""
    model, program = of_model(family)
    head, blocks, new = [11, 60, 2], [[40, 7, 13, 22], [90], [5, 5, 31]], [17, 3, 66]
    with InProcessSession(program.roles, public=[head], blocks=blocks) as session:
        for order in ((0, 1, 2), (2, 0), (1,)):
            session.turn_to(place_of([0, *(1 + n for n in order)]))
            past = len(head) + sum(len(blocks[n]) for n in order)
            found = session.step(new, past)
            wanted = by_transformers(model, head, [blocks[n] for n in order], new)[-1]
            assert float((found - wanted).abs().max()) < 2e-2


# ---------------------------------------------------------------------------------- what is reused


def test_every_order_and_subset_takes_no_message_and_no_mask() -> None:
    with InProcessSession(programs()) as usual:
        setup = usual._links[CLIENT].traffic.snapshot()
    with InProcessSession(programs(), public=[HEAD], blocks=BLOCKS) as session:
        held = [session._sessions[party]._others for party in (CLIENT, SERVER, DEALER)]
        before = {
            (party, number, name): (
                cached.caches[name].opened.clone(),
                cached.caches[name].mask.clone(),
            )
            for party, others in enumerate(held)
            for number, cached in others.items()
            for name in cached.caches
            if number < 0
        }
        count = elements(decoder.program(), 2 + 3 + 1 + 2)
        link = session._links[CLIENT].traffic
        entered = link - setup
        assert (entered.received, entered.sent, entered.rounds) == (8 * count, 0, 4)
        assert all(executor.context.offline_bytes == 0 for executor in session.executors.values())
        for turn, order in enumerate(ORDERS):
            numbers = [0, *(1 + n for n in order)]
            spent = link.snapshot()
            session.turn_to(place_of(numbers, turn % 3))
            assert (link - spent).online == 0
            tokens = [token for n in order for token in BLOCKS[n]]
            for party in (CLIENT, SERVER, DEALER):
                mine = session._sessions[party]
                assert mine.length == len(HEAD) + len(tokens)
                for name, cache in mine._caches.items():
                    parts = [held[party][public_source(n)].caches[name] for n in numbers]
                    assert torch.equal(cache.mask, torch.cat([part.mask for part in parts], -2))
                    if party != DEALER:
                        opened = torch.cat([part.opened for part in parts], -2)
                        assert torch.equal(cache.opened, opened)
            session.step(SECRET, len(HEAD) + len(tokens))
            session.step([1], len(HEAD) + len(tokens) + len(SECRET))
        for (party, number, name), (opened, mask) in before.items():
            after = held[party][number].caches[name]
            assert torch.equal(after.mask, mask)
            assert opened.is_meta or torch.equal(after.opened, opened)
        masks = torch.cat(
            [mask.flatten() for (party, *_), (_, mask) in before.items() if party == SERVER]
        )
        assert masks.unique().numel() == masks.numel() == count


def test_a_step_after_blocks_costs_what_it_does_after_secret_text() -> None:
    tokens = [*HEAD, *BLOCKS[1], *BLOCKS[0]]
    with InProcessSession(programs(), public=[HEAD], blocks=BLOCKS) as session:
        session.step(tokens, 0)
        session.step(SECRET, len(tokens))
        usual = session.record.total
        session.turn_to(place_of([0, 2, 1], 1))
        session.step(SECRET, len(tokens))
        assert session.record.total == usual


def test_a_block_is_computed_once() -> None:
    program = decoder.program()
    texts = PublicTexts(program)
    texts.add_blocks([HEAD, []], BLOCKS)
    known = list(texts)
    assert len(known) == len(texts) == 1 + 2 * len(BLOCKS)
    assert texts.computed == 0 and all(name in texts for name in known)
    texts.settle()
    assert texts.computed == len(known)
    for order in ORDERS:
        for head in (HEAD, []):
            for text in texts_of(head, [BLOCKS[n] for n in order]):
                assert texts[text.digest].length == text.length
    assert texts.computed == len(known)
    assert texts._plain is None  # its weights are not needed any more
    assert "a" * 64 not in texts
    # Rows depend on the head, and not on the other blocks.
    plain = PlainExecutor(program)
    for head in (HEAD, []):
        for n, text in enumerate(t for t in texts_of(head, BLOCKS) if t.head is not None):
            (rows, *_) = texts[text.digest].rows.values()
            alone = combined_caches(plain, head, [BLOCKS[n]])["cache.k"][..., len(head) :, :]
            assert (rows / 2**16 - alone).abs().max() <= 2**-17


def test_what_is_kept_is_bounded() -> None:
    program = decoder.program()
    each = 8 * elements(program, 1)
    texts = PublicTexts(program, most=4 * each)
    texts.add_blocks([[]], [[1], [2, 3], [4, 5, 6, 7, 8, 9]])
    first, second, large = texts
    one = texts[first].rows["cache.k"]
    assert texts[first] is texts[first] and texts.computed == 1
    texts[second]
    assert (texts.computed, texts._size) == (2, 3 * each)
    texts[large]  # it alone is more than that, and still served
    assert (texts.computed, texts._size, list(texts._kept)) == (3, 6 * each, [large])
    assert torch.equal(texts[first].rows["cache.k"], one)
    assert (texts.computed, texts._size) == (4, each)
    texts[second]
    texts[first]  # used last, so it stays
    texts.add_blocks([[]], [[1, 1]])
    texts[list(texts)[-1]]
    assert list(texts._kept) == [first, list(texts)[-1]]
    texts.settle()
    assert texts._plain is not None


def test_marks_are_no_tokens_and_none_is_twice() -> None:
    marks = [mark for n in (0, 1, 31) for mark in block_marks(n, 1000)]
    assert max(marks) < 0 and len(set(marks)) == len(marks)


# --------------------------------------------------------------------------------- what is refused


FEW = (256, 8)
"""On so many rows attention is computed: on all that a tiny program takes, or on some of them."""


@pytest.mark.parametrize("few", FEW)
@pytest.mark.parametrize("family", ["bloom", *slow("gemma2", "gpt_neo")])
def test_attention_that_depends_on_the_place_is_refused(
    family: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ALiBi, and windows that are shorter than what the program takes."""
    monkeypatch.setattr(public_blocks, "_FEW", few)
    _, program = compiled(family)
    with pytest.raises(PromptError, match="depends on where a token is cached") as refused:
        InProcessSession(program.roles, blocks=[[1]])
    assert "\n" not in str(refused.value)
    InProcessSession(program.roles, public=[[1]])  # text alone is not combined


@pytest.mark.slow
@pytest.mark.parametrize("few", FEW)
def test_constant_attention_is_refused(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public_blocks, "_FEW", few)
    _, program = compiled("gpt2", preset="merge-mm")
    with pytest.raises(PromptError, match="depends on where a token is cached"):
        check_combines(PlainExecutor(program.roles["server"]))


@pytest.mark.parametrize("few", FEW)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_others_are_not(family: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public_blocks, "_FEW", few)
    check_combines(PlainExecutor(of_model(family)[1].roles["server"]))
    for options in ({"preset": "mpcformer-2quad"}, {"network": "wan"}):
        _, program = compiled("gpt2", **options)
        check_combines(PlainExecutor(program.roles["server"]))


@pytest.mark.slow
@pytest.mark.parametrize("few", FEW)
def test_a_window_by_one_is_noticed(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public_blocks, "_FEW", few)
    model = random_decoder("mistral", sliding_window=16).float()
    for length, refused in ((16, False), (17, True)):
        program = compile_decoder(model, config=CompileConfig(max_length=length))
        plain = PlainExecutor(program.roles["server"])
        if refused:
            with pytest.raises(PromptError, match="sliding window"):
                check_combines(plain)
        else:
            check_combines(plain)


LONG = 1 << 20


def long_program(**replaced: Sequence[tuple[str, str, tuple[Any, ...]]]) -> PlainExecutor:
    """The handwritten decoder for a long text.

    replaced: public instructions before one of this name; that then reads the last one in place of
    its first argument, or of its mask.
    """
    program = decoder.program(max_length=LONG)
    found: list[Instruction] = []
    for item in program.instructions:
        for name, target, given in replaced.get(item.name, ()):
            found.append(Instruction(name, target, given, {}, Vis.PUBLIC, 0))
        if item.name in replaced:
            place = 3 if item.name == "mixed" else 0
            args = [*item.args]
            args[place] = Ref(found[-1].name)
            item = replace(item, args=tuple(args))
        found.append(item)
    program.instructions = found
    return PlainExecutor(program)


@pytest.mark.parametrize("kept", [LONG - 1, LONG, 300])
def test_a_window_of_a_long_text_is_noticed(kept: int) -> None:
    """A token that sees those less than `kept` before it: all of the longest text, or but one."""
    mask = [
        ("low", "aten.sub.Tensor", (Ref("rows"), kept)),
        ("near", "aten.gt.Tensor", (Ref("cols"), Ref("low"))),
        ("both", "aten.logical_and.default", (Ref("seen"), Ref("near"))),
    ]
    plain = long_program(mask=mask)
    if kept == LONG:
        check_combines(plain)
    else:
        with pytest.raises(PromptError, match="sliding window"):
            check_combines(plain)


def test_slopes_and_lengths_that_bend_are_noticed() -> None:
    slope = [
        ("away", "aten.sub.Tensor", (Ref("rows"), Ref("cols"))),
        ("far", "aten.gt.Scalar", (Ref("away"), 5000)),
        ("bent", "aten.where.ScalarOther", (Ref("far"), Ref("zero"), 0.5)),
        ("sum", "aten.add.Tensor", (Ref("mask"), Ref("bent"))),
    ]
    with pytest.raises(PromptError, match="depends on where a token is cached"):
        check_combines(long_program(mixed=slope))
    cut = [
        ("kept", "sym.min", (Ref("total"), 70_000)),
        ("shape", "aten.zeros.default", ([1, Ref("kept")],)),
    ]
    with pytest.raises(PromptError, match="depends on where a token is cached"):
        check_combines(long_program(mixed=cut))


class Largest(TorchDispatchMode):
    """The most bytes of memory of a tensor that a function returns."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


def test_a_long_text_takes_no_caches_of_its_length() -> None:
    plain = long_program()
    with Largest() as seen:
        check_combines(plain)
    assert seen.bytes == 8 * LONG, "positions, and masks, one for each token"
    assert seen.bytes < 4 * LONG * decoder.WIDTH, "a cache would have more"


def test_texts_that_a_session_cannot_have() -> None:
    with pytest.raises(PromptError, match="33 public texts are more than the 32"):
        texts_of([1], [[n] for n in range(MOST_PREFIXES)])
    with pytest.raises(PromptError, match="two public blocks are the same"):
        texts_of([1], [[2], [3], [2]])
    texts = PublicTexts(decoder.program())
    for tokens, words in (
        ([], "is empty"),
        ([decoder.VOCAB], "not in the vocabulary"),
        ([1] * (decoder.LENGTH - 2), "leaves no room"),
    ):
        with pytest.raises(PromptError, match=words):
            texts.add(PublicText(len(tokens), tokens=tokens, head=HEAD))
    with pytest.raises(PromptError, match="needs the weights"):
        PublicTexts(decoder.program("client"))


def test_names_differ() -> None:
    pairs = [([], [1]), ([1], [1]), ([1], [1, 1]), ([1, 1], [1]), ([], [1, 1]), ([2], [1])]
    names = [PublicText(len(b), tokens=b, head=h).digest for h, b in pairs]
    names += [PublicText(len(b), tokens=b).digest for b in ([1], [1, 1], [2])]
    assert len(set(names)) == len(names)


def test_steps_that_name_blocks() -> None:
    place = Place(3, -1, (4, 2))
    step = 2, 6, Draw(), place, 1
    assert read_step(write_step(*step), "client") == (*step, LINE)
    for bad in (Place(0, 0, (1,)), Place(0, -1, (0,)), Place(0, -1, (2, 2)), Place(0, -2, (1, 3))):
        with pytest.raises(PartyError, match="joins blocks"):
            read_step(write_step(2, 6, Draw(), bad), "client")
    with pytest.raises(PartyError, match="cannot be read"):
        read_step(write_step(2, 6, Draw(), Place(0, -1, (1,) * 33)), "client")
    with pytest.raises(PartyError, match="cannot be read"):
        read_step(write_step(*step)[:55], "client")


def test_blocks_that_are_not_there() -> None:
    with InProcessSession(programs(), public=[HEAD], blocks=BLOCKS) as session:
        for place in (Place(0, -1, (4,)), Place(0, -5, (1,)), Place(1, -1, (1, 31))):
            with pytest.raises(BundleError, match="there are no caches"):
                session.turn_to(place)
        assert session._sessions[SERVER].length == 0
        session.turn_to(Place(0, -1, (1, 3)))
        assert session._sessions[CLIENT].tokens == [*HEAD, *block_marks(1, 3), *block_marks(3, 2)]


def test_blocks_that_leave_no_room_are_not_copied() -> None:
    long = [[token] * (decoder.LENGTH // 2) for token in (1, 2)]
    with InProcessSession(programs(), public=[HEAD], blocks=long) as session:
        held = session._sessions[SERVER]._others.keys()
        before = set(held)
        with pytest.raises(BundleError, match="leave no room for a step"):
            session.turn_to(Place(1, -1, (1, 2)))
        assert set(held) - before <= {0} and session._sessions[SERVER].length == 0


# ------------------------------------------------------------------------------------------- texts


def test_blocks_continue_the_system_message() -> None:
    text = Text(characters(), {}, TEMPLATE)
    head, rest = frame(text, "a", True, "c")
    assert (head, rest) == (text.encode_part("<s>c"), text.encode_part("\n<u>a\n"))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert frame(text, messages, True, "c")[0] == head
    assert frame(text, "b", True, "c")[0] == head
    assert frame(text, "a", True)[0] == text.encode_part("<s>")
    assert frame(text, "ca", False, "b.") == (text.encode("b."), text.encode("ca"))
    assert frame(text, "a", False) == ([], text.encode("a"))
    # Tokens that would merge across the border of a block do not.
    assert block_tokens(text, ".") + block_tokens(text, ".") != text.encode("..")
    for template in ("{{ messages[-1].content }}", "{{ messages[0].content }}" * 2):
        with pytest.raises(PromptError, match="has no one place for a system message"):
            frame(Text(characters(), {}, template), "a", True)
    with pytest.raises(PromptError, match="is empty"):
        block_tokens(text, " \n")


@pytest.mark.parametrize("chat", [True, False])
def test_a_connection_encodes_what_it_combines(tmp_path: Path, chat: bool) -> None:
    bundles = decoder.save(tmp_path / "bundles", vocab_size=64, max_length=64)
    (tmp_path / "given").mkdir()
    characters().save(str(tmp_path / "given" / "tokenizer.json"))
    (tmp_path / "given" / "chat_template.jinja").write_text(TEMPLATE)
    nowhere, plain = Address("127.0.0.1", 1), Security("client", None, plaintext=True)
    connection = Connection(
        bundles / "client",
        server=nowhere,
        dealer=nowhere,
        security=plain,
        tokenizer=tmp_path / "given",
        public_prefixes=["ca"],
        public_blocks=["b.", ".c"],
        public_chat=chat,
    )
    text = Text.given(tmp_path / "given")
    head, rest = frame(text, "b", chat, "ca")
    one, two = text.encode_part("b."), text.encode_part(".c")
    for numbers, blocks in ((None, one + two), ([1, 0], two + one), ([1], two)):
        ids = connection.encode("b", blocks=numbers)
        assert ids == [*head, *blocks, *rest]
        chosen = [1, 2] if numbers is None else [1 + n for n in numbers]
        assert connection._prompts.combined(ids, numbers) == [0, *chosen]
    assert connection.encode("b", chat, "ca", blocks=[]) == prompt_tokens(text, "b", chat, "ca")
    if not chat:
        return
    messages = [{"role": "system", "content": "ca"}, {"role": "user", "content": "b"}]
    for said in (messages, messages[1:]):
        assert connection.encode_chat(said) == [*head, *one, *two, *rest]
    assert connection.encode_chat(messages, blocks=[]) == text.encode_chat(messages)
    other = [{"role": "system", "content": "cb"}, *messages[1:]]
    with pytest.raises(PromptError, match="leave yours out"):
        connection.encode_chat(other)
    assert connection.encode_chat(other, blocks=[]) == text.encode_chat(other)


def test_files(tmp_path: Path) -> None:
    text, file = Text(characters(), {}, TEMPLATE), tmp_path / "block"
    assert head_forms(None, text) == [frame(text, "a", True)[0], [], []]
    assert head_forms(None, None) == [[]]
    file.write_text("cab\n")
    assert block_of_file(file, text) == text.encode("cab")
    assert head_forms(file, text) == [frame(text, "a", c, "cab")[0] for c in (True, False)]
    for read in (block_of_file, head_forms):
        with pytest.raises(PromptError, match="needs the model's tokenizer"):
            read(file, None)
    file.write_text("[1, 2]")
    assert block_of_file(file, None) == [1, 2]
    assert head_forms(file, text) == [[1, 2]]


# --------------------------------------------------------------------------------- three processes


def plaintext(
    bundles: Path, head: list[int], blocks: list[list[int]], secret: list[int], count: int = 3
) -> list[int]:
    """Tokens after a prompt that combines blocks."""
    plain = PlainExecutor(load_bundle(role_path(bundles, "server"), "server"))
    begun = [*head, *itertools.chain(*blocks)]
    caches = combined_caches(plain, head, blocks)
    found = plain.generate([*begun, *secret], count, begun=(len(begun), caches))
    return [token for token, _ in found]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder.save(tmp_path_factory.mktemp("blocks"), model="tiny")


@pytest.fixture(scope="module")
def deployed(bundles: Path) -> Iterator[Deployment]:
    files = []
    for number, tokens in enumerate((HEAD, *BLOCKS)):
        file = bundles / f"public{number}"
        file.write_text(json.dumps(tokens))
        files += ["--public-block" if number else "--public-prompt", str(file)]
    with deployment(bundles, serve=(*files, "--timeout", "8", "--grace", "5")) as made:
        yield made


def test_a_connection_combines_blocks(deployed: Deployment, bundles: Path) -> None:
    with deployed.connection(reuse=False) as connection:
        usual = connection.setup
    options = {"public_prefixes": [HEAD], "public_blocks": BLOCKS, "reuse": False}
    with deployed.connection(**options) as connection:
        count = elements(connection.program, 2 + 3 + 1 + 2)
        assert connection.setup.received - usual.received == 8 * count
        for order in ((0, 1, 2), (2, 0), (1,), (0, 2)):
            blocks = [BLOCKS[n] for n in order]
            prompt = [*HEAD, *itertools.chain(*blocks), *SECRET]
            tokens = list(connection.generate(prompt, max_tokens=3, blocks=order))
            assert [t.token for t in tokens] == plaintext(bundles, HEAD, blocks, SECRET)
            assert [r.new for t in tokens for r in t.reports] == [len(SECRET), 1, 1]
        prompt = [*HEAD, *BLOCKS[0], *SECRET]
        found = [t.token for t in connection.generate(prompt, max_tokens=3, blocks=[])]
        assert found == decoder.plaintext(bundles, prompt, 3)
        for wrong, blocks in ((prompt, None), (prompt[:5], [0]), (prompt, [1]), ([5], [0])):
            with pytest.raises(PromptError, match="does not continue its public blocks"):
                next(connection.generate(wrong, max_tokens=3, blocks=blocks))
        for unknown in ([3], [0, 0], [-1]):
            with pytest.raises(PromptError, match="there are no public blocks"):
                next(connection.generate(prompt, max_tokens=3, blocks=unknown))


def test_a_conversation_continues_what_it_combined(deployed: Deployment, bundles: Path) -> None:
    with deployed.connection(public_prefixes=[HEAD], public_blocks=BLOCKS) as connection:
        begins = [*HEAD, *itertools.chain(*BLOCKS)]

        def ask(prompt: list[int], blocks: Sequence[int] | None) -> tuple[list[int], list[int]]:
            tokens = list(connection.generate(prompt, max_tokens=2, blocks=blocks))
            return [t.token for t in tokens], [r.new for t in tokens for r in t.reports]

        first, steps = ask([*begins, *SECRET], None)
        assert (first, steps) == (plaintext(bundles, HEAD, BLOCKS, SECRET, 2), [2, 1])
        said = [*SECRET, *first]
        # All but the last token, which no step took; as plain tokens they are another text.
        assert connection.cached([*begins, *said], [0, 1, 2]) == len(begins) + len(said) - 1
        assert connection.cached([*begins, *said]) == len(HEAD)
        wanted = plaintext(bundles, HEAD, BLOCKS, [*said, 2], 2)
        assert ask([*begins, *said, 2], None) == (wanted, [2, 1])
        # The same tokens without blocks are another text, of which only the head is known.
        flat = [*begins, *said]
        assert ask(flat, []) == (decoder.plaintext(bundles, flat, 2), [len(flat) - 2, 1])
        # So are the same blocks in another order, of which nothing has to be computed either.
        for order in ([0], [0, 1], [1, 0], [2, 1, 0]):
            blocks = [BLOCKS[n] for n in order]
            wanted = plaintext(bundles, HEAD, blocks, SECRET, 2)
            prompt = [*HEAD, *itertools.chain(*blocks), *SECRET]
            assert ask(prompt, order) == (wanted, [2, 1])


def test_blocks_that_the_server_does_not_agree_to(deployed: Deployment, bundles: Path) -> None:
    """An unknown block, a known one behind another head, and a known one as a beginning."""
    for options in (
        {"public_prefixes": [HEAD], "public_blocks": [BLOCKS[0], [9, 9]]},
        {"public_prefixes": [[4, 4]], "public_blocks": BLOCKS[:1]},
        {"public_blocks": BLOCKS[:1]},
        {"public_prefixes": BLOCKS[:1]},
    ):
        connection = deployed.connection(**options)
        with pytest.raises(PartyError, match="is none that the server agrees to") as refused:
            connection.open()
        assert "\n" not in str(refused.value)
    with deployed.connection(public_prefixes=[HEAD], public_blocks=BLOCKS[1:]) as other:
        found = answered(other, [*HEAD, *BLOCKS[1], *BLOCKS[2], *SECRET], 3)
        assert found == (plaintext(bundles, HEAD, BLOCKS[1:], SECRET), [2, 1, 1])


def test_what_a_connection_refuses(deployed: Deployment) -> None:
    for options, words in (
        ({"public_prefixes": [[1], [2]], "public_blocks": [[3]]}, "at most one public prefix"),
        ({"public_prefixes": ["a"], "public_blocks": [[3]]}, "all texts, or all tokens"),
        ({"public_blocks": ["a"]}, "has no tokenizer"),
        ({"public_blocks": [[1] * 16]}, "leaves no room"),
        ({"public_blocks": [[]]}, "is empty"),
        ({"public_blocks": [[1], [1]]}, "the same text"),
    ):
        with pytest.raises(PromptError, match=words):
            deployed.connection(**options)
    with pytest.raises(MergecError, match="stored randomness does not support public text"):
        deployed.connection(public_blocks=[[1]], dealer=None, store=object())


def test_a_client_joins_blocks_that_are_not_there(deployed: Deployment) -> None:
    with deployed.connection(public_prefixes=[HEAD], public_blocks=BLOCKS) as connection:
        channel = connection._peers.channels[0]
        connection._session.begin(connection._session.steps, channel, 4, 1)
        channel.send(Kind.STEP, write_step(2, 2, Draw(), Place(0, -1, (9,))))
        with pytest.raises(PartyError, match="there are no caches -10"):
            channel.receive(Kind.ROUND, limit=1 << 20)


def test_a_client_joins_more_than_fits(deployed: Deployment) -> None:
    """All blocks together leave no room; a server looks at lengths before it computes."""
    with deployed.connection(public_prefixes=[HEAD], public_blocks=BLOCKS) as connection:
        channel = connection._peers.channels[0]
        connection._session.begin(connection._session.steps, channel, 3, 1)
        channel.send(Kind.STEP, write_step(2, 8, Draw(), place_of(range(4))))
        with pytest.raises(PartyError, match="out of turn"):
            channel.receive(Kind.ROUND, limit=1 << 20)


def test_the_command_line(
    deployed: Deployment, bundles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mergec.runtime.cli import run

    files = [bundles / f"public{n}" for n in range(4)]
    given = ["--public-prompt", str(files[0]), "--public-block", str(files[3])]
    given += ["--public-block", str(files[1])]
    where = ["--server", str(deployed.server.address), "--dealer", str(deployed.dealer.address)]
    asked = [
        "generate",
        str(bundles),
        "--ids",
        "--prompt",
        "3 12",
        "--max-tokens",
        "3",
        "--plaintext",
    ]
    assert run([*asked, *where, *given]) == 0
    wanted = plaintext(bundles, HEAD, [BLOCKS[2], BLOCKS[0]], SECRET)
    assert capsys.readouterr().out.split() == [str(token) for token in wanted]
    files[2].with_suffix(".other").write_text("[9, 9]")
    other = ["--public-block", str(files[2].with_suffix(".other"))]
    assert run([*asked, *where, *given, *other]) == FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert "is none that the server agrees to" in line


@pytest.mark.slow
def test_local_roles_combine_blocks(bundles: Path) -> None:
    prompt = [*HEAD, *BLOCKS[2], *BLOCKS[0], *SECRET]
    chosen = [BLOCKS[2], BLOCKS[0]]
    found = run_local(bundles, prompt, max_tokens=3, public=HEAD, blocks=chosen)
    assert found.tokens == plaintext(bundles, HEAD, chosen, SECRET)
    assert [record.new for record in found.records] == [len(SECRET), 1, 1]
    for wrong in ({"blocks": [[1]]}, {"blocks": chosen, "mode": "crypten"}, {"blocks": chosen[:1]}):
        with pytest.raises(PromptError, match="begins the prompt"):
            run_local(bundles, prompt, max_tokens=1, **wrong)


@pytest.mark.slow
def test_a_program_combines_blocks_and_compares() -> None:
    _, program = of_model("gpt2")
    answer = program.generate_local(
        [17, 3], max_tokens=4, public_prefix=[11, 60], public_blocks=[[40, 7], [90]]
    )
    assert answer.prompt == [11, 60, 40, 7, 90, 17, 3]
    assert answer.blocks == (2, 2, 1)
    assert program.plaintext(answer).tokens == answer.tokens
    with pytest.raises(PromptError, match="all texts, or all token numbers"):
        program.generate_local([1], public_blocks=["a"])
    with pytest.raises(PromptError, match="is no list"):
        program.generate_local([1], public_blocks="a")
    with pytest.raises(PromptError, match="depends on where a token is cached"):
        compiled("bloom")[1].generate_local([1], public_blocks=[[2]])


@pytest.mark.slow
def test_a_program_that_resends_refuses() -> None:
    _, program = compiled("gpt2", preset="merge-er")
    with pytest.raises(PromptError, match="resends its hidden state"):
        program.generate_local([1, 2], max_tokens=1, public_blocks=[[3]])
