"""Reads texts, and prompts with answers, from files of several formats, as token numbers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from mergec.compiler.config import Pair
from mergec.compiler.errors import CompileError

Text = str | list[int]
"""A text, or its token numbers."""


@dataclass(frozen=True)
class Example:
    """An answer and the prompt that it follows; a text alone has no prompt.

    line: where it stands in its file, counted from 1; 0 if the file has no lines of its own.
    dialogue: the dialogue that it is from, counted from 1, where there is no line.
    """

    answer: Text
    prompt: Text | None = None
    line: int = 0
    dialogue: int = 0


@dataclass(frozen=True)
class Encoded:
    """An example as token numbers. start: the first token that is learned.

    source: what an encoder-decoder reads. Then the tokens are the answer's alone, and the first of
    them is the one that every answer begins with.
    """

    tokens: tuple[int, ...]
    start: int
    source: tuple[int, ...] = ()

    @property
    def prompt(self) -> tuple[int, ...]:
        """What comes before the answer, or the source; of a text without a prompt, its first
        half."""
        if self.source:
            return self.source
        return self.tokens[: self.start if self.start > 1 else max(1, len(self.tokens) // 2)]

    @property
    def answer(self) -> tuple[int, ...]:
        """What comes after `prompt`."""
        return self.tokens[self.start if self.source else len(self.prompt) :]

    @property
    def sample(self) -> tuple[int, ...] | Pair:
        """The text as the compiler takes it for calibration."""
        return Pair(self.source, self.tokens) if self.source else self.tokens


def read_examples(path: str | Path, form: str = "auto") -> list[Example]:
    """The examples in a file.

    form: "text", "jsonl", "multiwoz", "commongen", "dailydialog", or "auto", which looks at the
    file's name and its first line. Raises CompileError, which names the line and what is expected
    there, for a file that is not of this form, and for one without examples.
    """
    file = Path(path)
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise CompileError(f"{file}, line {line}: not UTF-8; convert the file") from error
    except OSError as error:
        raise CompileError(f"{file} cannot be read ({error.strerror}); check the path") from error
    form = _recognized(file, content) if form == "auto" else form
    found = list(_READERS[form](file, content))
    if not found:
        raise CompileError(f"{file} holds no examples; expected {_EXPECTED[form]}")
    return found


def _recognized(file: Path, content: str) -> str:
    if file.suffix == ".json":
        return "multiwoz"
    first = content.lstrip()[:1]
    if file.suffix != ".jsonl" and first != "{":
        return "dailydialog" if _END in content.partition("\n")[0] else "text"
    for _, record in _records(file, content, "jsonl"):
        if "dialog" in record:
            return "dailydialog"
        return "commongen" if {"concepts", "concept_set"} & record.keys() else "jsonl"
    return "jsonl"


def _text(_: Path, content: str) -> Iterator[Example]:
    """Paragraphs, which empty lines separate."""
    lines: list[str] = []
    start = 1
    for number, line in enumerate([*content.splitlines(), ""], 1):
        if line.strip():
            lines.append(line)
            continue
        if lines:
            yield Example("\n".join(lines), line=start)
        lines, start = [], number + 1


def _jsonl(file: Path, content: str) -> Iterator[Example]:
    for number, record in _records(file, content, "jsonl"):
        if "text" in record:
            yield Example(_value(file, number, record, "text", "jsonl"), line=number)
            continue
        prompt = _value(file, number, record, "prompt", "jsonl")
        yield Example(_value(file, number, record, "answer", "jsonl"), prompt, number)


def _commongen(file: Path, content: str) -> Iterator[Example]:
    """Sentences of given concepts: the prompt is the concepts, separated by spaces.

    As published, {"concept_set": "a#b#c", "scene": ["…", …]}; or, as in the data sets library,
    {"concepts": ["a", "b", "c"], "target": "…"}.
    """
    for number, record in _records(file, content, "commongen"):
        concepts = record.get("concepts", record.get("concept_set"))
        if isinstance(concepts, str):
            concepts = concepts.split("#")
        scenes = record.get("target", record.get("scene"))
        scenes = [scenes] if isinstance(scenes, str) else scenes
        if not _texts(concepts) or not _texts(scenes):
            _refuse(file, number, "commongen")
        for scene in scenes:
            yield Example(scene, " ".join(concepts), number)


_END = "__eou__"
"""What ends an utterance in DailyDialog's text files."""


def _dailydialog(file: Path, content: str) -> Iterator[Example]:
    """Each utterance but the first, after those before it, one per line.

    As published, a dialogue is a line of utterances that end with __eou__; or, as in the data sets
    library, a line {"dialog": ["…", "…"]}.
    """
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        if line.lstrip().startswith("{"):
            said = _record(file, number, line, "dailydialog").get("dialog")
        else:
            said = line.split(_END)[:-1] if _END in line else None
        if not _texts(said) or len(said) < 2:
            _refuse(file, number, "dailydialog")
        said = [utterance.strip() for utterance in said]
        for place in range(1, len(said)):
            yield Example(said[place], "\n".join(said[:place]), number)


def _multiwoz(file: Path, content: str) -> Iterator[Example]:
    """The system's utterances: after its dialogue acts, or else after the user's utterance.

    MultiWOZ 2.0 and 2.1, an object of dialogues {"log": [{"text": …, "dialog_act": …}, …]}, whose
    every second turn is the system's; or 2.2, an array of {"turns": [{"speaker": …, "utterance":
    …}, …]}.
    """
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise CompileError(f"{file}, line {line}: not JSON ({error})") from error
    if isinstance(whole, dict):
        dialogues = list(whole.items())
    elif isinstance(whole, list):
        dialogues = [(f"dialogue {place}", item) for place, item in enumerate(whole)]
    else:
        raise CompileError(f"{file}: expected {_EXPECTED['multiwoz']}")
    for number, (name, dialogue) in enumerate(dialogues, 1):
        log = dialogue.get("log", dialogue.get("turns")) if isinstance(dialogue, dict) else None
        if not isinstance(log, list):
            raise CompileError(f"{file}, {name}: expected {_EXPECTED['multiwoz']}")
        before = ""
        for place, turn in enumerate(log):
            said = turn.get("text", turn.get("utterance")) if isinstance(turn, dict) else None
            if not isinstance(said, str) or not said.strip():
                raise CompileError(
                    f"{file}, {name}, turn {place}: expected {_EXPECTED['multiwoz']}"
                )
            system = turn["speaker"] == "SYSTEM" if "speaker" in turn else place % 2 == 1
            prompt = _acts(turn.get("dialog_act")) or before
            if system and prompt:
                yield Example(said.strip(), prompt, dialogue=number)
            before = said.strip()


def _acts(acts: Any) -> str:
    """Dialogue acts as text, such as `Hotel-Inform(Area=north; Stars=4)`; "" if there are none."""
    if not isinstance(acts, dict):
        return ""
    written = []
    for act, slots in acts.items():
        pairs = [pair for pair in slots if isinstance(pair, list) and len(pair) == 2]
        written.append(f"{act}({'; '.join(f'{slot}={value}' for slot, value in pairs)})")
    return " ".join(written)


_READERS: dict[str, Callable[[Path, str], Iterator[Example]]] = {
    "text": _text,
    "jsonl": _jsonl,
    "multiwoz": _multiwoz,
    "commongen": _commongen,
    "dailydialog": _dailydialog,
}

_EXPECTED = {
    "text": "paragraphs, separated by empty lines",
    "jsonl": '{"prompt": "…", "answer": "…"} or {"text": "…"} in each line',
    "multiwoz": 'dialogues {"log": [{"text": "…"}, …]} or {"turns": [{"utterance": "…"}, …]}',
    "commongen": '{"concept_set": "a#b", "scene": ["…"]} or {"concepts": ["a", "b"], "target": '
    '"…"} in each line',
    "dailydialog": 'utterances that end with __eou__, at least two, or {"dialog": ["…", "…"]} in '
    "each line",
}


def _records(file: Path, content: str, form: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            yield number, _record(file, number, line, form)


def _record(file: Path, number: int, line: str, form: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        _refuse(file, number, form)
    return record


def _value(file: Path, number: int, record: dict[str, Any], key: str, form: str) -> Text:
    value = record.get(key)
    tokens = isinstance(value, list) and all(type(token) is int for token in value)
    if not value or not (isinstance(value, str) or tokens):
        _refuse(file, number, form)
    return value


def _texts(value: Any) -> TypeGuard[list[str]]:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, str) and item.strip() for item in value)
    )


def _refuse(file: Path, number: int, form: str) -> NoReturn:
    raise CompileError(f"{file}, line {number}: expected {_EXPECTED[form]}")


class Encoder:
    """Turns examples into token numbers.

    tokenizer: a Hugging Face tokenizer; None if all examples are token numbers. vocab_size: tokens
    must be below it. length: most tokens of a text: a longer prompt loses its beginning, a longer
    text is cut into several. separator: what stands between prompt and answer, as text. chat:
    render prompts by the chat template. file: named in errors.

    begin: for an encoder-decoder, the token that its answers begin with. Then prompts are sources,
    with the tokens that the tokenizer puts around a text, as a program's client does; length is of
    source and answer together, and both lose their ends where that is too little: then each may
    take half of it, or what the other one leaves.

    stop: what ends a text, the tokenizer's end of sequence.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        length: int,
        separator: str = "\n",
        *,
        chat: bool = False,
        file: str | Path = "the data",
        begin: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.length = length
        self.separator = separator
        self.chat = chat
        self.file = file
        self.begin = begin
        stop = getattr(tokenizer, "eos_token_id", None)
        self.stop = [] if stop is None else [int(stop)]
        if chat and not getattr(tokenizer, "chat_template", None):
            raise CompileError("the tokenizer has no chat template; leave out `chat`")

    def __call__(self, examples: Sequence[Example]) -> list[Encoded]:
        """All examples, encoded. Raises CompileError for a token that the model does not know."""
        return [item for example in examples for item in self._encode(example)]

    def _encode(self, example: Example) -> Iterator[Encoded]:
        if self.begin is not None:
            yield self._pair(example, self.begin)
            return
        if example.prompt is None:
            tokens = [*self._tokens(example.answer, example, first=True), *self.stop]
            for begin in range(0, len(tokens), self.length):
                piece = tokens[begin : begin + self.length]
                if len(piece) > 1:
                    yield Encoded(tuple(piece), 1)
            return
        answer = [*self._tokens(example.answer, example), *self.stop][: self.length - 1]
        prompt = self._prompt(example)[-(self.length - len(answer)) :]
        yield Encoded((*prompt, *answer), len(prompt))

    def _pair(self, example: Example, begin: int) -> Encoded:
        """A source and its answer, both with what the tokenizer puts around a text."""
        if example.prompt is None:
            raise CompileError(
                f"{self._place(example)}a text without a prompt, but an encoder-decoder learns to "
                'answer a source; give {"prompt": "…", "answer": "…"} in each line, or another '
                "format with prompts"
            )
        room = self.length - 1
        answer, source = self._answer(example), self._source(example, room)
        if len(source) + len(answer) > room:
            answer = answer[: max(self.length // 2 - 1, room - len(source))]
            source = self._source(example, room - len(answer))
        if not answer or not source:
            empty = "prompt" if answer else "answer"
            raise CompileError(f"{self._place(example)}the {empty} holds no tokens")
        return Encoded((begin, *answer), 1, tuple(source))

    def _answer(self, example: Example) -> list[int]:
        """An answer as an encoder-decoder learns it: with an end, in the target's language."""
        given = example.answer
        if isinstance(given, str) and self.tokenizer is not None:
            given = list(self.tokenizer(text_target=given)["input_ids"])
        tokens = self._tokens(given, example)
        # Marian and mBART put more behind the end, or nothing.
        return tokens if set(self.stop) <= {*tokens} else [*tokens, *self.stop]

    def _source(self, example: Example, room: int) -> list[int]:
        """A prompt as a program's client encodes it; one that is too long loses its end."""
        given = example.prompt or ""
        if not isinstance(given, str) or self.chat or self.tokenizer is None:
            return self._prompt(example)[:room]
        found = self.tokenizer(given, truncation=True, max_length=room)
        return self._tokens(list(found["input_ids"]), example)

    def _prompt(self, example: Example) -> list[int]:
        prompt = example.prompt
        if isinstance(prompt, str) and self.chat:
            messages = [{"role": "user", "content": prompt}]
            prompt = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            return self._tokens(prompt, example)
        if isinstance(prompt, str):
            prompt += self.separator
        return self._tokens(prompt or "", example, first=True)

    def _tokens(self, text: Text, example: Example, *, first: bool = False) -> list[int]:
        """first: whether what the tokenizer puts before a text comes along."""
        if isinstance(text, str):
            if self.tokenizer is None:
                raise CompileError(
                    f"{self._place(example)}the model has no tokenizer; give token numbers"
                )
            text = list(self.tokenizer(text, add_special_tokens=first)["input_ids"])
            # What it may put after a text comes once, after the answer.
            while first and text and text[-1:] == self.stop:
                text.pop()
        wrong = [token for token in text if not 0 <= token < self.vocab_size]
        if wrong:
            raise CompileError(
                f"{self._place(example)}the token {wrong[0]} is not in the vocabulary of "
                f"{self.vocab_size}"
            )
        return text

    def _place(self, example: Example) -> str:
        return f"{self.file}, line {example.line}: " if example.line else f"{self.file}: "


def split(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Examples to train on, and a share of them, at least one, to validate with.

    Examples of one line or dialogue stay together. Raises CompileError if
    there are too few.
    """
    groups: dict[tuple[int, int], list[Example]] = {}
    for example in examples:
        groups.setdefault((example.line, example.dialogue), []).append(example)
    order = list(groups.values())
    if len(order) < 2:
        raise CompileError("the data holds one example; give at least two, or a validation file")
    random.Random(seed).shuffle(order)
    kept = max(1, round(share * len(order)))
    return (
        [example for group in order[kept:] for example in group],
        [example for group in order[:kept] for example in group],
    )
