"""Public blocks: texts that both parties know, that do not look at each other, in any combination.

Blocks are examples or documents in front of a question. Each is encoded by itself, after a common
head that all of them see, and the server computes its keys and values once. A prompt continues the
head and any blocks in any order; only its own tokens, which see all of them, go through a step.

This is structured attention, another function than the model's: in full attention a block would see
those before it. Every block stands at the positions behind the head, whatever is before it, so its
rows are the same in every combination, for learned positions as for rotary ones. At places of their
own blocks would see the head from other distances, and have other rows in each. The prompt's
positions go on behind all of their tokens, as those of a step follow from how many rows are cached.

Sources: blocks at equal positions, Ratner et al., "Parallel Context Windows for Large Language
Models" (ACL 2023), section 2, where the prompt begins behind the longest block instead. Examples
without an order, Cai et al., "Scaling In-Context Demonstrations with Structured Attention" (2023).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergec.runtime.core.errors import PromptError
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.engine.plan import Plan
from mergec.runtime.engine.trees import Trees
from mergec.runtime.program.program import RoleProgram, is_text
from mergec.runtime.session.conversations import Place, public_source
from mergec.runtime.session.public_text import (
    MOST_PREFIXES,
    PublicText,
    check_text,
    encoded_rows,
    listed_tokens,
    no_tokenizer,
    past_of,
    plain_rows,
    read_public_text,
)

if TYPE_CHECKING:
    from mergec.runtime.session.text import Text

MOST_BYTES = 1 << 30
"""Bytes of rows that a server keeps; those that were used longest ago are computed again."""

_PLACE = "\N{OBJECT REPLACEMENT CHARACTER} public blocks \N{OBJECT REPLACEMENT CHARACTER}"
"""Stands for blocks while a chat template is applied."""

_LONGEST = 4096
"""Rows up to which attention is tested if a program bounds no length."""

_FEW = 256
"""Rows that attention is computed on for that."""

_EQUAL = 1e-4
"""Logits that are as close as this, of their largest, are those of the same function."""


def texts_of(head: Sequence[int], blocks: Sequence[Sequence[int]]) -> list[PublicText]:
    """The public texts of a session with blocks, as the client knows them: their head, unless it
    is empty, and each block. Raises PromptError for too many, or for two that are alike."""
    texts = _texts(head, blocks)
    if len(texts) > MOST_PREFIXES:
        raise PromptError(
            f"{len(texts)} public texts are more than the {MOST_PREFIXES} of a session; join some"
        )
    if len({text.digest for text in texts}) < len(texts):
        raise PromptError("two public blocks are the same text; give each once")
    return texts


def _texts(head: Sequence[int], blocks: Sequence[Sequence[int]]) -> list[PublicText]:
    texts = [PublicText(len(head), tokens=head)] if head else []
    return [*texts, *(PublicText(len(block), tokens=block, head=head) for block in blocks)]


def place_of(numbers: Sequence[int], conversation: int = 0) -> Place:
    """Where a prompt is that continues these of a session's public texts."""
    first, *rest = numbers
    return Place(conversation, public_source(first), tuple(rest))


# ------------------------------------------------------------------------------------------- text


def frame(
    text: Text, said: str | Sequence[Mapping[str, str]], chat: bool, head: str = ""
) -> tuple[list[int], list[int]]:
    """The tokens of a prompt before and after the place of its blocks, which is behind `head`.

    said: the prompt, or with `chat` the messages of a conversation. chat: blocks continue the
    system message, `head`; otherwise a text that begins with it. Whatever is said, the first part
    is the same; raises PromptError if the model's template does not allow that.
    """
    if not chat:
        if not isinstance(said, str):
            raise PromptError("messages need a chat template; pass a text")
        return text.encode(head), text.encode_part(said)
    messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
    system = {"role": "system", "content": head + _PLACE}
    before, found, after = text.render([system, *messages]).partition(_PLACE)
    if not found or _PLACE in after:
        raise PromptError(
            "this model's chat template has no one place for a system message, which public "
            "blocks continue; use --no-chat"
        )
    return text.encode_part(before), text.encode_part(after)


def block_tokens(text: Text, content: str) -> list[int]:
    """The tokens of a block, by itself."""
    if not content.strip():
        raise PromptError("a public block is empty; give some text")
    return text.encode_part(content)


def head_forms(path: Path | None, text: Text | None) -> list[list[int]]:
    """At the server: the tokens of the head that a file holds, for every form in which a client may
    use it; without a file, of what comes before a prompt that has no head."""
    content = "" if path is None else read_public_text(path)
    if path is not None and (found := listed_tokens(content)) is not None:
        return [found]
    if text is None:
        if path is not None:
            raise no_tokenizer(path)
        return [[]]
    forms = [frame(text, ".", False, content)[0]]
    if text.has_chat:
        # A client that wants a chat is told so, where its template has no place for blocks.
        with suppress(PromptError):
            forms.insert(0, frame(text, ".", True, content)[0])
    # Prompts of token numbers begin with nothing.
    return forms if path is not None else [*forms, []]


def block_of_file(path: Path, text: Text | None) -> list[int]:
    """The tokens of a block in a file: of its text, or those that it lists, as [1, 2, 3]."""
    content = read_public_text(path)
    found = listed_tokens(content)
    if found is not None:
        return found
    if text is None:
        raise no_tokenizer(path)
    return block_tokens(text, content)


# ------------------------------------------------------------------------------------- the server


class PublicTexts(Mapping[str, PublicText]):
    """At the server: the public texts that clients may name, by digest, and their cache rows.

    Rows are computed when they are first asked for, and kept up to `most` bytes. What a block's
    rows depend on are the program, the head that it follows and its own tokens; its positions are
    those behind the head.
    """

    def __init__(self, program: RoleProgram, most: int = MOST_BYTES) -> None:
        """Raises PromptError if the program lacks its weights."""
        self._program, self._most = program, most
        self._plain: PlainExecutor | None = PlainExecutor(program)
        self._known: dict[str, PublicText] = {}
        self._kept: OrderedDict[str, PublicText] = OrderedDict()
        self._size = 0
        self._head: tuple[Sequence[int], dict[str, torch.Tensor]] = (), {}
        self._combines = False
        self.computed = 0
        """How many texts were computed so far."""

    def add(self, text: PublicText) -> None:
        """Allow a text, by its tokens. Raises PromptError if the program cannot begin with it, or
        cannot combine blocks."""
        check_text(self._program, text)
        if text.head is not None and not self._combines and self._plain is not None:
            check_combines(self._plain)
            self._combines = True
        self._known[text.digest] = text

    def add_blocks(self, heads: Sequence[Sequence[int]], blocks: Sequence[Sequence[int]]) -> None:
        """Allow each block behind each head; likewise."""
        for head in heads:
            for text in _texts(head, blocks):
                self.add(text)

    def __getitem__(self, digest: str) -> PublicText:
        text = self._known[digest]
        if digest not in self._kept:
            self._keep(digest, self._compute(text))
        self._kept.move_to_end(digest)
        return self._kept[digest]

    def __contains__(self, digest: object) -> bool:
        return digest in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def lengths(self) -> dict[str, int]:
        """The number of tokens of each text, by digest."""
        return {digest: text.length for digest, text in self._known.items()}

    def settle(self) -> None:
        """Compute all texts, and let the weights go if no rows had to go: nothing needs them then.

        Otherwise a session's process computes what is missing, and keeps it for itself.
        """
        for digest in self._known:
            self[digest]
        if len(self._kept) == len(self._known):
            self._plain = None
        self._head = (), {}

    def _compute(self, text: PublicText) -> PublicText:
        plain = self._plain
        if plain is None:
            raise PromptError("the weights that this public text needs are gone; start again")
        self.computed += 1
        begun: dict[str, torch.Tensor] = {}
        if text.head:
            if list(self._head[0]) != list(text.head):
                self._head = text.head, plain_rows(plain, text.head)
            begun = self._head[1]
        rows = plain_rows(plain, text.tokens, begun)
        return PublicText(text.length, encoded_rows(self._program, rows))

    def _keep(self, digest: str, text: PublicText) -> None:
        self._kept[digest] = text
        self._size += _bytes_of(text)
        while self._size > self._most and len(self._kept) > 1:
            self._size -= _bytes_of(self._kept.popitem(last=False)[1])


def _bytes_of(text: PublicText) -> int:
    return sum(rows.nbytes for rows in text.rows.values())


def compute_all(program: RoleProgram, texts: Sequence[PublicText]) -> list[PublicText]:
    """At the server: texts of one session with their rows."""
    if not texts:
        return []
    found = PublicTexts(program)
    for text in texts:
        found.add(text)
    return [found[text.digest] for text in texts]


def combined_caches(
    plain: PlainExecutor, head: Sequence[int], blocks: Sequence[Sequence[int]]
) -> dict[str, torch.Tensor]:
    """The caches of blocks behind a head, in the clear; for comparison."""
    begun = plain_rows(plain, head) if head else {}
    parts = [*([begun] if begun else []), *(plain_rows(plain, block, begun) for block in blocks)]
    dims = {spec.name: past_of(spec) for spec in plain.program.inputs if spec.cache_output}
    return {name: torch.cat([rows[name] for rows in parts], dim) for name, dim in dims.items()}


def check_combines(plain: PlainExecutor) -> None:
    """Raise PromptError unless a program's attention takes cached rows as a set.

    That of ALiBi, of a sliding window or of constant weights does not: it depends on where a row is
    cached, and so on what else is combined. Tested on a few rows, of two kinds: in the opposite
    order, logits must be the same. For as many rows as the program takes, these would fill memory.
    But what can tell a long cache from a short one are values that follow from lengths, such as
    masks, so that these go on as they began is all that is tested there.
    """
    most = (plain.program.manifest.max_length or _LONGEST) - 1
    few = min(most, _FEW)
    if not _takes_a_set(plain, few) or (most > few and not _goes_on(plain, few, most)):
        raise PromptError(
            "this program's attention depends on where a token is cached (as ALiBi, a sliding "
            "window or constant attention), so it cannot combine public blocks; leave them out"
        )


def _takes_a_set(plain: PlainExecutor, count: int) -> bool:
    """Whether a token's logits after so many cached rows are those after them in reverse."""
    following = {spec.cache_output for spec in plain.program.inputs}
    results = [name for name in plain.program.outputs if name not in following]
    generator = torch.Generator().manual_seed(1)
    rows, turned = {}, {}
    for name, (dim, empty) in _empty_caches(plain, count).items():
        kinds = (torch.arange(count) * 2 < count).float() * 2 - 1
        noise = torch.randn(empty.shape, generator=generator)
        made = noise + kinds.view(-1, *[1] * (empty.dim() - dim - 1))
        rows[name], turned[name] = made.to(empty), made.flip(dim).to(empty)
    one, other = (_after(plain, held, results) for held in (rows, turned))
    return all(
        bool((one[name] - other[name]).abs().max() <= _EQUAL * one[name].abs().max())
        for name in results
    )


def _goes_on(plain: PlainExecutor, few: int, most: int) -> bool:
    """Whether what follows from lengths, and meets secret values, is of one kind up to `most`.

    Numbers and shapes grow evenly, and entries along the cached rows are equal.
    """
    names = Trees(Plan(plain.program)).names
    less, more, whole = (
        _after(
            plain, {name: rows for name, (_, rows) in _empty_caches(plain, count).items()}, names
        )
        for count in (few - 1, few, most)
    )

    def even(a: int, b: int, c: int) -> bool:
        return c == b + (b - a) * (most - few)

    for name in names:
        value = whole[name]
        if not isinstance(value, torch.Tensor):
            if not even(less[name], more[name], value):
                return False
            continue
        for dim, sizes in enumerate(
            zip(less[name].shape, more[name].shape, value.shape, strict=True)
        ):
            if not even(*sizes):
                return False
            if sizes[0] != sizes[1]:
                cached = value.narrow(dim, 0, min(most, sizes[2]))
                if not torch.equal(cached, cached.narrow(dim, 0, 1).expand_as(cached)):
                    return False
    return True


def _empty_caches(plain: PlainExecutor, count: int) -> dict[str, tuple[int, torch.Tensor]]:
    """Caches of so many rows, all of which are one zero in memory; each with its dimension of
    rows."""
    begun, found = plain.start(), {}
    for spec in plain.program.inputs:
        if spec.name in begun:
            dim, empty = past_of(spec), begun[spec.name]
            shape = [*empty.shape[:dim], count, *empty.shape[dim + 1 :]]
            found[spec.name] = dim, empty.new_zeros(()).expand(shape)
    return found


def _after(
    plain: PlainExecutor, caches: Mapping[str, torch.Tensor], names: Sequence[str]
) -> dict[str, Any]:
    """These values of a step of one token after caches."""
    (given,) = [spec.name for spec in plain.program.inputs if is_text(spec)]
    return plain.step({given: torch.zeros((1, 1), dtype=torch.int64), **caches}, names)
