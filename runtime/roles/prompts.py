"""A client's prompts as tokens: by its tokenizer, chat template and public texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mergec.runtime.core.errors import PromptError
from mergec.runtime.program.program import RoleProgram
from mergec.runtime.session.public_blocks import block_tokens, frame, texts_of
from mergec.runtime.session.public_text import PublicText, check_text, prompt_tokens, public_tokens
from mergec.runtime.session.text import Text


class Prompts:
    """Encodes what a client says in a session.

    text: the tokenizer; None if prompts are token numbers. public: the session's texts, those that
    prompts begin with and then the blocks.
    """

    def __init__(
        self,
        program: RoleProgram,
        text: Text | None,
        prefixes: Sequence[str | Sequence[int]],
        blocks: Sequence[str | Sequence[int]],
        public_chat: bool | None,
    ) -> None:
        """prefixes, blocks, public_chat: see `Connection`. Raises PromptError for those that the
        program cannot begin with."""
        self.text = text
        self._program, self._public_chat = program, public_chat
        self._head = ""
        self._blocks: list[int] = []
        """The numbers of the blocks among the session's public texts."""
        self.public = self._public_texts(prefixes, blocks)

    def encode(
        self,
        prompt: str,
        chat: bool | None = None,
        public: str | None = None,
        blocks: Sequence[int] | None = None,
    ) -> list[int]:
        """Tokens of a text. chat: apply the chat template; None applies it if the model has one.

        public: a public text that comes before it, as the system message or as it is. blocks: which
        of the session's public blocks come before it, by number, in this order; None for all.
        Where there are blocks the text that they see comes first, so leave `public` out.
        """
        text = self._tokenizer()
        if not prompt.strip():
            raise PromptError("the prompt is empty; say something")
        chosen = self._chosen(blocks)
        if chosen and chat is None:
            chat = self._public_chat
        templated = text.has_chat if chat is None else chat
        if chosen:
            return self._framed(prompt, templated, chosen)
        return prompt_tokens(text, prompt, templated, public or self._head or None)

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], blocks: Sequence[int] | None = None
    ) -> list[int]:
        """Tokens of a conversation, by the chat template; each message has `role` and `content`.

        blocks: as in `encode`; they continue the system message, which is the text that they see.
        Raises PromptError for another system message beside them.
        """
        chosen = self._chosen(blocks)
        if not chosen:
            return self._tokenizer().encode_chat(messages)
        begins = [{"role": "system", "content": self._head}]
        said = messages[1:] if list(messages[:1]) == begins else messages
        if any(message.get("role") == "system" for message in said):
            raise PromptError(
                "public blocks continue the public text as the system message; leave yours out"
            )
        return self._framed(said, True, chosen)

    def _framed(
        self, said: str | Sequence[Mapping[str, str]], chat: bool, chosen: Sequence[int]
    ) -> list[int]:
        head, rest = frame(self._tokenizer(), said, chat, self._head)
        return [*head, *(token for n in chosen for token in self.public[n].tokens), *rest]

    def _chosen(self, blocks: Sequence[int] | None) -> list[int]:
        """The numbers, among the public texts, of the blocks that somebody chose by their own."""
        if blocks is None:
            return self._blocks
        if len(set(blocks)) < len(blocks) or not all(0 <= n < len(self._blocks) for n in blocks):
            raise PromptError(
                f"there are no public blocks {list(blocks)}; this connection has "
                f"{len(self._blocks)}, numbered from 0, each of which is given once"
            )
        return [self._blocks[n] for n in blocks]

    def _public_texts(
        self,
        prefixes: Sequence[str | Sequence[int]],
        blocks: Sequence[str | Sequence[int]],
    ) -> list[PublicText]:
        """The session's public texts: those that prompts begin with, then blocks."""
        if not blocks:
            known = [self._public_text(given) for given in prefixes]
        else:
            known = self._public_blocks(prefixes, blocks)
            self._blocks = [n for n, text in enumerate(known) if text.head is not None]
        for text in known:
            check_text(self._program, text)
        return known

    def _public_blocks(
        self, prefixes: Sequence[str | Sequence[int]], blocks: Sequence[str | Sequence[int]]
    ) -> list[PublicText]:
        if len(prefixes) > 1:
            raise PromptError("public blocks see one text; give at most one public prefix")
        given = [*prefixes, *blocks]
        texts = [text for text in given if isinstance(text, str)]
        if not texts:
            tokens = [[int(token) for token in text] for text in given]
            return texts_of(tokens[0] if prefixes else [], tokens[len(prefixes) :])
        if len(texts) < len(given):
            raise PromptError("public blocks and their prefix are all texts, or all tokens")
        self._head = texts[0] if prefixes else ""
        text = self._tokenizer()
        chat = text.has_chat if self._public_chat is None else self._public_chat
        head, _ = frame(text, ".", chat, self._head)
        return texts_of(head, [block_tokens(text, block) for block in texts[len(prefixes) :]])

    def _public_text(self, given: str | Sequence[int]) -> PublicText:
        if isinstance(given, str):
            text = self._tokenizer()
            chat = text.has_chat if self._public_chat is None else self._public_chat
            tokens = public_tokens(text, given, chat)
        else:
            tokens = list(given)
        return PublicText(len(tokens), tokens=tokens)

    def check_chat(self) -> None:
        """Raise PromptError if the model has no chat template."""
        self._tokenizer().template()

    def _tokenizer(self) -> Text:
        if self.text is None:
            raise PromptError("this bundle has no tokenizer; pass token numbers")
        return self.text

    @property
    def block_count(self) -> int:
        """The number of public blocks that an answer can combine."""
        return len(self._blocks)

    def combined(self, ids: Sequence[int], blocks: Sequence[int] | None) -> list[int]:
        """The numbers of the public texts that a prompt combines; none if it combines no blocks.

        Raises PromptError unless it begins with them.
        """
        chosen = self._chosen(blocks)
        if not chosen:
            return []
        numbers = [n for n, text in enumerate(self.public) if text.head is None] + chosen
        begins = [token for n in numbers for token in self.public[n].tokens]
        if list(ids[: len(begins)]) != begins or len(ids) == len(begins):
            raise PromptError(
                "the prompt does not continue its public blocks; encode it by this connection, or "
                "choose none by blocks=[]"
            )
        return numbers
